"""Logging in, and everything that keeps others from it."""

from __future__ import annotations

import base64
import itertools
import threading
from pathlib import Path

import pyotp
import pytest
from sqlalchemy import select

from gateway.identity.rules import totp_step
from storage.db.base import Base
from storage.kernel.settings import Http
from storage.kernel.types import PatientKey
from tests.support.accounts import (
    CLI,
    PASSWORD,
    SYSTEM,
    Browser,
    Site,
    closed_site,
    with_identity,
)

STUDIES = "/dicom-web/studies"
NEW = "Other#horse-8"


def test_a_login_opens_what_was_closed(any_site: Site) -> None:
    any_site.add("wang", "radiologist")
    browser = any_site.browser()
    assert browser.get(STUDIES).status == 401

    answer = browser.log_in("wang")

    assert answer.status == 200
    assert answer.json()["roles"] == ["radiologist"]
    assert browser.get(STUDIES).status == 204
    assert browser.get("/api/v1/me").json()["name"] == "wang"
    assert browser.post("/api/v1/logout").status == 204
    assert browser.get(STUDIES).status == 401
    [login] = any_site.audit(action="login", outcome="allow")
    assert (login["actor"], login["source"]) == ("wang", "127.0.0.1")
    assert any_site.audit(action="logout", actor="wang")


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(site: Site) -> None:
    site.add("wang", "radiologist")

    cookie = site.browser().log_in("wang").headers["set-cookie"].lower()

    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "domain=" not in cookie


def test_behind_tls_the_cookie_stays_in_tls(tmp_path: Path) -> None:
    http = Http(external_url="https://pacs.example")
    with closed_site(tmp_path / "data", http=http) as site:
        site.add("wang", "radiologist")

        cookie = site.browser().log_in("wang").headers["set-cookie"]

    assert cookie.startswith("__Host-huying=")
    assert "Secure" in cookie
    assert "Path=/" in cookie


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("nobody", PASSWORD),
        ("wang", "wrong"),
        ("gone", PASSWORD),
        ("", ""),
        ("ＷＡＮＧ", "x"),
    ],
)
def test_a_wrong_login_says_nothing_of_what_is_wrong(
    site: Site, name: str, password: str
) -> None:
    site.add("wang", "radiologist")
    site.add("gone", "radiologist")
    site.node.identity.accounts.disable(SYSTEM, "gone", CLI)
    passwords = site.node.identity.logins.passwords
    before = passwords.n_computed

    answer = site.browser().log_in(name, password)

    assert answer.status == 401
    assert answer.json()["detail"] == "the name, the password or the code is wrong"
    # The price is the same too: one hash, whether there is an account or not.
    assert passwords.n_computed == before + 1
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", ["wang", "nobody"])
def test_five_failures_lock_a_name_whether_it_exists_or_not(
    any_site: Site, name: str
) -> None:
    any_site.add("wang", "radiologist")
    browser = any_site.browser()
    passwords = any_site.node.identity.logins.passwords

    statuses = [browser.log_in(name, "wrong").status for _ in range(5)]
    before = passwords.n_computed
    locked = browser.log_in(name)

    assert statuses == [401] * 5
    assert locked.status == 429
    assert 800 < int(locked.headers["retry-after"]) <= 900
    assert passwords.n_computed == before
    assert any_site.audit(action="login", outcome="deny", actor=name)[-1]["reason"] == (
        "locked after failures"
    )
    assert any_site.browser().log_in("nobody2", "wrong").status == 401


def test_a_lock_ends_and_counting_begins_anew(tmp_path: Path) -> None:
    settings = with_identity(account_failures=2, lock_seconds=0.5)
    with closed_site(tmp_path / "data", identity=settings) as site:
        site.add("wang", "radiologist")
        browser = site.browser()
        for _ in range(2):
            assert browser.log_in("wang", "wrong").status == 401
        assert browser.log_in("wang").status == 429
        threading.Event().wait(0.6)

        assert browser.log_in("wang", "wrong").status == 401
        assert browser.log_in("wang").status == 200


def test_an_operator_lifts_a_lock(site: Site) -> None:
    site.add("wang", "radiologist")
    for _ in range(5):
        site.browser().log_in("wang", "wrong")

    site.node.identity.accounts.enable(SYSTEM, "wang", CLI)

    assert site.browser().log_in("wang").status == 200


def test_a_success_forgives_the_name_but_not_the_address(tmp_path: Path) -> None:
    settings = with_identity(account_failures=3, address_failures=4)
    with closed_site(tmp_path / "data", identity=settings) as site:
        site.add("wang", "radiologist")
        browser = site.browser()
        # Whoever has an account would go on guessing for ever.
        for guess in range(4):
            browser.log_in(f"victim{guess}", "wrong")
            if guess < 3:
                assert browser.log_in("wang").status == 200

        assert browser.log_in("wang").status == 429


def test_guesses_side_by_side_are_counted(site: Site) -> None:
    site.add("wang", "radiologist")
    statuses: list[int] = []

    def guess(number: int) -> None:
        statuses.append(site.browser().log_in("wang", f"guess{number}").status)

    threads = [threading.Thread(target=guess, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(statuses) == [401] * 5 + [429] * 11


def test_the_first_login_asks_for_a_password_of_ones_own(site: Site) -> None:
    given = site.add("wang", "radiologist", must_change=True)
    browser = site.browser()
    answer = browser.log_in("wang", given)
    assert answer.json()["must"] == ["password"]
    assert answer.json()["roles"] == ["pending"]
    old = dict(browser.cookies)
    for path in (STUDIES, "/api/v1/study-list", "/api/v1/node", "/assets/page.js"):
        assert browser.get(path).status == 401, path
    assert browser.post("/api/v1/tickets", {"study": "1.2"}).status == 401

    changed = browser.post("/api/v1/me/password", {"present": given, "password": NEW})

    assert changed.json()["must"] == []
    browser.csrf = changed.json()["csrf"]
    assert browser.get(STUDIES).status == 204
    assert browser.cookies != old
    # The id before the change of rights is nobody's any more.
    assert Browser(site.url, old).get(STUDIES).status == 401
    assert site.browser().log_in("wang", given).status == 401
    assert site.browser().log_in("wang", NEW).status == 200


@pytest.mark.parametrize(
    ("password", "said", "rule"),
    [
        ("Sh0rt#", "at least 10", "short"),
        ("alllowercase1", "three of", "classes"),
        ("1234567890ab", "three of", "classes"),
        ("Password123", "too common", "common"),
        ("Qwertyuiop1", "too common", "common"),
        ("Aa1Aa1Aa1Aa1", "too common", "common"),
        ("X#wang-2026-x", "account", "name"),
        ("Aa1#" * 100, "at most", "long"),
        (PASSWORD, "used before", "used"),
    ],
)
def test_a_weak_password_is_refused_with_a_reason(
    site: Site, password: str, said: str, rule: str
) -> None:
    browser = site.logged_in("wang", "radiologist")

    answer = browser.post(
        "/api/v1/me/password", {"present": PASSWORD, "password": password}
    )

    assert answer.status == 400
    assert said in answer.json()["detail"]
    assert answer.json()["code"] == f"input.password.{rule}"
    assert password not in answer.text


@pytest.mark.parametrize("password", ["胸部CT平扫2026年", "Zoë-Élan-44x", NEW])
def test_good_passwords_of_any_script_are_taken(site: Site, password: str) -> None:
    browser = site.logged_in("wang", "radiologist")

    answer = browser.post(
        "/api/v1/me/password", {"present": PASSWORD, "password": password}
    )

    assert answer.status == 200
    assert site.browser().log_in("wang", password).status == 200


def test_the_last_five_passwords_cannot_be_taken_again(site: Site) -> None:
    browser = site.logged_in("wang", "radiologist")
    used = [PASSWORD, *(f"Other#horse-{n}x" for n in range(5))]
    for present, wanted in itertools.pairwise(used):
        answer = browser.post(
            "/api/v1/me/password", {"present": present, "password": wanted}
        )
        assert answer.status == 200, answer.text
        browser.csrf = answer.json()["csrf"]

    def again(wanted: str) -> int:
        answer = browser.post(
            "/api/v1/me/password", {"present": used[-1], "password": wanted}
        )
        return answer.status

    assert [again(one) for one in used[1:]] == [400] * 5
    assert again(used[0]) == 200


def test_an_old_password_must_be_changed(tmp_path: Path) -> None:
    settings = with_identity(password_days=1e-9)
    with closed_site(tmp_path / "data", identity=settings) as site:
        site.add("wang", "radiologist")

        assert site.browser().log_in("wang").json()["must"] == ["password"]


def test_a_wrong_present_password_counts_as_a_guess(site: Site) -> None:
    browser = site.logged_in("wang", "radiologist")

    def change() -> int:
        body = {"present": "wrong", "password": NEW}
        return browser.post("/api/v1/me/password", body).status

    assert [change() for _ in range(6)] == [401] * 5 + [429]


# -- the second factor


@pytest.fixture
def administrator(site: Site) -> tuple[Browser, str]:
    """Return a browser whose account has set up a second factor, and its secret."""
    browser = site.logged_in("root", "administrator")
    assert browser.get("/api/v1/me").json()["must"] == ["second_factor"]
    made = browser.post("/api/v1/me/totp", {}).json()
    code = pyotp.TOTP(made["secret"]).now()
    answer = browser.post("/api/v1/me/totp", {"code": code})
    assert answer.status == 200, answer.text
    browser.csrf = answer.json()["csrf"]
    return browser, made["secret"]


def test_an_administrator_needs_a_second_factor(
    site: Site, administrator: tuple[Browser, str]
) -> None:
    browser, secret = administrator
    assert browser.get("/api/v1/peers").status == 200
    without = site.browser().log_in("root")
    assert without.status == 401
    assert without.json()["code"] == "not_authenticated.code"
    # The code that set it up was used; the next one is good, once.
    at = site.node.clock.now_us()
    following = pyotp.TOTP(secret).generate_otp(at // 30_000_000 + 1)

    assert site.browser().log_in("root", code=following).status == 200
    assert site.browser().log_in("root", code=following).status == 401


def test_before_it_is_set_up_nothing_else_can_be_done(site: Site) -> None:
    browser = site.logged_in("root", "administrator", "archive_manager")

    for path in ("/api/v1/peers", STUDIES, "/api/v1/node"):
        assert browser.get(path).status == 401


def test_guessing_codes_locks_too(
    site: Site, administrator: tuple[Browser, str]
) -> None:
    del administrator
    statuses = []
    for _ in range(5):
        # A login without a code is no failure, and forgives none.
        site.browser().log_in("root")
        statuses.append(site.browser().log_in("root", code="000000").status)

    assert statuses == [401] * 5
    assert site.browser().log_in("root").status == 429


def test_a_second_factor_is_replaced_with_the_old_one_only(
    site: Site, administrator: tuple[Browser, str]
) -> None:
    browser, secret = administrator
    fresh = browser.post("/api/v1/me/totp", {}).json()["secret"]
    step = site.node.clock.now_us() // 30_000_000
    code = pyotp.TOTP(fresh).generate_otp(step)

    assert browser.post("/api/v1/me/totp", {"code": code}).status == 401

    present = pyotp.TOTP(secret).generate_otp(step + 1)
    answer = browser.post("/api/v1/me/totp", {"code": code, "present_code": present})
    assert answer.status == 200


def test_a_lost_second_factor_is_forgotten_by_an_operator(
    site: Site, administrator: tuple[Browser, str]
) -> None:
    browser, _ = administrator

    site.node.identity.accounts.reset_totp(SYSTEM, "root", CLI)

    assert browser.get("/api/v1/peers").status == 401
    assert site.browser().log_in("root").json()["must"] == ["second_factor"]


@pytest.mark.parametrize(
    ("at", "last", "taken"),
    [
        (59, 0, 1), (59, 1, None), (30, 0, 1), (89, 0, 1), (90, 0, None), (29, 0, 1),
        (0, 0, 1),
    ],
)  # fmt: skip
def test_a_code_is_good_a_step_early_and_late_and_once(
    at: int, last: int, taken: int | None
) -> None:
    """RFC 6238 Appendix B: the SHA-1 code of second 59 is 94287082."""
    secret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"  # noqa: S105  # of the RFC

    assert totp_step(secret, "287082", at * 1_000_000, last) == taken


@pytest.mark.parametrize("code", ["", "28708", "28708２", "abcdef", "287082" * 2])
def test_what_is_no_code_is_none(code: str) -> None:
    secret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"  # noqa: S105  # of the RFC

    assert totp_step(secret, code, 59_000_000, 0) is None


# -- sessions


def test_a_login_never_takes_over_an_id_that_was_put_there(site: Site) -> None:
    """Session fixation."""
    site.add("wang", "radiologist")
    browser = site.browser()
    browser.cookies["huying"] = "planted-by-somebody-else"

    browser.log_in("wang")

    assert browser.cookies["huying"] != "planted-by-somebody-else"
    planted = Browser(site.url, {"huying": "planted-by-somebody-else"})
    assert planted.get(STUDIES).status == 401


def test_logging_in_again_ends_the_session_the_browser_had(site: Site) -> None:
    browser = site.logged_in("wang", "radiologist")
    old = dict(browser.cookies)

    assert browser.log_in("wang").status == 200

    assert browser.cookies != old
    assert Browser(site.url, old).get(STUDIES).status == 401
    assert browser.get(STUDIES).status == 204


def test_the_oldest_session_gives_way(site: Site) -> None:
    site.add("wang", "radiologist")
    browsers = [site.browser() for _ in range(4)]
    for one in browsers:
        one.log_in("wang")

    assert [one.get(STUDIES).status for one in browsers] == [401, 204, 204, 204]


def test_unused_and_old_sessions_end(tmp_path: Path) -> None:
    for settings in (
        with_identity(idle_minutes=0.6 / 60),
        with_identity(session_hours=1.1 / 3600),
    ):
        folder = tmp_path / f"{settings.idle_minutes}"
        with closed_site(folder, identity=settings) as site:
            browser = site.logged_in("wang", "radiologist")
            assert browser.get(STUDIES).status == 204
            threading.Event().wait(1.2)
            site.node.identity.sessions.forget()

            assert browser.get(STUDIES).status == 401


def test_a_session_that_is_used_goes_on(tmp_path: Path) -> None:
    settings = with_identity(idle_minutes=1.0 / 60)
    with closed_site(tmp_path / "data", identity=settings) as site:
        browser = site.logged_in("wang", "radiologist")
        for _ in range(6):
            threading.Event().wait(0.3)
            site.node.identity.sessions.forget()

            assert browser.get(STUDIES).status == 204


def test_what_a_page_asks_for_by_itself_keeps_no_session_alive(tmp_path: Path) -> None:
    settings = with_identity(idle_minutes=1.2 / 60)
    with closed_site(tmp_path / "data", identity=settings) as site:
        browser = site.logged_in("wang", "radiologist")
        statuses = []
        for _ in range(6):
            threading.Event().wait(0.3)
            site.node.identity.sessions.forget()
            statuses.append(browser.get("/api/v1/activity", X_Background="1").status)

    assert statuses[0] == 200
    assert statuses[-1] == 401


def test_a_use_right_behind_a_background_request_counts(tmp_path: Path) -> None:
    settings = with_identity(idle_minutes=1.2 / 60)
    with closed_site(tmp_path / "data", identity=settings) as site:
        browser = site.logged_in("wang", "radiologist")
        for _ in range(6):
            threading.Event().wait(0.3)
            site.node.identity.sessions.forget()
            # What this one looked up is remembered when the next one comes.
            asked = browser.get("/api/v1/activity", X_Background="1")
            assert asked.status == 200
            assert browser.get(STUDIES).status == 204


@pytest.mark.parametrize("what", ["disable", "reset_password", "roles"])
def test_a_change_of_rights_ends_sessions_at_once(any_site: Site, what: str) -> None:
    browser = any_site.logged_in("wang", "radiologist")
    assert browser.get(STUDIES).status == 204
    accounts = any_site.node.identity.accounts

    if what == "roles":
        accounts.set_roles(SYSTEM, "wang", ["clinician"], CLI)
    else:
        getattr(accounts, what)(SYSTEM, "wang", CLI)

    assert browser.get(STUDIES).status == 401


def test_secrets_are_not_in_the_database(any_site: Site) -> None:
    browser = any_site.logged_in("wang", "radiologist")
    token = any_site.token("his", "clinician").headers["Authorization"].split()[1]
    with any_site.node.database.read() as connection:
        text = "".join(
            str(tuple(row))
            for table in ("account", "session", "api_token", "audit_record")
            for row in connection.execute(select(Base.metadata.tables[table]))
        )

    for secret in (PASSWORD, browser.cookies["huying"], token, browser.csrf):
        assert secret not in text


# -- forged requests


def test_a_request_without_the_page_s_token_changes_nothing(site: Site) -> None:
    browser = site.logged_in("boss", "archive_manager")
    csrf = browser.csrf
    path = "/api/v1/studies/1.2.3/settle"
    for wrong in ("", "x", csrf[:-1], site.logged_in("other", "clinician").csrf):
        browser.csrf = wrong
        answer = browser.post(path)
        assert answer.status == 403
        assert "X-CSRF-Token" in answer.json()["detail"]

    browser.csrf = csrf
    assert browser.post(path).status == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_cannot_use_a_session_or_log_in(
    site: Site, headers: dict[str, str]
) -> None:
    browser = site.logged_in("boss", "archive_manager")

    assert browser.request("POST", "/api/v1/logout", {}, headers).status == 403
    body = {"name": "boss", "password": PASSWORD}
    fresh = site.browser()
    assert fresh.request("POST", "/api/v1/login", body, headers).status == 403
    ticket = {"ticket": "x"}
    forged = fresh.request("POST", "/api/v1/tickets/exchange", ticket, headers)
    assert forged.status == 403


def test_a_form_cannot_log_in(site: Site) -> None:
    site.add("wang", "radiologist")
    body = f'{{"name":"wang","password":"{PASSWORD}"}}'.encode()

    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = site.browser().request(
            "POST", "/api/v1/login", body, {"Content-Type": kind}
        )
        assert answer.status == 400


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "x"},
        {"name": 1, "password": "x"},
        {"name": "x", "password": None},
        {"name": "x", "password": "y", "role": "administrator"},
        [],
        "x",
        {"name": "x" * 100_000, "password": "y"},
        {"name": "x", "password": "y" * 70_000},
    ],
)
def test_malformed_logins_are_refused(site: Site, body: object) -> None:
    assert site.browser().post("/api/v1/login", body).status in {400, 413}


def test_a_name_cannot_write_lines_of_its_own(site: Site) -> None:
    name = "eve\n2026-01-01 root login allow\r\x1b[2J"

    assert site.browser().log_in(name).status == 401

    [record] = site.audit(action="login", outcome="deny")
    assert record["actor"].isprintable()
    assert "\n" not in record["actor"]


@pytest.mark.parametrize(
    "cookie",
    [
        "huying=",
        "huying=a;huying=b",
        "huying=%00",
        "huying=" + "x" * 5000,
        ";;==;",
        "é",
    ],
)
def test_odd_cookies_are_nobody(site: Site, cookie: str) -> None:
    answer = site.browser().request(
        "GET", STUDIES, headers={"Cookie": cookie.encode("latin-1").decode("latin-1")}
    )

    assert answer.status == 401


@pytest.mark.parametrize(
    "value",
    [
        "Bearer", "Bearer ", "Bearer x", "Bearer hyt_" + "x" * 43, "Basic d2FuZzp4",
        "Digest x", "x", "Bearer " + "x" * 5000, "bearer \xff",
    ],
)  # fmt: skip
def test_odd_authorizations_are_refused(site: Site, value: str) -> None:
    # Even with a good session beside it: what is said counts.
    browser = site.logged_in("wang", "radiologist")

    answer = browser.get(STUDIES, authorization=value)

    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")


# -- HTTP Basic


def basic(name: str, password: str) -> dict[str, str]:
    text = base64.b64encode(f"{name}:{password}".encode()).decode()
    return {"Authorization": f"Basic {text}"}


def test_basic_is_off_by_default(site: Site) -> None:
    site.add("wang", "radiologist")

    assert site.browser(**basic("wang", PASSWORD)).get(STUDIES).status == 401


def test_basic_is_for_dicomweb_and_costs_one_hash(tmp_path: Path) -> None:
    with closed_site(tmp_path / "data", identity=with_identity(basic=True)) as site:
        site.add("wang", "radiologist")
        client = site.browser(**basic("wang", PASSWORD))
        passwords = site.node.identity.logins.passwords
        before = passwords.n_computed
        assert [client.get(STUDIES).status for _ in range(3)] == [204] * 3
        assert passwords.n_computed == before + 1
        assert client.get("/api/v1/me").status == 401

        site.node.identity.accounts.reset_password(SYSTEM, "wang", CLI)

        wrong = site.browser(**basic("wang", "wrong")).get(STUDIES)
        assert wrong.status == 401
        assert "Basic" in wrong.headers["www-authenticate"]


def test_basic_is_not_taken_in_the_clear(tmp_path: Path) -> None:
    with closed_site(tmp_path / "data", identity=with_identity(basic=True)) as site:
        site.add("wang", "radiologist")
        client = site.browser(**basic("wang", PASSWORD))

        # A proxy that nobody named as ours stands between.
        assert client.get(STUDIES, x_forwarded_for="10.0.0.1").status == 401


def test_patients_see_nothing_but_their_own(site: Site) -> None:
    browser = site.logged_in(
        "p1", "patient", patients=(PatientKey("default", "", "PID1"),)
    )

    me = browser.get("/api/v1/me").json()

    assert me["patients"] == ["PID1"]
    assert browser.get("/api/v1/activity").status == 403
    assert browser.get("/api/v1/changes").status == 403
