"""What the addresses in answers begin with (PS3.18 10.5.3, 10.6.3)."""

from __future__ import annotations

import pytest
from fastapi import Request

from pacs.web.dependencies import BaseUrl


def asking(host: str | None, scheme: str = "http") -> Request:
    headers = [] if host is None else [(b"host", host.encode())]
    return Request({"type": "http", "scheme": scheme, "headers": headers})


def test_the_configured_address_comes_first() -> None:
    base = BaseUrl("https://pacs.example/huying", from_host=True)

    assert base.of(asking("127.0.0.1:8080")) == "https://pacs.example/huying"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "localhost", "[::1]:8042", "node-1.example"]
)
def test_else_the_name_that_the_client_used(host: str) -> None:
    assert BaseUrl(from_host=True).of(asking(host)) == f"http://{host}"
    assert BaseUrl(from_host=True).of(asking(host, "https")) == f"https://{host}"


@pytest.mark.parametrize(
    "host",
    [None, "", "a/b", "user@localhost", 'x"y', "localhost:", "h:999999", "-x", "a b",
     "[::1", "x" * 300],
)  # fmt: skip
def test_what_is_no_host_is_not_repeated(host: str | None) -> None:
    assert BaseUrl(from_host=True).of(asking(host)) == ""


def test_a_node_that_does_not_check_hosts_writes_paths() -> None:
    assert BaseUrl().of(asking("evil.example")) == ""
