"""Properties of everything that reads bytes: any bytes, and valid objects mutated."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from pacs.imaging.charset import decoder, encode
from pacs.imaging.codecs import DecoderPool
from pacs.imaging.dataset import inflate, scan
from pacs.imaging.dicomjson import instance_json, value_at
from pacs.imaging.encoding import encoding_of, walk_dataset
from pacs.imaging.frames import frame_ranges
from pacs.imaging.part10 import file_meta, read_file_meta
from pacs.imaging.syntaxes import get
from pacs.imaging.transcode import to_syntax
from storage.kernel.errors import ImagingError, NotFound
from storage.kernel.limits import MIB, Limits
from tests.fault.objects import (
    BIG,
    EXPLICIT,
    FRAMES,
    IMPLICIT,
    JPEG_LS,
    Objects,
    element,
    item,
    nested,
)
from tests.support.corpus import files, needs_corpus

LIMITS = Limits(
    elements=2000, sequence_depth=16, inflated_bytes=4 * MIB, inflation_ratio=10
)
SYNTAXES = [EXPLICIT, IMPLICIT, BIG, JPEG_LS]
O = Objects(12)  # noqa: E741
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(LIMITS)
    yield made
    made.close()


# Data sets ------------------------------------------------------------------------

TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\\^=\0\x1b\r\n\f\t", categories=(
        "L", "N", "P", "S")), max_size=20,
)  # fmt: skip
NAME = st.lists(TEXT, min_size=1, max_size=3).map("=".join)


@st.composite
def datasets(draw: Any, depth: int = 0) -> Dataset:
    """Draw data sets of every kind of VR, nested."""
    ds = Dataset()
    if depth == 0:
        ds.SpecificCharacterSet = "ISO_IR 192"
    choices: dict[str, st.SearchStrategy[Any]] = {
        "PatientName": NAME,
        "PatientID": TEXT,
        "StudyDescription": TEXT,
        "PatientComments": TEXT,
        "InstanceNumber": st.integers(-(2**31), 2**31 - 1),
        "Rows": st.integers(0, 65_535),
        "SmallestImagePixelValue": st.integers(0, 65_535),
        "ReferencePixelX0": st.integers(-(2**31), 2**31 - 1),
        "RealWorldValueSlope": st.floats(allow_nan=False),
        "FrameIncrementPointer": st.just(0x00181063),
        "SOPInstanceUID": st.from_regex(
            r"1\.2(\.[1-9][0-9]{0,5}){1,5}", fullmatch=True
        ),
        "EncapsulatedDocument": st.binary(max_size=64).map(
            lambda b: b + b"\0" * (len(b) % 2)
        ),
    }
    for keyword in draw(st.sets(st.sampled_from(sorted(choices)))):
        setattr(ds, keyword, draw(choices[keyword]))
    if depth < 3 and draw(st.booleans()):
        ds.ReferencedImageSequence = draw(st.lists(datasets(depth + 1), max_size=3))
    return ds


def encoded(ds: Dataset, syntax: str) -> bytes:
    out = DicomBytesIO()
    out.is_little_endian = syntax != BIG
    out.is_implicit_VR = syntax == IMPLICIT
    write_dataset(out, ds)
    return out.getvalue()


@QUICK
@given(datasets(), st.sampled_from([EXPLICIT, IMPLICIT, BIG]),
       st.sampled_from([EXPLICIT, IMPLICIT]))  # fmt: skip
def test_rewriting_keeps_every_value(
    pool: DecoderPool, ds: Dataset, stored: str, target: str
) -> None:
    body = encoded(ds, stored)
    if not body:
        return
    made = to_syntax(body, stored, target, pool, Limits())
    head = file_meta("1.2.3", "1.2.3", target)
    read = pydicom.dcmread(io.BytesIO(head + made))
    assert read == pydicom.dcmread(
        io.BytesIO(file_meta("1.2.3", "1.2.3", stored) + body)
    )


@QUICK
@given(datasets())
def test_json_does_not_depend_on_the_encoding(ds: Dataset) -> None:
    explicit = encoded(ds, EXPLICIT)
    big = encoded(ds, BIG)
    made = [
        json.loads(instance_json(body, 0, len(body), syntax, bulkdata_prefix=""))
        for body, syntax in ((explicit, EXPLICIT), (big, BIG))
    ]
    assert made[0] == made[1]


@QUICK
@given(datasets())
def test_json_is_read_back_with_the_same_values(ds: Dataset) -> None:
    body = encoded(ds, EXPLICIT)
    raw = instance_json(body, 0, len(body), EXPLICIT, bulkdata_prefix="")
    read = Dataset.from_json(json.loads(raw), lambda *_: b"")
    original = pydicom.dcmread(io.BytesIO(file_meta("1.2.3", "1.2.3", EXPLICIT) + body))
    for keyword in ("Rows", "InstanceNumber", "SOPInstanceUID", "RealWorldValueSlope"):
        assert read.get(keyword) == original.get(keyword)
    assert str(read.get("PatientName", "")).rstrip("= ") == str(
        original.get("PatientName", "")
    ).rstrip("= ")


# Hostile bytes --------------------------------------------------------------------


@st.composite
def mutated(draw: Any) -> tuple[bytes, str]:
    """Draw a valid object and flip, cut, splice, repeat or lie about its length."""
    syntax = draw(st.sampled_from(SYNTAXES))
    body = bytearray(_valid(syntax))
    for _ in range(draw(st.integers(1, 4))):
        if not body:
            break
        kind = draw(st.sampled_from(["flip", "cut", "splice", "repeat", "lie", "add"]))
        at = draw(st.integers(0, len(body) - 1))
        if kind == "flip":
            body[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del body[at : at + draw(st.integers(1, 64))]
        elif kind == "splice":
            other = draw(st.integers(0, len(body) - 1))
            body[at:at] = body[other : other + draw(st.integers(1, 200))]
        elif kind == "repeat":
            body[at:at] = body[at : at + 8] * draw(st.integers(1, 50))
        elif kind == "lie":
            lie = draw(st.sampled_from([0, 1, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1]))
            body[at : at + 4] = struct.pack("<I", lie)
        else:
            body[at:at] = draw(st.binary(max_size=32))
    return bytes(body), syntax


def _valid(syntax: str) -> bytes:
    if syntax == IMPLICIT:
        return O.implicit_dataset()
    if syntax == BIG:
        return b"".join(
            struct.pack(">HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(v)) + v
            for tag, (vr, v) in sorted(O.base.items())
            if vr != "OW"
        )
    inner = element(0x00100010, "PN", b"\xce\xb0^x")
    values = {0x00080005: ("CS", b"GB18030 "),
              0x00081140: ("SQ", item(inner) + item(nested(4)[:0])),
              0x00280030: ("DS", b"0.5\\0.5 "), FRAMES: ("IS", b"2 ")}  # fmt: skip
    if syntax == EXPLICIT:
        return O.dataset(values, tail=element(0x7FE10010, "LO", b"MINE"))
    frame = imagecodecs.jpegls_encode(np.arange(24, dtype=np.uint16).reshape(4, 6))
    return O.encapsulated([frame, frame], values, table=bytes(8))


def _read_all(body: bytes, syntax: str) -> None:
    """Run every reader; each gives an answer or one of our errors."""
    encoding = encoding_of(get(syntax))
    found = None
    with suppress(ImagingError):
        found = scan(body, 0, len(body), syntax, LIMITS)
    try:
        for event in walk_dataset(body, 0, len(body), encoding, LIMITS):
            assert event[3] <= event[4] <= len(body)
        walked = True
    except ImagingError:
        walked = False
    # The scanner and the walker agree about what is a data set.
    assert walked or found is None
    try:
        raw = instance_json(
            body, 0, len(body), syntax, bulkdata_prefix="", limits=LIMITS
        )
        json.loads(raw, parse_constant=_no_constant)
    except ImagingError:
        assert not walked
    for path in ("7FE00010", "00081140/1/00100010"):
        try:
            vr, value = value_at(body, 0, len(body), syntax, path, limits=LIMITS)
            assert vr.isalpha()
            assert len(value) <= len(body)
        except (NotFound, ImagingError):
            pass
    if found is not None and found.pixel is not None:
        try:
            table = frame_ranges(found, 2)
            for number in range(1, len(table) + 1):
                for offset, length in table.ranges(number):
                    assert 0 <= offset <= offset + length <= len(body)
        except ImagingError:
            pass


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@settings(QUICK, max_examples=600)
@given(mutated())
def test_mutated_objects_are_read_or_refused(case: tuple[bytes, str]) -> None:
    _read_all(*case)


#: One object of each SOP class and syntax of the corpus, small ones.
CORPUS = [
    path
    for folder in ("objects", "charsets", "syntaxes", "broken")
    for path in files(folder)
    if path.stat().st_size < 60_000
]


@needs_corpus
@pytest.mark.parametrize("path", CORPUS, ids=lambda p: "/".join(p.parts[-2:]))
def test_mutated_objects_of_the_corpus(path: Path) -> None:
    data = path.read_bytes()
    try:
        meta = read_file_meta(data, accept_without_preamble=True)
        assert meta is not None
        syntax = get(meta.transfer_syntax_uid)
    except ImagingError:
        return
    body = data[meta.dataset_offset :]
    if syntax.deflated or not body:
        return
    made = np.random.default_rng(len(data))
    for _ in range(15):
        broken = bytearray(body)
        for _ in range(int(made.integers(1, 6))):
            at = int(made.integers(0, len(broken)))
            kind = int(made.integers(0, 4))
            if kind == 0:
                broken[at] ^= int(made.integers(1, 256))
            elif kind == 1:
                del broken[at + 1 : at + int(made.integers(1, 100))]
            elif kind == 2:
                broken[at:at] = broken[: int(made.integers(1, 100))]
            else:
                broken[at : at + 4] = struct.pack("<I", int(made.integers(0, 2**32)))
        _read_all(bytes(broken), syntax.uid)


@settings(QUICK, max_examples=300)
@given(st.binary(max_size=400), st.sampled_from(SYNTAXES))
def test_any_bytes_are_read_or_refused(body: bytes, syntax: str) -> None:
    _read_all(body, syntax)


@settings(QUICK, max_examples=200)
@given(mutated(), st.sampled_from([EXPLICIT, IMPLICIT]))
def test_mutated_objects_are_rewritten_or_refused(
    pool: DecoderPool, case: tuple[bytes, str], target: str
) -> None:
    body, syntax = case
    try:
        made = to_syntax(body, syntax, target, pool, LIMITS)
    except ImagingError:
        return
    again = scan(made, 0, len(made), target, Limits()) if made else None
    assert again is None or again.end == len(made)


@QUICK
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_as_a_file(data: bytes, bare: bool) -> None:  # noqa: FBT001
    for prefix in (b"", bytes(128) + b"DICM"):
        try:
            made = read_file_meta(prefix + data, accept_without_preamble=bare)
        except ImagingError:
            continue
        assert made is not None
        assert 0 <= made.dataset_offset <= len(prefix + data)


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes_as_a_deflated_data_set(data: bytes) -> None:
    try:
        made = inflate(data, LIMITS)
    except ImagingError:
        return
    assert len(made) <= LIMITS.inflated_bytes


# Character sets -------------------------------------------------------------------


@QUICK
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30),
    st.sampled_from(["ISO_IR 192", "GB18030"]),
)
def test_text_goes_both_ways(text: str, term: str) -> None:
    raw = encode(text, term)
    if raw is None or b"\x1b" in raw:
        return
    assert decoder(term.encode()).decode(raw) == text


@QUICK
@given(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"GB18030", b"ISO_IR 192", b"ISO_IR 13", b"\\ISO 2022 IR 58",
         b"\\ISO 2022 IR 87\\ISO 2022 IR 159", b"\\ISO 2022 IR 149", b"NONSENSE"]
    ),
    st.sampled_from(["PN", "LO", "UT", "CS"]),
)  # fmt: skip
def test_any_bytes_become_text(raw: bytes, term: bytes, vr: str) -> None:
    text = decoder(term).decode(raw, vr)
    assert text.encode("utf-8", "surrogatepass").decode() == text
