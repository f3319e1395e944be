"""The DICOM JSON model against pydicom, and where we decide otherwise."""

from __future__ import annotations

import base64
import json
import math
import struct
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import pydicom
import pytest

from pacs.imaging.dataset import inflate
from pacs.imaging.dicomjson import INLINE_LIMIT, instance_json, value_at
from pacs.imaging.part10 import read_file_meta
from storage.kernel.errors import InvalidParameter, NotFound
from storage.kernel.limits import Limits
from tests.fault.objects import (
    BIG,
    EXPLICIT,
    IMPLICIT,
    JPEG_LS,
    PIXEL_DATA,
    Objects,
    element,
    implicit,
    item,
)
from tests.support.corpus import files, needs_corpus

O = Objects(8)  # noqa: E741
DEFLATED = "1.2.840.10008.1.2.1.99"


def made(body: bytes, syntax: str = EXPLICIT, **options: Any) -> dict[str, Any]:
    raw = instance_json(body, 0, len(body), syntax, bulkdata_prefix="/bulk", **options)
    parsed: dict[str, Any] = json.loads(raw, parse_constant=_no_constant)
    return parsed


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def one(vr: str, value: bytes, tag: int = 0x00091001) -> Any:
    return made(element(tag, vr, value))[f"{tag:08X}"]


def _same(ours: Any, theirs: Any, order: str) -> None:
    """Compare two members; BulkDataURI and the choices of this module aside."""
    if "BulkDataURI" in ours:
        return
    if ours["vr"] != theirs["vr"]:
        # UN of standard tags is read; choices of the dictionary are ours.
        assert "UN" in {theirs["vr"], ours["vr"]} or ours["vr"] in {
            "OW", "OB", "US", "SS",
        }  # fmt: skip
        return
    if "InlineBinary" in ours:
        left = base64.b64decode(ours["InlineBinary"])
        right = base64.b64decode(theirs.get("InlineBinary", ""))
        assert order == "big" or left.rstrip(b"\0") == right.rstrip(b"\0")
        return
    left, right = ours.get("Value", []), theirs.get("Value", [])
    if ours["vr"] == "SQ":
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            _compare(a, b, order)
        return
    assert [_plain(v) for v in left] == [_plain(v) for v in right]


def _plain(value: Any) -> Any:
    """Forget how numbers are written, and empty or padded text."""
    if isinstance(value, dict):
        return {k: v.strip(" \0") for k, v in value.items() if v.strip(" \0")} or None
    if isinstance(value, str):
        text = value.strip(" \0")
        try:
            number = Decimal(text)
        except ArithmeticError:
            return text or None
        return number.normalize() if number.is_finite() else text.lower()
    if isinstance(value, float) and math.isfinite(value):
        return Decimal(repr(value)).normalize()
    if isinstance(value, float):
        return str(value)
    if isinstance(value, int):
        return Decimal(value).normalize()
    return value


def _compare(ours: dict[str, Any], theirs: dict[str, Any], order: str) -> None:
    kept = {
        tag: member
        for tag, member in theirs.items()
        if not tag.endswith("0000") and int(tag[:4], 16) >= 4
    }
    assert set(ours) == set(kept)
    for tag, member in ours.items():
        if tag != "00080005":
            _same(member, kept[tag], order)


#: pydicom cannot write these as JSON, or reads their text otherwise.
NOT_COMPARED = {
    "chrSQEncoding.dcm", "chrSQEncoding1.dcm", "chinese-iso2022-ir58.dcm",
    "chinese-mislabelled-gbk-as-latin1.dcm", "chinese-undeclared-gbk.dcm",
    "JLSL_RGB_ILV0.dcm", "JLSN_RGB_ILV0.dcm",
}  # fmt: skip


@needs_corpus
@pytest.mark.parametrize(
    "path",
    [*files("objects"), *files("charsets"), *files("syntaxes")],
    ids=lambda p: "/".join(p.parts[-2:]),
)
def test_members_are_those_of_pydicom(path: Path) -> None:
    data = path.read_bytes()
    meta = read_file_meta(data, accept_without_preamble=True)
    assert meta is not None
    body: Any = data[meta.dataset_offset :]
    syntax = meta.transfer_syntax_uid
    if syntax == DEFLATED:
        body = inflate(body, Limits())
    ours = made(body, syntax)
    if path.name in NOT_COMPARED:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path, force=True)
        theirs = json.loads(
            json.dumps(ds.to_json_dict(suppress_invalid_tags=True), default=str)
        )
    shared = {tag: member for tag, member in ours.items() if tag in theirs}
    # Only values that pydicom finds invalid are missing there.
    assert len(ours) - len(shared) <= 5
    _compare(shared, {t: m for t, m in theirs.items() if t in shared},
             "big" if syntax == BIG else "little")  # fmt: skip


@needs_corpus
@pytest.mark.parametrize(
    "path", [*files("objects"), *files("charsets")], ids=lambda p: p.name
)
def test_pydicom_reads_what_we_write(path: Path) -> None:
    data = path.read_bytes()
    meta = read_file_meta(data, accept_without_preamble=True)
    assert meta is not None
    ours = made(data[meta.dataset_offset :], meta.transfer_syntax_uid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = pydicom.Dataset.from_json(ours, lambda *_: b"")
        assert len(read) == len(ours)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"1.50", 1.5), (b"-1", -1), (b"+1", 1), (b".5", 0.5), (b"7.", 7), (b"007", 7),
        (b"1E3", 1000.0), (b"1e-3 ", 0.001), (b"-0", 0), (b"1,5", "1,5"),
        (b"NaN", "NaN"), (b"inf", "inf"), (b"1e999", "1e999"), (b"1e-999", "1e-999"),
        (b"0x10", "0x10"), (b"", None), (b"1_000", "1_000"), (b"1 2", "1 2"),
        (b"12345678901234567", "12345678901234567"),
    ],
)  # fmt: skip
def test_decimal_strings(text: bytes, value: Any) -> None:
    member = one("DS", text)
    assert member.get("Value") == (None if value is None else [value])


def test_all_digits_of_a_decimal_stay() -> None:
    raw = instance_json(
        element(0x00091001, "DS", b"0.10000000000000"), 0, 24, EXPLICIT,
        bulkdata_prefix="",
    )  # fmt: skip
    assert b"0.10000000000000" in raw


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"12", 12), (b"-3 ", -3), (b"+4", 4), (b"1e3", "1e3"), (b"1.0", "1.0"),
     (b"9" * 20, "9" * 20), (b"007", 7)],
)  # fmt: skip
def test_integer_strings(text: bytes, value: Any) -> None:
    assert one("IS", text)["Value"] == [value]


@pytest.mark.parametrize(
    ("vr", "raw", "value"),
    [
        ("US", struct.pack("<2H", 1, 65535), [1, 65535]),
        ("SS", struct.pack("<h", -2), [-2]),
        ("UL", struct.pack("<I", 2**32 - 1), [2**32 - 1]),
        ("SL", struct.pack("<i", -(2**31)), [-(2**31)]),
        ("UV", struct.pack("<Q", 2**53), [2**53]),
        ("UV", struct.pack("<Q", 2**53 + 1), [str(2**53 + 1)]),
        ("SV", struct.pack("<q", -(2**63)), [str(-(2**63))]),
        ("FL", struct.pack("<f", 0.5), [0.5]),
        ("FD", struct.pack("<2d", math.inf, -math.inf), ["Infinity", "-Infinity"]),
        ("FD", struct.pack("<d", math.nan), ["NaN"]),
        ("AT", struct.pack("<2H", 0x18, 0x1063), ["00181063"]),
        ("CS", b"A\\B \\\\C", ["A", "B", None, "C"]),
        ("LT", b"a\\b  ", ["a\\b"]),
        ("UR", b"http://x/\\ ", ["http://x/\\"]),
        ("PN", b"A^B=C\\\\D ", [{"Alphabetic": "A^B", "Ideographic": "C"}, None,
                                {"Alphabetic": "D"}]),
        ("UI", b"1.2\0", ["1.2"]),
        ("LO", b'"\\\x01\n\x7f ', ['"', "\x01\n\x7f"]),
    ],
)  # fmt: skip
def test_values_by_vr(vr: str, raw: bytes, value: Any) -> None:
    assert one(vr, raw) == {"vr": vr, "Value": value}


@pytest.mark.parametrize(("vr", "n"), [("US", 3), ("FD", 9), ("AT", 6), ("UL", 2)])
def test_a_length_that_does_not_fit_is_unknown(vr: str, n: int) -> None:
    member = one(vr, b"\1" * n)
    assert member["vr"] == "UN"
    assert base64.b64decode(member["InlineBinary"]) == b"\1" * n


def test_empty_elements_have_no_value() -> None:
    for vr in ("LO", "PN", "US", "OB", "SQ", "DS", "UN", "UT"):
        assert one(vr, b"") == {"vr": vr}


def test_binary_values_are_inline_up_to_a_limit() -> None:
    assert "InlineBinary" in one("OB", bytes(INLINE_LIMIT))
    assert one("OB", bytes(INLINE_LIMIT + 1)) == {
        "vr": "OB", "BulkDataURI": "/bulk/00091001",
    }  # fmt: skip


def test_nested_bulk_data_has_a_path() -> None:
    inner = item() + item(element(0x00091001, "OB", bytes(5000)))
    body = element(0x00081140, "SQ", inner)
    member = made(body)["00081140"]["Value"][1]["00091001"]
    assert member["BulkDataURI"] == "/bulk/00081140/2/00091001"
    vr, value = value_at(body, 0, len(body), EXPLICIT, "00081140/2/00091001")
    assert (vr, bytes(value)) == ("OB", bytes(5000))


def test_pixel_data_is_always_bulk_data() -> None:
    assert made(O.dataset())["7FE00010"] == {
        "vr": "OW", "BulkDataURI": "/bulk/7FE00010",
    }  # fmt: skip
    coded = made(O.encapsulated([b"ab"]), JPEG_LS)["7FE00010"]
    assert coded == {"vr": "OB", "BulkDataURI": "/bulk/7FE00010"}


def test_the_first_of_a_repeated_tag_wins_at_each_level() -> None:
    twice = element(0x00080060, "CS", b"CT") + element(0x00080060, "CS", b"MR")
    inner = element(0x00081140, "SQ", item(twice))
    made_ = made(twice + inner + inner)
    assert made_["00080060"]["Value"] == ["CT"]
    assert made_["00081140"]["Value"][0]["00080060"]["Value"] == ["CT"]


def test_character_sets_of_items() -> None:
    """An item without its own has that of what encloses it (PS3.3 C.12.1.1.2)."""
    name = element(0x00100010, "PN", "王".encode("gb18030"))
    own = element(0x00080005, "CS", b"ISO_IR 192") + element(
        0x00100010, "PN", "王".encode() + b" "
    )
    body = element(0x00080005, "CS", b"GB18030 ")
    body += element(0x00081140, "SQ", item(name) + item(own) + item(name)) + name
    shown = made(body)
    items = shown["00081140"]["Value"]
    assert [i["00100010"]["Value"][0]["Alphabetic"] for i in items] == ["王"] * 3
    assert shown["00100010"]["Value"][0]["Alphabetic"] == "王"
    assert shown["00080005"]["Value"] == ["ISO_IR 192"]


def test_implicit_choices_follow_pixel_representation() -> None:
    for signed, vr, value in ((0, "US", 65535), (1, "SS", -1)):
        body = implicit(0x00280103, struct.pack("<H", signed))
        body += implicit(0x00280106, b"\xff\xff")
        assert made(body, IMPLICIT)["00280106"] == {"vr": vr, "Value": [value]}


def test_big_endian_values_are_swapped() -> None:
    body = struct.pack(">HH2sHHHH2sxxI4s", 0x28, 0x10, b"US", 2, 512,
                       0x0009, 0x1001, b"OW", 4, b"\1\2\3\4")  # fmt: skip
    shown = made(body, BIG)
    assert shown["00280010"]["Value"] == [512]
    assert base64.b64decode(shown["00091001"]["InlineBinary"]) == b"\2\1\4\3"
    vr, value = value_at(body, 0, len(body), BIG, "00091001")
    assert (vr, bytes(value)) == ("OW", b"\2\1\4\3")


@pytest.mark.parametrize(
    "path", ["", "7FE0001", "7FE00010/", "00081140/0/00080060", "../etc", "7FE00010 ",
             "00081140//00080060", "00081140/1", "x" * 5000],
)  # fmt: skip
def test_paths_that_are_none(path: str) -> None:
    body = O.dataset()
    with pytest.raises(InvalidParameter):
        value_at(body, 0, len(body), EXPLICIT, path)


@pytest.mark.parametrize(
    "path", ["00189321", "00081140/1/00080060", "00080060/1/00080060"]
)
def test_elements_that_are_not_there(path: str) -> None:
    body = O.dataset()
    with pytest.raises(NotFound):
        value_at(body, 0, len(body), EXPLICIT, path)


def test_encapsulated_pixel_data_of_one_frame() -> None:
    body = O.encapsulated([b"ab", b"cd"])
    vr, value = value_at(body, 0, len(body), JPEG_LS, f"{PIXEL_DATA:08X}")
    assert (vr, bytes(value)) == ("OB", b"abcd")
    many = O.encapsulated([b"ab", b"cd"], table=struct.pack("<2I", 0, 10))
    with pytest.raises(NotFound):
        value_at(many, 0, len(many), JPEG_LS, f"{PIXEL_DATA:08X}")
