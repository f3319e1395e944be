"""Logging in with a real browser: the first time, the next, in the wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyotp
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import DESKTOP, PHONE, Opener
from tests.support.accounts import PASSWORD, Site, closed_site, with_identity
from tests.support.datasets import ct_slice, uid

NEW = "Other#horse-8"
SCRIPTS = Path(__file__).parent


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Site]:
    with closed_site(tmp_path / "data") as made:
        made.store(ct_slice(seed=1))
        made.store(ct_slice(seed=2))
        yield made


@pytest.fixture(autouse=True)
def only_refusals(open_page: Opener, complaints: list[str]) -> Iterator[None]:
    """Let browsers say in their console that something was refused, and no more."""
    yield
    refused = re.compile(r"status of (400|401|403|429)")
    kept = [one for one in complaints if refused.search(one) is None]
    complaints[:] = kept


WRONG = "wrong"


def fill(page: Page, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)
    page.keyboard.press("Enter")


def studies(page: Page) -> list[str]:
    expect(page.locator("#rows > .study").first).to_be_visible()
    return page.locator(".opener").all_inner_texts()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_first_login_of_an_administrator(
    closed: Site, open_page: Opener, viewport: dict[str, int]
) -> None:
    password = closed.add("root", "administrator", "archive_manager", must_change=True)
    page = open_page(closed.url + "/", viewport=viewport)
    expect(page).to_have_title("登录 · 互影 Huying")

    fill(page, name="root", password=password)
    expect(page.locator("#change")).to_be_visible()
    # Who has just typed it is not asked again; password managers see whose it is.
    expect(page.locator("#present")).to_be_hidden()
    expect(page.locator("#who")).to_have_value("root")
    fill(page, wanted="short", again="short")
    expect(page.locator("#error")).to_have_text("密码至少要有 10 个字符")
    fill(page, wanted="Password123", again="Password123")
    expect(page.locator("#error")).to_have_text("这个密码太常见，容易被猜到")
    fill(page, wanted=NEW, again=NEW + "x")
    expect(page.locator("#error")).to_have_text("两次输入不一致")
    fill(page, again=NEW)
    expect(page.locator("#totp")).to_be_visible()
    box = page.locator("#qr svg").bounding_box()
    assert box is not None
    assert min(box["width"], box["height"]) > 150
    assert (page.locator("#uri").get_attribute("href") or "").startswith(
        "otpauth://totp/"
    )
    fits = (
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert page.evaluate(fits)
    fill(page, first=pyotp.TOTP(page.locator("#secret").inner_text()).now())

    assert len(studies(page)) == 2


def test_a_code_is_asked_for_when_the_password_is_right(
    closed: Site, open_page: Opener
) -> None:
    secret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"  # noqa: S105  # of RFC 6238
    closed.add("wang", "radiologist")
    with closed.node.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE account SET totp_secret = '{secret}'")  # noqa: S608
    page = open_page(closed.url + "/login")
    expect(page.locator("#code-field")).to_be_hidden()

    fill(page, name="wang", password=PASSWORD)
    expect(page.locator("#code-field")).to_be_visible()
    fill(page, code=pyotp.TOTP(secret).now())

    assert len(studies(page)) == 2
    assert page.url == closed.url + "/"


def test_wrong_logins_are_explained_in_both_languages(
    closed: Site, open_page: Opener
) -> None:
    page = open_page(closed.url + "/")
    page.locator("#language").click()
    expect(page).to_have_title("Log in · Huying")
    for _ in range(5):
        fill(page, name="nobody", password=WRONG)
        expect(page.locator("#error")).to_have_text(
            "The account, the password or the code is wrong"
        )
        expect(page.locator("#login button")).to_be_enabled()
    fill(page, password=WRONG)
    expect(page.locator("#error")).to_contain_text("try again in 15 minutes")

    page.locator("#language").click()
    page.reload()

    expect(page.locator("#login h2")).to_have_text("登录")


def test_the_page_has_names_and_contrast(closed: Site, open_page: Opener) -> None:
    for scheme in ("light", "dark"):
        page = open_page(closed.url + "/login", viewport=PHONE, color_scheme=scheme)
        expect(page.locator("#login")).to_be_visible()

        assert page.evaluate((SCRIPTS / "nameless.js").read_text("utf-8")) == []
        assert page.evaluate((SCRIPTS / "contrast.js").read_text("utf-8")) == []


def test_a_ticket_s_link_shows_its_study_and_no_other(
    closed: Site, open_page: Opener
) -> None:
    doctor = closed.logged_in("chen", "clinician")
    issued = doctor.post("/api/v1/tickets", {"study": uid(1)}).json()

    page = open_page(closed.url + issued["url"])

    assert len(studies(page)) == 1
    assert page.url == closed.url + "/"
    expect(page.locator("#account-name")).to_have_text("chen 的链接")
    expect(page.locator("#figures")).to_be_hidden()
    # Who follows the link again is where it leads; nobody was refused anything.
    page.goto(closed.url + issued["url"])
    assert len(studies(page)) == 1
    assert closed.audit(outcome="deny") == []
    # Whoever finds the link in a history finds nothing.
    stranger = open_page(closed.url + issued["url"])
    expect(stranger).to_have_title("登录 · 互影 Huying")
    expect(stranger.locator("#note")).to_contain_text("已经用过或已过期")
    expect(stranger.locator("#home")).to_be_hidden()
    assert stranger.url == closed.url + "/login"
    # Whose session shows something else may go on with that.
    other = doctor.post("/api/v1/tickets", {"study": uid(2)}).json()
    stranger.goto(closed.url + other["url"])
    assert len(studies(stranger)) == 1
    stranger.goto(closed.url + issued["url"])
    expect(stranger.locator("#note")).to_contain_text("已经用过或已过期")
    stranger.locator("#home").click()
    assert len(studies(stranger)) == 1


def test_the_viewer_without_a_session_is_the_login_page(
    closed: Site, open_page: Opener
) -> None:
    closed.add("wang", "radiologist")
    page = open_page(closed.url + "/viewer")
    expect(page).to_have_title("登录 · 互影 Huying")

    fill(page, name="wang", password=PASSWORD)

    assert len(studies(page)) == 2
    assert page.url == closed.url + "/"


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("locale", ["zh-CN", "en-GB"])
def test_one_sees_who_one_is_and_logs_out(
    closed: Site, open_page: Opener, viewport: dict[str, int], locale: str
) -> None:
    closed.add("wang", "radiologist")
    page = open_page(closed.url + "/", viewport=viewport, locale=locale)
    fill(page, name="wang", password=PASSWORD)
    assert len(studies(page)) == 2
    expect(page.locator("#account-name")).to_have_text("wang")
    page.locator(".opener").first.click()
    picture = page.locator(".preview img")
    expect(picture).to_be_visible()
    assert picture.evaluate("one => one.naturalWidth") > 0

    logout = {"zh-CN": "退出登录", "en-GB": "Log out"}[locale]
    page.get_by_role("button", name=logout).click()

    page.wait_for_url(closed.url + "/login")
    expect(page.locator("#login")).to_be_visible()
    page.goto(closed.url + "/")
    expect(page.locator("#login")).to_be_visible()
    page.go_back()
    expect(page.locator("#rows > .study")).to_have_count(0)


def test_an_unattended_list_is_logged_out(tmp_path: Path, open_page: Opener) -> None:
    settings = with_identity(idle_minutes=8 / 60)
    with closed_site(tmp_path / "idle", identity=settings) as site:
        site.store(ct_slice(seed=1))
        site.add("wang", "radiologist")
        page = open_page(site.url + "/")
        fill(page, name="wang", password=PASSWORD)
        assert len(studies(page)) == 1

        expect(page.locator("#login")).to_be_visible()

        expect(page.locator("#why")).to_have_text("登录已结束，请重新登录")
        assert page.url == site.url + "/login"


def test_who_sees_no_patients_is_told_so_and_refused_nothing(
    closed: Site, open_page: Opener
) -> None:
    closed.add("shen", "auditor")
    secret = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"  # noqa: S105  # of RFC 6238
    with closed.node.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE account SET totp_secret = '{secret}'")  # noqa: S608
    page = open_page(closed.url + "/")
    fill(page, name="shen", password=PASSWORD)
    expect(page.locator("#code-field")).to_be_visible()
    fill(page, code=pyotp.TOTP(secret).now())

    expect(page.locator("#state h2")).to_have_text("此账号不查看患者检查")
    expect(page.locator("#state")).not_to_have_class(re.compile("bad"))
    expect(page.locator("#search, .retry")).not_to_be_visible()
    assert closed.audit(outcome="deny") == []


@pytest.mark.parametrize(
    ("locale", "title"),
    [
        ("en-US", "Log in · Huying"),
        ("zh-TW", "登录 · 互影 Huying"),
        ("fr-FR", "登录 · 互影 Huying"),
    ],
)
def test_the_first_language_is_the_browsers_or_chinese(
    closed: Site, open_page: Opener, locale: str, title: str
) -> None:
    page = open_page(closed.url + "/", locale=locale)

    expect(page).to_have_title(title)


def test_nothing_is_sent_before_every_field_is_filled(
    closed: Site, open_page: Opener
) -> None:
    password = closed.add("wang", "radiologist", must_change=True)
    page = open_page(closed.url + "/")
    fill(page, name="wang")
    expect(page.locator("#error")).to_have_text("请填写所有项")
    expect(page.locator("#password")).to_be_focused()
    fill(page, password=password)
    expect(page.locator("#change")).to_be_visible()

    # Whoever comes back later has to show the present password.
    page.reload()
    expect(page.locator("#present")).to_be_visible()
    fill(page, wanted=NEW, again=NEW)

    expect(page.locator("#error")).to_have_text("请填写所有项")
    expect(page.locator("#present")).to_be_focused()
    assert closed.audit(action="account.password") == []
