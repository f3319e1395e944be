"""What nobody sends by mistake: no answer is an error of ours, on either engine."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from tests.gateway.identity.test_tenants import setup_totp
from tests.support.accounts import Browser, Site

ODD: tuple[Any, ...] = (
    "\0", "a\0b", "\x1b[2J", "../../etc/passwd", "' OR 1=1 --", "x" * 5000, "", " ",
    "\u202egnp", "𠮷", "%00", "{{7*7}}", "<script>", 0, -1, 1e308, True, None, [], {},
    ["x"], [None], {"a": 1}, [["x"]] * 3,
)  # fmt: skip
ROUTES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("POST", "/api/v1/login", {"name": "guard", "password": "x", "code": ""}),
    ("POST", "/api/v1/me/password", {"present": "x", "password": "y"}),
    ("POST", "/api/v1/me/totp", {"code": "1", "present_code": ""}),
    ("POST", "/api/v1/tickets", {"study": "1.2", "purpose": "treatment"}),
    ("POST", "/api/v1/tickets", {"patient_id": "P", "issuer": "H"}),
    ("POST", "/api/v1/tickets/exchange", {"ticket": "x", "as": "cookie"}),
    ("POST", "/api/v1/accounts", {
        "name": "n", "roles": ["patient"], "tenant": "default", "readable": [],
        "display_name": "", "patients": [{"patient_id": "P"}],
    }),
    ("PUT", "/api/v1/accounts/other/roles", {"roles": ["clinician"], "readable": []}),
    ("POST", "/api/v1/tokens", {"name": "n", "roles": ["device"], "days": 1}),
)  # fmt: skip


@pytest.fixture
def guard(any_site: Site) -> Browser:
    """Return the browser of somebody who may keep accounts and give out tickets."""
    any_site.add("other", "clinician")
    browser = any_site.logged_in("guard", "security_administrator", "clinician")
    setup_totp(browser)
    return browser


def test_no_value_of_a_body_is_an_error_of_ours(guard: Browser) -> None:
    for method, path, good in ROUTES:
        for name in good:
            for value in ODD:
                answer = guard.request(method, path, {**good, name: value})
                assert answer.status < 500, (path, name, value, answer.text)
                if answer.status in {200, 429}:
                    continue
                assert answer.status in {201, 204, 400, 401, 403, 404, 409}, path


@pytest.mark.parametrize("value", [one for one in ODD if isinstance(one, str) and one])
def test_no_name_in_a_path_is_an_error_of_ours(guard: Browser, value: str) -> None:
    name = quote(value[:200], safe="")
    for method, path in (
        ("POST", f"/api/v1/accounts/{name}/disable"),
        ("POST", f"/api/v1/accounts/{name}/reset-password"),
        ("PUT", f"/api/v1/accounts/{name}/roles"),
        ("DELETE", f"/api/v1/tokens/{name}"),
        ("GET", f"/api/v1/accounts?after={name}"),
        ("GET", f"/assets/{name}"),
        ("GET", f"/viewer?ticket={name}"),
        ("GET", f"/dicom-web/studies/{name}/metadata"),
    ):
        body = {"roles": ["clinician"]} if method == "PUT" else None
        answer = guard.request(method, path, body)
        assert 200 <= answer.status < 500, (path, answer.text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}" * 40_000,
        b"[" * 40_000,
        b"\xff\xfe",
        b'{"a":1e999}',
    ],
)
def test_no_body_is_an_error_of_ours(guard: Browser, body: bytes) -> None:
    for method, path, _ in ROUTES:
        answer = guard.request(method, path, body, {"Content-Type": "application/json"})
        assert answer.status in {400, 413, 429}, (path, answer.text)


def test_headers_cannot_be_written_through_us(any_site: Site) -> None:
    """Header injection: nothing that is given comes back as a header."""
    evil = "x\r\nSet-Cookie: huying=planted"
    for path in (
        f"/viewer?ticket={quote(evil)}",
        f"/login?next={quote(evil)}",
        f"/{quote(evil)}",
        f"/dicom-web/studies/{quote(evil)}",
    ):
        answer = any_site.browser().get(path)
        assert "planted" not in str(answer.headers)
