"""Logging in with a real browser: the first time, the next, in the wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyotp
import pytest
from playwright.sync_api import Page, expect

from tests.e2e.conftest import DESKTOP, PHONE, Opener
from tests.support.accounts import PASSWORD, Site, closed_site
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
    fill(page, present=password, wanted="short", again="short")
    expect(page.locator("#error")).to_contain_text("10")
    fill(page, wanted=NEW, again=NEW + "x")
    expect(page.locator("#error")).to_have_text("两次输入不一致")
    fill(page, again=NEW)
    expect(page.locator("#totp")).to_be_visible()
    expect(page.locator("#qr svg")).to_be_visible()
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
    # Whoever finds the link in a history finds nothing.
    page.goto(closed.url + issued["url"])
    expect(page).to_have_title("登录 · 互影 Huying")
