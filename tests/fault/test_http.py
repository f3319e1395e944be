"""Rows C of the bad-input table, through a real HTTP listener."""

from __future__ import annotations

import gzip
import io
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from pacs.web.intake import IN_FLIGHT_BYTES
from storage.kernel.limits import KIB, MIB, Limits
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10, uid
from tests.support.dicomweb import WebArchive, multipart, web_archive
from tests.support.waiting import wait_until
from tests.support.web import Response, request

LIMITS = Limits(
    memory_instance_bytes=256 * KIB,
    instance_bytes=256 * MIB,
    request_bytes=400 * MIB,
    request_parts=2000,
    part_header_bytes=1 * KIB,
)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    folder = tmp_path_factory.mktemp("http")
    with web_archive(folder, limits=LIMITS, body_seconds=1) as served:
        yield served


def alive(web: WebArchive) -> None:
    """Check that the listener serves and nothing half-written lies about."""
    assert request(f"{web.dicomweb}/studies?limit=1").status in {200, 204}
    wait_until(
        lambda: not list(web.archive.folder.rglob("*.partial")), "no partial packs"
    )


def post(
    web: WebArchive, body: Any, headers: dict[str, str], study: str = ""
) -> Response:
    path = f"{web.dicomweb}/studies" + (f"/{study}" if study else "")
    return request(path, method="POST", body=body, headers=headers)


def held(web: WebArchive, instance_uid: str) -> bytes | None:
    answer = request(f"{web.url}/api/v1/instances/{instance_uid}/file")
    return dataset_bytes(answer.body) if answer.status == 200 else None


def send_raw(web: WebArchive, data: bytes) -> socket.socket:
    host, port = web.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def head(content_type: str, *more: str, target: str = "/dicom-web/studies") -> bytes:
    lines = [
        f"POST {target} HTTP/1.1", "Host: 127.0.0.1",
        f"Content-Type: {content_type}", *more,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


MULTIPART = 'multipart/related; type="application/dicom"; boundary=B'


# C01


def test_c01_a_declared_length_beyond_the_limit_is_413(web: WebArchive) -> None:
    before = psutil.Process().memory_info().rss

    with send_raw(web, head(MULTIPART, f"Content-Length: {10**13}")) as connection:
        answer = connection.recv(4096)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert psutil.Process().memory_info().rss - before < 16 * MIB
    alive(web)


def test_c01_an_endless_chunked_body_is_413(tmp_path: Path) -> None:
    limits = Limits(request_bytes=1 * MIB)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with web_archive(tmp_path, limits=limits) as web:
        start = head("application/dicom", "Transfer-Encoding: chunked")
        with send_raw(web, start) as connection:
            answers: list[bytes] = []

            def listen() -> None:
                answers.append(connection.recv(4096))

            listener = threading.Thread(target=listen)
            listener.start()
            sent = 0
            while not answers and sent < 64 * MIB:
                try:
                    connection.sendall(chunk)
                except OSError:
                    break
                sent += len(chunk)
            listener.join()
        assert answers[0].startswith(b"HTTP/1.1 413 ")
        alive(web)


def test_c01_a_body_that_drips_is_408(web: WebArchive) -> None:
    stop = threading.Event()
    with send_raw(web, head(MULTIPART, "Content-Length: 100000")) as connection:

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        answer = connection.recv(4096)
        stop.set()
        dripping.join()

    assert answer.startswith(b"HTTP/1.1 408 ")
    alive(web)


def test_c01_a_body_that_stops_is_408(web: WebArchive) -> None:
    file = part10(ct_slice(seed=100, size=600))
    body, headers = multipart([file])
    start = head(headers["Content-Type"], f"Content-Length: {len(body)}")

    with send_raw(web, start + body[:-5000]) as connection:
        answer = connection.recv(4096)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert held(web, uid(100, 1, 1)) is None
    alive(web)


def test_c01_a_slow_but_steady_client_is_served(tmp_path: Path) -> None:
    body, headers = multipart([part10(ct_slice(seed=102))])
    start = head(headers["Content-Type"], f"Content-Length: {len(body)}")
    pause = threading.Event()
    with web_archive(tmp_path, body_seconds=0.2) as web:
        with send_raw(web, start) as connection:
            # Three times as long as a client may be silent.
            for at in range(0, len(body), len(body) // 12 + 1):
                connection.sendall(body[at : at + len(body) // 12 + 1])
                pause.wait(0.05)
            answer = connection.recv(4096)

        assert answer.startswith(b"HTTP/1.1 200 ")
        assert held(web, uid(102, 1, 1)) is not None


# C02


def test_c02_compressed_bodies_are_415(web: WebArchive) -> None:
    body, headers = multipart([part10(ct_slice(seed=101))])

    answer = post(web, gzip.compress(body), headers | {"Content-Encoding": "gzip"})

    assert answer.status == 415
    assert held(web, uid(101, 1, 1)) is None


# C03, C04


def framed(file: bytes, form: str) -> bytes:
    """Return a multipart body of one file with the boundary ``B``, written oddly."""
    headers = b"Content-Type: application/dicom\r\n\r\n"
    plain = b"--B\r\n" + headers + file + b"\r\n--B--\r\n"
    return {
        "preamble": b"text\r\n--Bx\r\n\r\n" + plain,
        "line first": b"\r\n" + plain,
        "epilogue": plain + b"--B\r\n\r\nmore",
        "padding": plain.replace(b"--B\r\n", b"--B \t \r\n"),
        "bare lf": b"--B\nContent-Type: application/dicom\n\n" + file + b"\n--B--\n",
        "no headers": b"--B\r\n\r\n" + file + b"\r\n--B--",
        "other headers": b"--B\r\nX: y\r\nMIME-Version: 1.0\r\n" + headers + file
        + b"\r\n--B--",
        "folded header": b"--B\r\nContent-Type:\r\n application/dicom\r\n\r\n" + file
        + b"\r\n--B--",
        "upper case": plain.replace(b"Content-Type", b"CONTENT-TYPE"),
    }[form]  # fmt: skip


FORMS = [
    "preamble", "line first", "epilogue", "padding", "bare lf", "no headers",
    "other headers", "folded header", "upper case",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_c03_what_rfc_2046_allows_is_taken(web: WebArchive, form: str) -> None:
    ds = ct_slice(seed=110, number=FORMS.index(form) + 1)

    answer = post(web, framed(part10(ds), form), {"Content-Type": MULTIPART})

    assert answer.status == 200, answer.text
    assert held(web, ds.SOPInstanceUID) == dataset_bytes(part10(ds))


@pytest.mark.parametrize("size", [32, 600])
def test_c03_the_boundary_inside_pixels_is_data(web: WebArchive, size: int) -> None:
    ds = ct_slice(seed=111, number=size, size=size)
    line = b"--B--\r--B\0\r\n--Bx\n--B-\r\n--BB\r\n--B\0"
    ds.PixelData = line + ds.PixelData[2 * len(line) :] + line

    answer = post(web, framed(part10(ds), "preamble"), {"Content-Type": MULTIPART})

    assert answer.status == 200, answer.text
    assert held(web, ds.SOPInstanceUID) == dataset_bytes(part10(ds))


@pytest.mark.parametrize(
    "boundary", ["", "x" * 71, '"trailing "', '""', "a/b\x01", '"a<b"']
)
def test_c03_boundaries_that_are_none_are_400(web: WebArchive, boundary: str) -> None:
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
    body, _ = multipart([part10(ct_slice(seed=112))])

    assert post(web, body, {"Content-Type": kind}).status == 400


@pytest.mark.parametrize("boundary", ['"a b:c"', "x" * 70, "'()+_,-./=?"])
def test_c03_odd_boundaries_are_boundaries(web: WebArchive, boundary: str) -> None:
    body, _ = multipart([part10(ct_slice(seed=113))], boundary=boundary.strip('"'))
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'

    assert post(web, body, {"Content-Type": kind}).status == 200


@pytest.mark.parametrize("cut", [8, 200, 1500])
def test_c03_a_body_without_its_end_stores_nothing(web: WebArchive, cut: int) -> None:
    ds = ct_slice(seed=114, number=cut)
    body, headers = multipart([part10(ds)])

    answer = post(web, body[:-cut], headers)

    assert answer.status == 400
    assert held(web, ds.SOPInstanceUID) is None
    alive(web)


def test_c03_whole_instances_before_a_missing_end_are_reported(
    web: WebArchive,
) -> None:
    body, headers = multipart([part10(ds) for ds in a_study(seed=115, n_instances=2)])

    answer = post(web, body[:-100], headers)

    assert answer.status == 202
    stored = answer.json()["00081199"]["Value"]
    assert [one["00081155"]["Value"][0] for one in stored] == [uid(115, 1, 1)]
    assert "0008119A" in answer.json()
    assert held(web, uid(115, 1, 1)) is not None
    assert held(web, uid(115, 1, 2)) is None


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/related; boundary=B", 200),
        ("multipart/related; type=application/dicom; boundary=B", 200),
        ('MULTIPART/RELATED; TYPE="APPLICATION/DICOM"; BOUNDARY=B', 200),
        ('multipart/related;type="application/dicom";boundary="B"', 200),
        ('multipart/related; boundary=B; type="application/dicom"; charset=utf-8', 200),
        ('multipart/related; type="application/dicom"; transfer-syntax=1.2; boundary=B',
         200),
        ('multipart/related; type="image/jpeg"; boundary=B', 415),
        ("multipart/mixed; boundary=B", 415),
    ],
)  # fmt: skip
def test_c04_types_as_peers_write_them(web: WebArchive, kind: str, status: int) -> None:
    body = framed(part10(ct_slice(seed=116)), "upper case")

    assert post(web, body, {"Content-Type": kind}).status == status


def test_a_part_of_another_type_fails_alone(web: WebArchive) -> None:
    body, headers = multipart(
        [("Content-Type: text/plain", b"x"), part10(ct_slice(seed=117))]
    )

    answer = post(web, body, headers)

    assert answer.status == 202
    assert len(answer.json()["0008119A"]["Value"]) == 1


@pytest.mark.parametrize(
    "raw", [b"--B\r\nnonsense\r\n\r\nx\r\n--B--", b"--B--", b"", b"no boundary at all"]
)
def test_c03_bodies_that_hold_nothing_are_400(web: WebArchive, raw: bytes) -> None:
    assert post(web, raw, {"Content-Type": MULTIPART}).status == 400


def test_c03_headers_without_end_are_413(web: WebArchive) -> None:
    raw = b"--B\r\nX: " + b"y" * 100_000

    assert post(web, raw, {"Content-Type": MULTIPART}).status == 413


# A01


@pytest.mark.parametrize("kind", ["multipart", "single"])
def test_a01_an_empty_part_alone_is_400(web: WebArchive, kind: str) -> None:
    body, headers = multipart([b""])
    if kind == "single":
        body, headers = b"", {"Content-Type": "application/dicom"}

    assert post(web, body, headers).status == 400


# C05


def test_c05_more_parts_than_allowed_are_413(web: WebArchive) -> None:
    body, headers = multipart([b"x"] * 2001)

    assert post(web, body, headers).status == 413
    alive(web)


def test_c05_many_parts_and_a_large_one_need_little_memory(web: WebArchive) -> None:
    small, headers = multipart(
        [part10(ct_slice(seed=120, number=n)) for n in range(1, 4)]
    )
    large = part10(ct_slice(seed=121, NumberOfFrames=100, PixelData=bytes(200 * MIB)))
    stream = [
        b"--B\r\nContent-Type: application/dicom\r\n\r\n",
        *(large[i : i + MIB] for i in range(0, len(large), MIB)),
        b"\r\n--B--\r\n",
    ]
    post(web, small, headers)
    before = psutil.Process().memory_full_info().uss

    peak = Peak()
    with peak:
        answer = post(web, iter(stream), {"Content-Type": MULTIPART})

    assert answer.status in {200, 202}, answer.text
    assert peak.uss - before < IN_FLIGHT_BYTES + 16 * MIB
    alive(web)


class Peak:
    """Watches the private memory of this process."""

    def __init__(self) -> None:
        self.uss = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.uss = max(self.uss, psutil.Process().memory_full_info().uss)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# C06, C07


def test_c06_instances_of_another_study_fail(web: WebArchive) -> None:
    body, headers = multipart([part10(ct_slice(seed=130)), part10(ct_slice(seed=131))])

    answer = post(web, body, headers, study=uid(131))

    assert answer.status == 202
    (failed,) = answer.json()["00081198"]["Value"]
    assert failed["00081155"]["Value"] == [uid(130, 1, 1)]
    assert failed["00081197"]["Value"] == [0xA901]
    assert held(web, uid(130, 1, 1)) is None
    only, headers = multipart([part10(ct_slice(seed=130))])
    assert post(web, only, headers, study=uid(131)).status == 409


def test_c07_a_partly_valid_request_stores_the_valid_part(web: WebArchive) -> None:
    good = [part10(ct_slice(seed=132, number=n)) for n in (1, 2)]
    cut = part10(ct_slice(seed=132, number=3))[:-100]
    body, headers = multipart([good[0], cut, b"junk" * 100, good[1]])

    answer = post(web, body, headers)

    assert answer.status == 202
    (failed,) = answer.json()["00081198"]["Value"]
    assert failed["00081155"]["Value"] == [uid(132, 1, 3)]
    assert len(answer.json()["0008119A"]["Value"]) == 1
    for number, file in zip((1, 2), good, strict=True):
        assert held(web, uid(132, 1, number)) == dataset_bytes(file)
    assert held(web, uid(132, 1, 3)) is None


# C08


@pytest.mark.parametrize("size", [64, 700])
def test_c08_a_client_that_leaves_leaves_no_half_instance(
    web: WebArchive, size: int
) -> None:
    study = a_study(seed=140 + size, n_instances=5, size=size)
    body, headers = multipart([part10(ds) for ds in study])
    start = head(headers["Content-Type"], f"Content-Length: {len(body)}")

    with send_raw(web, start + body[: len(body) * 99 // 100]):
        pass

    # What had come in whole when the connection went may be there, in whole.
    alive(web)
    for ds in study[:4]:
        assert held(web, ds.SOPInstanceUID) in {None, dataset_bytes(part10(ds))}
    assert held(web, study[4].SOPInstanceUID) is None
    assert post(web, body, headers).status == 200
    for ds in study:
        assert held(web, ds.SOPInstanceUID) == dataset_bytes(part10(ds))
    alive(web)


# C09


def test_c09_two_stores_and_a_delete_of_one_instance(web: WebArchive) -> None:
    file = part10(ct_slice(seed=150))
    body, headers = multipart([file])
    path = f"{web.dicomweb}/studies/{uid(150)}"

    def remove() -> int:
        return request(path, method="DELETE").status

    def store() -> int:
        return post(web, body, headers).status

    with ThreadPoolExecutor(4) as pool:
        for _ in range(25):
            jobs = [pool.submit(one) for one in (store, store, remove, store)]
            seen = [job.result() for job in jobs]
            assert set(seen) <= {200, 204, 404}, seen
            found = request(f"{web.dicomweb}/studies?StudyInstanceUID={uid(150)}")
            if found.status == 204:
                # The deletion came last.
                assert held(web, uid(150, 1, 1)) is None
                continue
            assert found.json()[0]["00201208"]["Value"] == [1]
            assert held(web, uid(150, 1, 1)) == dataset_bytes(file)
            assert remove() == 204
    alive(web)


# C31, C32

# What is there for a path, OPTIONS tells.


@pytest.mark.parametrize("path", ["/studies", f"/studies/{uid(1)}", "/instances"])
@pytest.mark.parametrize("method", ["TRACE", "PUT", "PATCH", "BREW", "CONNECT"])
def test_c31_other_methods_are_refused(web: WebArchive, path: str, method: str) -> None:
    answer = request(web.dicomweb + path, method=method)

    assert answer.status in {400, 405}
    assert b"X-Secret" not in answer.body


def test_c31_a_method_override_is_ignored(web: WebArchive) -> None:
    body, headers = multipart([part10(ct_slice(seed=160))])
    post(web, body, headers)

    answer = request(
        f"{web.dicomweb}/studies/{uid(160)}",
        headers={"X-HTTP-Method-Override": "DELETE", "X-Method-Override": "DELETE"},
    )

    assert answer.status == 200
    assert held(web, uid(160, 1, 1)) is not None


@pytest.mark.parametrize(
    "name", ['a"b', "a%0d%0aSet-Cookie:x", "%E5%BD%B1", "a;b", "a%5Cb", "../x"]
)
def test_c32_no_name_gets_into_a_header(web: WebArchive, name: str) -> None:
    answer = request(f"{web.url}/api/v1/instances/{name.replace(' ', '')}/file")

    assert answer.status in {400, 404}
    assert "set-cookie" not in answer.headers


def test_the_answers_of_errors_are_problems(web: WebArchive) -> None:
    for path in ("/nowhere", "/studies/1/series/2/instances/3", "/studies/%20"):
        answer = request(web.dicomweb + path)

        assert answer.status in {400, 404}
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(answer.json()) == {"type", "title", "status", "code", "detail"}


def test_what_is_too_long_to_be_held_is_read_in_pieces(web: WebArchive) -> None:
    ds = ct_slice(seed=170, size=1600)
    body, headers = multipart([part10(ds)])
    assert post(web, io.BytesIO(body), headers).status == 200

    answer = request(f"{web.dicomweb}/studies/{uid(170)}")

    assert int(answer.headers["content-length"]) == len(answer.body) > 4 * MIB
    assert dataset_bytes(part10(ds)) in answer.body
