"""Addresses of clients behind proxies, and whether a page is ours."""

from __future__ import annotations

import pytest

from gateway.http.client import Clients

PROXY = "10.0.0.5"


def headers(**values: str) -> dict[bytes, bytes]:
    return {
        name.replace("_", "-").encode(): value.encode()
        for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        # Anybody can write the header; only what our proxy adds is believed.
        ("192.0.2.1", "203.0.113.9", "192.0.2.1"),
        (PROXY, "203.0.113.9", "203.0.113.9"),
        (PROXY, "1.1.1.1, 203.0.113.9", "203.0.113.9"),
        (PROXY, f"203.0.113.9, {PROXY}", "203.0.113.9"),
        (PROXY, "", PROXY),
        (PROXY, "nonsense", PROXY),
        (PROXY, "203.0.113.9, nonsense", PROXY),
        (PROXY, "2001:DB8::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "", "192.0.2.1"),
        ("fe80::1%eth0", "", "fe80::1"),
        ("", "", ""),
    ],
)
def test_the_client_is_who_our_proxies_say(
    peer: str, forwarded: str, found: str
) -> None:
    clients = Clients([PROXY])

    address = clients.address({"client": (peer, 1)}, headers(x_forwarded_for=forwarded))

    assert address == found


def test_without_proxies_no_header_counts() -> None:
    given = headers(x_forwarded_for="203.0.113.9")

    assert Clients().address({"client": (PROXY, 1)}, given) == PROXY
    assert Clients().address({"client": None}, given) == ""


@pytest.mark.parametrize(
    ("peer", "named", "private"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("192.0.2.1", {}, False),
        ("127.0.0.1", {"x_forwarded_for": "192.0.2.1"}, False),
        (PROXY, {"x_forwarded_proto": "https"}, True),
        (PROXY, {"x_forwarded_proto": "http"}, False),
        (PROXY, {}, False),
        ("192.0.2.1", {"x_forwarded_proto": "https"}, False),
    ],
)
def test_who_could_read_a_request(
    peer: str, named: dict[str, str], *, private: bool
) -> None:
    clients = Clients([PROXY])

    assert clients.is_private({"client": (peer, 1)}, headers(**named)) is private


@pytest.mark.parametrize(
    ("external", "named", "ours"),
    [
        ("", {"host": "pacs:8080"}, True),
        ("", {"host": "pacs:8080", "origin": "http://pacs:8080"}, True),
        ("", {"host": "pacs:8080", "origin": "http://PACS:8080"}, True),
        ("", {"host": "pacs", "origin": "https://pacs:443"}, True),
        ("", {"host": "pacs:8080", "origin": "http://pacs:9090"}, False),
        ("", {"host": "pacs:8080", "origin": "http://pacs.evil"}, False),
        ("", {"host": "pacs:8080", "origin": "null"}, False),
        ("", {"host": "pacs:8080", "origin": ""}, False),
        ("", {"host": "", "origin": "http://"}, False),
        (
            "https://pacs.example/",
            {"host": "x", "origin": "https://pacs.example"},
            True,
        ),
        ("https://pacs.example", {"host": "x", "origin": "http://pacs.example"}, False),
        ("https://pacs.example", {"host": "evil", "origin": "https://evil"}, False),
        ("", {"host": "pacs", "sec_fetch_site": "cross-site"}, False),
        ("", {"host": "pacs", "sec_fetch_site": "same-origin"}, True),
        ("", {"host": "pacs", "origin": "http://[::1"}, False),
    ],
)
def test_whose_page_sends_a_request(
    external: str, named: dict[str, str], *, ours: bool
) -> None:
    assert Clients((), external).is_same_origin(headers(**named)) is ours
