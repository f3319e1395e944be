"""The scanner: what it finds, what it tolerates, what it refuses, at what cost."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import pydicom
import pytest

from pacs.imaging.charset import decoder
from pacs.imaging.dataset import (
    INDEX_TAGS,
    REQUEST_ATTRIBUTES,
    inflate,
    iter_items,
    request_attributes,
    scan,
)
from pacs.imaging.encoding import (
    EXPLICIT_LITTLE,
    FRAGMENTS,
    ITEM_START,
    SEQUENCE,
    walk_dataset,
)
from pacs.imaging.part10 import read_file_meta
from storage.kernel.errors import MalformedObject, TooLarge
from storage.kernel.limits import MIB, Limits
from tests.fault.objects import (
    BIG,
    EXPLICIT,
    IMPLICIT,
    JPEG_LS,
    PATIENT_ID,
    PIXEL_DATA,
    SEQUENCE_END,
    UNDEFINED,
    Objects,
    deflated,
    element,
    implicit,
    item,
    us,
)
from tests.support.corpus import files, needs_corpus

O = Objects(7)  # noqa: E741
LIMITS = Limits()
DEFLATED = "1.2.840.10008.1.2.1.99"


def found(body: bytes, syntax: str = EXPLICIT, limits: Limits = LIMITS) -> Any:
    return scan(body, 0, len(body), syntax, limits)


def test_values_and_places_of_a_plain_data_set() -> None:
    body = O.dataset()
    made = found(body)
    assert made.values[PATIENT_ID] == O.patient_id.encode()
    assert made.unsigned(0x00280010) == 4
    assert made.text(0x00280004) == "MONOCHROME2"
    assert body[made.pixel.value_offset :] == bytes(range(48))
    assert made.header_end == len(body) - 48 - 12
    assert made.n_elements == len(O.base)
    assert (made.end, made.warnings) == (len(body), [])


def test_offsets_count_within_the_buffer() -> None:
    body = O.dataset()
    moved = scan(b"x" * 100 + body + b"y" * 9, 100, 100 + len(body), EXPLICIT, LIMITS)
    assert moved.header_end == 100 + len(body) - 60


@needs_corpus
@pytest.mark.parametrize("path", files(), ids=lambda p: "/".join(p.parts[-2:]))
def test_values_are_those_that_pydicom_reads(path: Path) -> None:
    data = path.read_bytes()
    meta = read_file_meta(data, accept_without_preamble=True)
    assert meta is not None
    body: Any = memoryview(data)[meta.dataset_offset :]
    if meta.transfer_syntax_uid == DEFLATED:
        body = inflate(body, LIMITS)
    made = found(body, meta.transfer_syntax_uid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pydicom.dcmread(path, force=True)
    present = {int(tag) for tag in theirs.keys()}  # noqa: SIM118  iterating decodes
    assert set(made.values) == present & set(INDEX_TAGS)
    for tag, raw in made.values.items():
        element = theirs.get_item(tag)
        if isinstance(element.value, bytes) and element.is_raw:
            assert raw == element.value
    has_pixels = bool(present & {0x7FE00008, 0x7FE00009, PIXEL_DATA})
    assert (made.pixel is not None) == has_pixels


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
def test_every_cut_is_noticed_or_ends_between_elements(syntax: str) -> None:
    body = _in(syntax)
    whole = found(body, syntax)
    for end in range(len(body)):
        try:
            made = found(body[:end], syntax)
        except MalformedObject:
            continue
        assert made.n_elements < whole.n_elements


def _in(syntax: str) -> bytes:
    if syntax == IMPLICIT:
        return O.implicit_dataset({0x00081140: ("SQ", item(implicit(0x00080060)))})
    if syntax == EXPLICIT:
        nested = item(element(0x00080060, "CS", b"CT"))
        return O.dataset({0x00081140: ("SQ", nested)})
    return b"".join(
        struct.pack(">HH2sH", tag >> 16, tag & 0xFFFF, vr.encode(), len(value)) + value
        for tag, (vr, value) in sorted(O.base.items())
        if vr != "OW"
    )


def test_encapsulated_fragments_are_listed() -> None:
    body = O.encapsulated([b"ab", b"", b"cdef"], table=bytes(4))
    pixel = found(body, JPEG_LS).pixel
    assert pixel.encapsulated
    places = list(zip(pixel.fragments[::2], pixel.fragments[1::2], strict=True))
    assert [body[at : at + n] for at, n in places] == [b"ab", b"", b"cdef"]
    assert pixel.offset_table[1] == 4
    assert body[pixel.value_offset + pixel.length :] == b""


def test_nested_values_are_not_those_of_the_object() -> None:
    nested = item(element(PATIENT_ID, "LO", b"NOT HERE"))
    body = O.dataset({0x00081140: ("SQ", nested)})
    assert found(body).values[PATIENT_ID] == O.patient_id.encode()


@pytest.mark.parametrize("undefined", [True, False])
def test_request_attributes_are_read(undefined: bool) -> None:  # noqa: FBT001
    step = element(0x00400009, "SH", b"SPS1") + element(0x00401001, "SH", b"RP1 ")
    other = element(0x00400009, "SH", b"SPS2")
    inner = item(element(0x00400009, "SH", b"NO"))
    deeper = element(0x00400008, "SQ", inner)
    content = item(deeper + step) + item() + item(other)
    tag = REQUEST_ATTRIBUTES
    sequence = (
        element(tag, "SQ", content + SEQUENCE_END, UNDEFINED)
        if undefined
        else element(tag, "SQ", content)
    )
    body = O.dataset(without=(PIXEL_DATA,)) + sequence
    made = found(body)
    assert request_attributes(made, decoder(b"")) == [
        {"ScheduledProcedureStepID": "SPS1", "RequestedProcedureID": "RP1"},
        {"ScheduledProcedureStepID": "SPS2"},
    ]
    assert len(list(iter_items(made, tag))) == 3
    assert list(iter_items(made, 0x00081140)) == []


def test_unknown_vr_of_undefined_length_is_implicit_inside() -> None:
    content = item(implicit(0x00100020, b"X1")) + SEQUENCE_END
    body = element(0x00081140, "UN", content, UNDEFINED) + O.dataset()
    assert found(body).n_elements == len(O.base) + 3


def test_vrs_of_the_future_have_the_long_form() -> None:
    future = struct.pack("<HH2sxxI", 9, 0x1001, b"ZZ", 3) + b"abc"
    assert found(O.dataset() + future).n_elements == len(O.base) + 1


def test_zero_bytes_behind_the_last_element_are_tolerated_with_a_warning() -> None:
    for syntax, body in ((EXPLICIT, O.dataset()), (IMPLICIT, O.implicit_dataset())):
        for n in (1, 2, 7, 8, 9, 100_000):
            made = found(body + bytes(n), syntax)
            assert made.warnings[-1][1] == "zero bytes behind the last element" or (
                any("behind" in reason for _, reason in made.warnings)
            )
        with pytest.raises(MalformedObject):
            found(body + bytes(100) + b"\1", syntax)


def test_elements_are_counted_at_every_level() -> None:
    limits = Limits(elements=100)
    many = b"".join(element(0x00091000 + n, "LO") for n in range(90))
    with pytest.raises(TooLarge):
        found(many + many, limits=limits)
    nested = element(0x00081140, "SQ", item(many) + item(many))
    with pytest.raises(TooLarge):
        found(nested, limits=limits)
    items = element(0x00081140, "SQ", item() * 101)
    with pytest.raises(TooLarge) as caught:
        found(items, limits=limits)
    assert caught.value.limit == "elements"
    with pytest.raises(TooLarge):
        found(O.encapsulated([b""] * 300), JPEG_LS, limits)


def test_warnings_are_bounded() -> None:
    many = b"".join(element(0x00080060, "CS", b"CT") for _ in range(5000))
    assert len(found(many).warnings) <= 110


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG, JPEG_LS])
@pytest.mark.parametrize("body", [b"", b"\0", bytes(7), bytes(8), bytes(1000)])
def test_nothing_is_no_data_set(syntax: str, body: bytes) -> None:
    with pytest.raises(MalformedObject):
        found(body, syntax)


def test_the_walker_brackets_what_it_finds() -> None:
    inner = element(0x00081150, "UI", b"1.2\0")
    body = O.encapsulated([b"ab"], {0x00081140: ("SQ", item(inner) + item())})
    kinds = [e[0] for e in walk_dataset(body, 0, len(body), EXPLICIT_LITTLE, LIMITS)]
    assert kinds.count(SEQUENCE) == 1
    assert kinds.count(ITEM_START) == 2
    assert kinds[-1] == FRAGMENTS


def test_inflate_gives_back_what_was_deflated() -> None:
    body = O.dataset() * 100
    assert inflate(deflated(body), LIMITS) == body
    assert inflate(deflated(b""), LIMITS) == b""
    small = Limits(inflated_bytes=MIB, inflation_ratio=2)
    # The ratio counts above a mebibyte only.
    assert len(inflate(deflated(bytes(MIB - 1)), small)) == MIB - 1
    with pytest.raises(TooLarge):
        inflate(deflated(bytes(MIB + 1)), small)


def test_implausible_values_are_named_once() -> None:
    body = O.dataset(
        {
            0x00080020: ("DA", b"20260229"), 0x00080030: ("TM", b"246060"),
            0x00280010: us(0), 0x00281053: ("DS", b"one "),
        }
    )  # fmt: skip
    tags = [tag for tag, _ in found(body).warnings]
    assert tags == [0x00080020, 0x00080030, 0x00281053, 0x00280010]


@pytest.mark.parametrize(
    "value", [b"20240229", b"2024.02.29", b"", b"  ", b"20240102 "]
)
def test_dates_that_exist_need_no_warning(value: bytes) -> None:
    assert found(O.dataset({0x00080020: ("DA", value)})).warnings == []


@pytest.mark.parametrize(
    "value", [b"1.5\\2", b"-1E+3", b" .5 ", b"+7.", b"0\\0\\0", b"", b" ", b"1e-300 "]
)
def test_decimal_strings_need_no_warning(value: bytes) -> None:
    assert found(O.dataset({0x00280030: ("DS", value)})).warnings == []
