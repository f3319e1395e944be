"""What surrounds every request, and the node's own resources, on a running node."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping

import pytest
from starlette.types import Receive, Scope, Send

from gateway.http import protocol
from tests.support.dicomweb import serving
from tests.support.node import RunningNode
from tests.support.waiting import wait_until
from tests.support.web import Response

API = "/api/v1"


def put_peer(node: RunningNode, title: str, body: object) -> Response:
    return node.request("PUT", f"{API}/peers/{title}", json.dumps(body).encode())


def test_health_and_readiness_answer_without_login(shared_node: RunningNode) -> None:
    assert shared_node.get("/healthz").json() == {"status": "ok"}

    ready = shared_node.get("/readyz")

    assert ready.status == 200
    assert ready.json()["status"] == "ready"
    assert ready.json()["sync"] == "instance"
    assert set(ready.json()["parts"].values()) == {"ok"}


def test_metrics_need_the_token(shared_node: RunningNode) -> None:
    assert shared_node.get("/metrics").status == 401
    assert shared_node.get("/metrics", authorization="Bearer guess").status == 401

    shared_node.get("/healthz")

    counted = shared_node.metrics()
    assert any(
        name.startswith("huying_http_seconds_count") and 'route="/healthz"' in name
        for name in counted
    )


def test_every_answer_forbids_guessing_its_type(shared_node: RunningNode) -> None:
    for path in ("/", "/healthz", "/dicom-web/studies", "/no-such-page"):
        headers = shared_node.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path


def test_an_unknown_path_is_a_problem_document(shared_node: RunningNode) -> None:
    answer = shared_node.get("/no-such-page")

    assert answer.status == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 404


@pytest.mark.parametrize("method", ["PATCH", "TRACE", "BREW"])
def test_methods_without_a_route_are_refused(
    shared_node: RunningNode, method: str
) -> None:
    assert shared_node.request(method, f"{API}/changes").status in {400, 405}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_an_open_node_does_not_answer_to_names_of_others(
    shared_node: RunningNode, host: str
) -> None:
    # A name of theirs that resolves to loopback would let their page read ours.
    answer = shared_node.request("GET", "/dicom-web/studies", headers={"Host": host})

    assert answer.status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 404),
        ({}, 404),
    ],
)
def test_c27_pages_of_other_sites_cannot_change_an_open_node(
    shared_node: RunningNode, headers: Mapping[str, str], status: int
) -> None:
    answer = shared_node.request(
        "POST", f"{API}/studies/1.2.3.404/settle", b"", headers
    )

    assert answer.status == status


def test_a_closed_node_asks_for_a_login_everywhere_but_for_its_health(
    node: RunningNode,
) -> None:
    node.restart(open="false")
    for path in (
        "/", "/dicom-web/studies", f"{API}/changes", f"{API}/peers", f"{API}/node",
        f"{API}/study-list", f"{API}/activity", "/metrics",
    ):  # fmt: skip
        assert node.get(path).status == 401, path
    for path in ("/healthz", "/readyz"):
        assert node.get(path).status == 200, path


def test_the_change_feed_pages_and_knows_its_epoch(shared_node: RunningNode) -> None:
    page = shared_node.get(f"{API}/changes?since=0&limit=1").json()

    assert set(page) == {"epoch", "events", "next", "more", "pruned"}
    other = shared_node.get(f"{API}/changes?since=10&limit=5&epoch=0123").json()
    assert other["events"] == []
    assert other["next"] == 0


@pytest.mark.parametrize(
    "query", ["since=-1", "since=x", "limit=0", "since=99999999999999999999999"]
)
def test_malformed_feed_parameters_are_named(
    shared_node: RunningNode, query: str
) -> None:
    answer = shared_node.get(f"{API}/changes?{query}")

    assert answer.status == 400
    assert query.partition("=")[0] in answer.json()["detail"]


def test_peers_are_added_changed_and_removed(shared_node: RunningNode) -> None:
    wanted = {"host": "127.0.0.1", "port": 104, "may": ["echo", "find"]}

    assert put_peer(shared_node, "HTTPPEER", wanted).status == 200
    assert put_peer(shared_node, "HTTPPEER", wanted | {"port": 105}).status == 200
    listed = {one["title"]: one for one in shared_node.get(f"{API}/peers").json()}

    assert listed["HTTPPEER"]["port"] == 105
    assert listed["HTTPPEER"]["may"] == ["echo", "find"]
    assert shared_node.request("DELETE", f"{API}/peers/HTTPPEER").status == 204
    assert shared_node.request("DELETE", f"{API}/peers/HTTPPEER").status == 404


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"port": "104"}, "port"),
        ({"port": True}, "port"),
        ({"colour": "red"}, "colour"),
        ({"may": ["fly"]}, "may"),
        ({"may": [1]}, "may"),
        ([], "body"),
    ],
)
def test_a_wrong_peer_is_named(
    shared_node: RunningNode, body: object, named: str
) -> None:
    answer = put_peer(shared_node, "WRONG", body)

    assert answer.status == 400
    assert named in answer.json()["detail"]


def test_a_huge_peer_body_is_refused(shared_node: RunningNode) -> None:
    answer = shared_node.request("PUT", f"{API}/peers/HUGE", b" " * 100_000)

    assert answer.status == 413


def test_a_client_that_leaves_within_its_body_is_no_failure(node: RunningNode) -> None:
    with socket.create_connection(("127.0.0.1", node.http_port)) as leaving:
        leaving.sendall(
            f"PUT {API}/peers/LEFT HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )

    def counted() -> bool:
        return any(
            "http_seconds_count" in name and 'method="PUT"' in name
            for name in node.metrics()
        )

    wait_until(counted, "the request to end")
    assert b"http.failed" not in node.log_bytes()
    assert b"exception" not in node.log_bytes()


def test_half_a_request_does_not_hold_up_others(shared_node: RunningNode) -> None:
    with socket.create_connection(("127.0.0.1", shared_node.http_port)) as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: 127")

        assert shared_node.get("/healthz").status == 200


def test_a_web_process_that_dies_is_started_again(node: RunningNode) -> None:
    node.kill("huying-web-1")

    # The other process answers at once; the killed one comes back.
    assert node.get("/readyz").status == 200


@pytest.mark.parametrize(("lines", "status"), [(60, b"200"), (70, b"431")])
def test_a_head_is_refused_beyond_the_limit(
    shared_node: RunningNode, lines: int, status: bytes
) -> None:
    line = b"X-Long: " + b"a" * 1000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", shared_node.http_port)) as raw:
        raw.settimeout(30)
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + line * lines)
        if status == b"200":
            raw.sendall(b"\r\n")

        assert raw.recv(4096).startswith(b"HTTP/1.1 " + status)


def test_a_head_that_takes_too_long_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)

    async def hello(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    with (
        serving(hello, http=protocol.BoundedProtocol) as address,
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw,
    ):
        raw.settimeout(30)
        raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"hello" in raw.recv(4096)

        raw.sendall(b"GET / HTTP/1.1\r\nHo")
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        assert raw.recv(4096) == b""


def test_a_body_that_does_not_come_is_not_waited_for(
    shared_node: RunningNode,
) -> None:
    with socket.create_connection(("127.0.0.1", shared_node.http_port)) as raw:
        raw.settimeout(60)
        raw.sendall(
            b"PUT /api/v1/peers/SLOW HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Length: 100\r\n\r\n"
        )
        assert raw.recv(4096).startswith((b"HTTP/1.1 408", b"HTTP/1.1 400"))
