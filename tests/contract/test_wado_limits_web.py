"""WADO-RS of what claims too much, and of clients that do not wait for it."""

from __future__ import annotations

import io
import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless

from pacs.imaging.codecs import DecoderPool
from pacs.imaging.pool import Answer, Job
from pacs.services.sources import Spool
from pacs.web.leaving import WATCH_AFTER_SECONDS
from storage.kernel.errors import Unavailable
from storage.kernel.limits import MIB, Limits
from storage.kernel.types import DEFAULT_TENANT, Actor
from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import WebArchive, web_archive
from tests.support.wado import compressed, get, keep
from tests.support.waiting import wait_until

HTJ2K = "1.2.840.10008.1.2.4.202"
OCTETS = "application/octet-stream"
SYNTAX = "transfer-syntax=1.2.840.10008.1.2.1"
RAW = f"{OCTETS}; {SYNTAX}"
IMAGE = f"/studies/{uid(1)}/series/{uid(1, 1)}/instances/{uid(1, 1, 1)}"
FRAMES = 20_000


def tiny(frames: int) -> bytes:
    """Return a file of many frames of 1 x 2 pixels."""
    samples = np.arange(2 * frames, dtype="<u2") % 4096
    return part10(
        ct_slice(
            Rows=1,
            Columns=2,
            NumberOfFrames=frames,
            PixelRepresentation=0,
            PixelData=samples.tobytes(),
        )
    )


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebArchive]:
    limits = Limits(conversion_frames=FRAMES, conversion_memory=MIB)
    with web_archive(tmp_path, limits=limits) as served:
        yield served


class Jobs:
    """Counts the jobs of all pools."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        asked = DecoderPool.ask

        def ask(pool: DecoderPool, job: Any) -> Answer:
            answer = asked(pool, job)
            self.done += 1
            return answer

        monkeypatch.setattr(DecoderPool, "ask", ask)


@pytest.mark.parametrize("multipart", [False, True])
def test_a_conversion_stops_when_its_client_has_left(
    web: WebArchive, monkeypatch: pytest.MonkeyPatch, *, multipart: bool
) -> None:
    keep(web, tiny(FRAMES))
    jobs = Jobs(monkeypatch)
    address = urlsplit(web.url)
    kind = f"application/dicom; transfer-syntax={HTJ2K}"
    if multipart:
        kind = f'multipart/related; type="application/dicom"; transfer-syntax={HTJ2K}'

    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(
            f"GET /dicom-web{IMAGE} HTTP/1.1\r\nHost: x\r\n"
            f"Accept: {kind}\r\n\r\n".encode()
        )
        wait_until(lambda: jobs.done > 1, "the conversion to begin")
    wait_until(lambda: _is_idle(web), "the decoders to be free")

    # Everything would have been this many.
    assert jobs.done < FRAMES // 256
    assert web.archive.decoders.run(Job("pacs.imaging.worker:each", {
        "handler": "pacs.imaging.decoder:decode_frame", "each": [],
    })).head == {"lengths": []}  # fmt: skip


def _is_idle(web: WebArchive) -> bool:
    """Tell whether no conversion has asked for a job for a while."""
    decoders = web.archive.decoders
    for _ in range(10):
        if not decoders.pids() or decoders.waiting():
            return False
        time.sleep(WATCH_AFTER_SECONDS / 5)
    return True


def test_an_object_of_more_frames_than_allowed_is_not_converted(
    web: WebArchive,
) -> None:
    keep(web, tiny(FRAMES + 1))

    answer = get(web, IMAGE, f"application/dicom; transfer-syntax={HTJ2K}")

    assert answer.status == 413
    assert "conversion_frames" in answer.json()["detail"]


def test_a_long_conversion_is_not_held_in_memory(web: WebArchive) -> None:
    pixels = np.random.default_rng(1).integers(0, 4096, (16, 512, 512), np.uint16)
    ds = ct_slice(Rows=512, Columns=512, NumberOfFrames=16, PixelData=pixels.tobytes())
    encoded = [bytes(imagecodecs.jpegls_encode(one)) for one in pixels]
    keep(web, compressed(ds, encoded, JPEGLSLossless))
    (stored,) = web.archive.retrieve.instances(_anyone(), uid(1), uid(1, 1))

    tracemalloc.start()
    source = web.archive.retrieve.open_object(stored, "1.2.840.10008.1.2.1")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert source.length > pixels.nbytes
    assert held < pixels.nbytes // 2
    body = b"".join(source.chunks())
    assert len(body) == source.length
    assert pydicom.dcmread(io.BytesIO(body)).PixelData == pixels.tobytes()
    assert source.read(source.length - 10, 10) == body[-10:]


def _anyone() -> Actor:
    return Actor(DEFAULT_TENANT, "test")


def test_what_finds_no_room_on_disk_is_told() -> None:
    def write(_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(Unavailable, match="No space left"):
        Spool(10).fill(write)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize(("side", "status"), [(60_000, 413), (4096, 422)])
def test_bombs_are_refused_before_their_length_is_told(
    web: WebArchive, side: int, status: int, *, single: bool
) -> None:
    small = ct_slice()
    pixels = np.frombuffer(small.PixelData, "<u2").reshape(small.Rows, small.Columns)
    ds = ct_slice(Rows=side, Columns=side)
    keep(
        web, compressed(ds, [bytes(imagecodecs.jpegls_encode(pixels))], JPEGLSLossless)
    )
    kind = RAW if single else f'multipart/related; type="{OCTETS}"; {SYNTAX}'

    answer = get(web, f"{IMAGE}/frames/1", kind)

    assert answer.status == status, answer.text[:200]
    assert answer.headers["content-type"] == "application/problem+json"
