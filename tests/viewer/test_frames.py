"""Frames of a whole series in one stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless

from pacs.services import volumes_stream
from tests.support import corpus
from tests.support.archive import ADMIN
from tests.support.datasets import a_study, ct_slice, uid
from tests.support.viewing import Viewing, viewing_archive
from tests.support.volumes import Phantom
from tests.support.wado import compressed
from viewer.framing import END, FAILED, HEAD, MAGIC, RECORD, REDUCED

SERIES = f"/series/{uid(1, 1)}/frames.bin"


@dataclass
class Record:
    position: int
    instance: int
    frame: int
    syntax: int
    flags: int
    rows: int
    columns: int
    body: bytes


@dataclass
class Stream:
    head: dict[str, Any]
    records: list[Record]
    ended: bool


def parse(body: bytes) -> Stream:
    """Read a stream as its description in `viewer.framing` says."""
    magic, version, zero, length = HEAD.unpack_from(body)
    assert (magic, version, zero) == (MAGIC, 1, 0)
    at = HEAD.size + length
    stream = Stream(json.loads(body[HEAD.size : at]), [], ended=False)
    while at < len(body):
        place, instance, frame, syntax, flags, rows, columns, length = (
            RECORD.unpack_from(body, at)
        )
        at += RECORD.size
        data = body[at : at + length]
        record = Record(place, instance, frame, syntax, flags, rows, columns, data)
        at += length
        if record.flags & END:
            stream.ended = True
            assert at == len(body)
            break
        stream.records.append(record)
    return stream


def test_the_centre_comes_first_and_then_its_neighbours(phantom: Viewing) -> None:
    answer = phantom.get(SERIES)

    stream = parse(answer.body)
    voxels = Phantom().voxels().astype(np.int32) + 1024
    planes = [np.frombuffer(one.body, "<u2").reshape(32, 40) for one in stream.records]
    order = [10, 9, 11, 8, 12, 7, 13, 6, 14, 5, 15, 4, 16, 3, 17, 2, 18, 1, 19, 0]
    assert stream.ended
    assert stream.head["frames"] == 20
    assert stream.head["order"] == "middle-out"
    assert [one.position for one in stream.records] == list(range(20))
    for plane, k in zip(planes, order, strict=True):
        assert (plane == voxels[k]).all()


def test_ascending_goes_along_the_normal(phantom: Viewing) -> None:
    stream = parse(phantom.get(f"{SERIES}?order=ascending").body)

    heights = {
        ds.SOPInstanceUID: float(ds.ImagePositionPatient[2])
        for ds in Phantom().datasets(series=1)
    }
    found = [heights[stream.head["instances"][one.instance]] for one in stream.records]
    assert found == sorted(heights.values())


def test_the_length_is_announced_and_right(phantom: Viewing) -> None:
    answer = phantom.get(SERIES)

    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.headers["content-type"] == "application/vnd.huying.frames"


def test_a_stream_goes_on_where_it_was_cut_off(phantom: Viewing) -> None:
    whole = parse(phantom.get(SERIES).body)

    rest = parse(phantom.get(f"{SERIES}?from=13").body)
    none = parse(phantom.get(f"{SERIES}?from=20").body)

    assert rest.records == whole.records[13:]
    assert none.records == []
    assert none.ended
    assert phantom.get(f"{SERIES}?from=21").status == 400


def test_for_good_only_by_its_version(viewing: Viewing) -> None:
    viewing.archive.store_all(a_study())
    first = viewing.get(SERIES)
    version = first.headers["x-frames-version"]

    named = viewing.get(f"{SERIES}?v={version}")
    again = viewing.get(SERIES, if_none_match=first.headers["etag"])
    viewing.archive.store_all([ct_slice(number=9)])
    grown = viewing.get(f"{SERIES}?v={version}")

    assert first.headers["cache-control"] == "private, no-cache"
    assert named.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert again.status == 304
    assert grown.headers["cache-control"] == "private, no-cache"
    assert len(parse(grown.body).records) == 4


@pytest.mark.parametrize("level", [1, 2, 5])
def test_a_level_is_the_mean_of_its_pixels(phantom: Viewing, level: int) -> None:
    answer = phantom.get(f"{SERIES}?level={level}&form=raw&order=ascending")

    stream = parse(answer.body)
    step = 2**level
    voxels = Phantom().voxels().astype(np.float64) + 1024
    first = stream.records[10]
    rows, columns = -(-32 // step), -(-40 // step)
    assert (first.rows, first.columns) == (rows, columns)
    assert first.flags == REDUCED
    assert int(answer.headers["content-length"]) == len(answer.body)
    shown = np.frombuffer(first.body, "<u2").reshape(rows, columns)
    for row in range(rows):
        for column in range(columns):
            block = voxels[
                10,
                row * step : (row + 1) * step,
                column * step : (column + 1) * step,
            ]
            assert shown[row, column] == pytest.approx(block.mean(), abs=0.51)


@pytest.mark.parametrize(
    "query",
    [
        "order=sideways",
        "from=-1",
        "from=x",
        "from=99999999999",
        "level=6",
        "level=-1",
        "level=1&form=stored",
        "form=jpeg",
        "v=" + "a" * 65,
    ],
)
def test_bad_parameters_are_refused(phantom: Viewing, query: str) -> None:
    assert phantom.get(f"{SERIES}?{query}").status == 400


def test_another_tenant_s_series_is_not_there(phantom: Viewing) -> None:
    assert phantom.get(SERIES, x_tenant="elsewhere").status == 404
    assert phantom.get(f"/series/{uid(9, 9)}/frames.bin").status == 404


def test_series_without_frames_are_not_there(viewing: Viewing) -> None:
    ds = ct_slice(PixelData=None, Rows=None, Columns=None)
    viewing.archive.store_all([ds])

    assert viewing.get(SERIES).status == 404


def test_a_frame_that_is_too_short_is_flagged_and_the_others_come(
    viewing: Viewing,
) -> None:
    """It shows beforehand: its reason comes instead of zeros."""
    good, bad = ct_slice(number=1), ct_slice(number=2)
    bad.PixelData = bad.PixelData[:1000]
    viewing.archive.store_all([good, bad, ct_slice(number=3)])

    stream = parse(viewing.get(f"{SERIES}?order=ascending").body)

    assert [one.flags for one in stream.records] == [0, FAILED, 0]
    assert stream.records[0].body == good.PixelData
    assert stream.records[1].body.startswith(b"not_found")
    assert stream.ended


def in_jpegls(ds: Dataset, cut: int | None = None, **values: Any) -> bytes:
    """Return a slice in JPEG-LS as a file, cut off after so many bytes."""
    pixels = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns)
    encoded = bytes(imagecodecs.jpegls_encode(pixels))[:cut]
    for name, value in values.items():
        setattr(ds, name, value)
    return compressed(ds, [encoded], JPEGLSLossless)


def test_a_damaged_frame_keeps_its_announced_length(viewing: Viewing) -> None:
    """What follows stays where it belongs: zeros are in its place."""
    good = ct_slice(number=1)
    for number, cut in ((1, None), (2, 60), (3, None)):
        viewing.archive.store(in_jpegls(ct_slice(number=number), cut))

    answer = viewing.get(f"{SERIES}?order=ascending&form=raw")

    stream = parse(answer.body)
    assert [one.flags for one in stream.records] == [0, FAILED, 0]
    assert stream.records[1].body == bytes(len(good.PixelData))
    assert int(answer.headers["content-length"]) == len(answer.body)


@pytest.mark.parametrize("frames", [1, 100_000])
@pytest.mark.parametrize("side", [4096, 60_000])
def test_what_a_code_stream_is_not_is_told_in_a_few_bytes(
    viewing: Viewing, frames: int, side: int
) -> None:
    """60,000 x 60,000 is beyond all decoding; the header says neither is there."""
    viewing.archive.store(
        in_jpegls(ct_slice(), Rows=side, Columns=side, NumberOfFrames=frames)
    )

    answer = viewing.get(f"{SERIES}?form=raw")

    stream = parse(answer.body)
    assert [one.flags for one in stream.records] == [FAILED]
    assert len(answer.body) < 2000
    assert stream.ended


def test_native_claims_are_told_in_a_few_bytes(viewing: Viewing) -> None:
    viewing.archive.store_all(
        [
            ct_slice(
                Rows=60_000, Columns=60_000, NumberOfFrames=100_000, BitsAllocated=1,
                BitsStored=1, HighBit=0,
            ),
            ct_slice(number=2, Rows=60_000, Columns=60_000),
        ]
    )  # fmt: skip

    answer = viewing.get(SERIES)

    assert parse(answer.body).ended
    assert len(answer.body) < 2000


def black(number: int, side: int) -> bytes:
    """Return a black image that is next to nothing in JPEG-LS."""
    pixels = np.zeros((side, side), "<u2")
    ds = ct_slice(number=number, Rows=side, Columns=side, PixelData=pixels.tobytes())
    return in_jpegls(ds)


def test_what_is_out_of_proportion_to_what_is_stored_is_refused(
    viewing: Viewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes_stream, "PLAIN", 1 << 20)
    viewing.archive.store(black(1, 4096))

    refused = viewing.get(f"{SERIES}?form=raw")
    stored = viewing.get(SERIES)

    assert refused.status == 413
    assert "stream_ratio" in refused.json()["detail"]
    assert parse(stored.body).records[0].flags == 0


def test_black_images_are_no_attack(viewing: Viewing) -> None:
    viewing.archive.store(black(1, 4096))

    stream = parse(viewing.get(f"{SERIES}?form=raw").body)

    assert stream.records[0].body == bytes(2 * 4096 * 4096)


def test_a_stream_has_a_limit_in_bytes(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = {"limits": {"stream_bytes": 1 << 20}}
    with viewing_archive(tmp_path_factory.mktemp("short"), **settings) as made:
        made.archive.store(black(1, 1024))

        refused = made.get(f"{SERIES}?form=raw")

    assert refused.status == 413
    assert "stream_bytes" in refused.json()["detail"]


def test_frames_of_the_chest_ct_come_as_stored_or_decoded(chest: Viewing) -> None:
    from tests.viewer.test_manifest import CHEST

    series = next(
        one["series"]
        for one in chest.json(f"/manifest/{CHEST}")["series"]
        if one["kind"] == "image"
    )
    path = f"/series/{series}/frames.bin"

    stored = parse(chest.get(path).body)
    raw_answer = chest.get(
        path, accept='application/octet-stream; transfer-syntax="1.2.840.10008.1.2.1"'
    )
    raw = parse(raw_answer.body)

    assert stored.head["syntaxes"] == ["1.2.840.10008.1.2.4.80"]
    assert raw.head["syntaxes"] == ["1.2.840.10008.1.2.1"]
    assert raw_answer.headers["content-length"] == str(len(raw_answer.body))
    assert len(stored.records) == len(raw.records) == 64
    for packed, plain in zip(stored.records[:3], raw.records[:3], strict=True):
        decoded = imagecodecs.jpegls_decode(packed.body)
        assert decoded.tobytes() == plain.body


@pytest.mark.parametrize("how", ["form", "accept"])
def test_frames_in_htj2k_without_loss(phantom: Viewing, how: str) -> None:
    if how == "form":
        answer = phantom.get(f"{SERIES}?form=htj2k")
    else:
        answer = phantom.get(
            SERIES, accept="image/jphc; transfer-syntax=1.2.840.10008.1.2.4.202"
        )

    stream = parse(answer.body)
    raw = parse(phantom.get(f"{SERIES}?form=raw").body)
    assert stream.head["syntaxes"] == ["1.2.840.10008.1.2.4.202"]
    assert stream.ended
    for packed, plain in zip(stream.records, raw.records, strict=True):
        decoded = imagecodecs.htj2k_decode(packed.body).astype("<u2")
        assert decoded.tobytes() == plain.body
        assert packed.flags == 0


@corpus.needs_corpus
def test_frames_of_multi_frame_objects_in_colour_and_palette(viewing: Viewing) -> None:
    """Two ultrasound loops: palette in RLE, YBR in JPEG; decoded and at half size."""
    for name, frames, samples in (
        ("OBXXXX1A_rle_2frame", 2, 1),
        ("1.2.840.113543.6.6.1.1.2.2415947926921624359.201235357587280", 10, 3),
    ):
        file = (corpus.CORPUS / "objects" / f"{name}.dcm").read_bytes()
        found = viewing.archive.node.retrieve.find_instance(
            ADMIN, viewing.archive.store(file)
        )
        path = f"/series/{found.series_instance_uid}/frames.bin?order=ascending"

        stored = parse(viewing.get(path).body)
        raw = parse(viewing.get(f"{path}&form=raw").body)
        half = parse(viewing.get(f"{path}&form=raw&level=1").body)
        packed = parse(viewing.get(f"{path}&form=htj2k").body)

        # Stored with loss, it stays so; of palette colour the indices are packed.
        assert packed.head["syntaxes"] == [
            found.transfer_syntax_uid if samples == 3 else "1.2.840.10008.1.2.4.202"
        ]
        assert {one.flags for one in packed.records} == {0}
        rows, columns = found.rows or 0, found.columns or 0
        assert [one.frame for one in stored.records] == list(range(1, frames + 1))
        assert stored.head["syntaxes"] == [found.transfer_syntax_uid]
        assert {len(one.body) for one in raw.records} == {rows * columns * samples}
        for whole, small in zip(raw.records, half.records, strict=True):
            assert (small.rows, small.columns) == (-(-rows // 2), -(-columns // 2))
            pixels = np.frombuffer(whole.body, np.uint8).reshape(rows, columns, -1)
            shown = np.frombuffer(small.body, np.uint8)
            shown = shown.reshape(small.rows, small.columns, samples)
            if samples == 1:
                # The mean of two entries of a palette is a colour of neither.
                assert (shown == pixels[::2, ::2]).all()
            else:
                block = pixels[:2, :2].astype(float).mean(axis=(0, 1))
                assert np.abs(shown[0, 0] - block).max() <= 0.51


def test_a_client_that_leaves_costs_nothing_more(phantom: Viewing) -> None:
    """Frames are read one by one as they are sent: the rest is never read."""
    found = phantom.views.frames.frames(
        ADMIN, uid(1, 1), form="stored", order="middle-out", level=0
    )
    read: list[int] = []

    class Counting:
        def frames(self, *_a: Any, **_k: Any) -> Any:
            raise AssertionError

        def read(self, frames: Any, position: int) -> Any:
            read.append(position)
            return phantom.views.frames.read(frames, position)

    from viewer import framing

    pieces = framing.stream(Counting(), found, bytes(framing.GATHER), 0)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]

    assert len(read) <= 1
