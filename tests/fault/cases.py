"""Table A of the bad-input table: what is sent, and what every door must answer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.fault.doors import Kind
from tests.fault.objects import (
    BIG,
    BITS_ALLOCATED,
    CHARSET,
    CLASS_UID,
    COLUMNS,
    CT,
    DEFLATED,
    EXPLICIT,
    FRAMES,
    HTJ2K,
    IMPLICIT,
    INSTANCE_UID,
    ITEM_END,
    JPEG,
    JPEG_2000,
    JPEG_LS,
    PATIENT_ID,
    PATIENT_NAME,
    PIXEL_DATA,
    RLE,
    ROWS,
    SEQUENCE_END,
    SERIES_UID,
    STUDY_UID,
    UNDEFINED,
    Objects,
    deflated,
    element,
    implicit,
    item,
    nested,
    us,
)

ALL = frozenset({"import", "cstore", "stow"})
FILES = ALL - {"cstore"}
"""Where File Meta Information comes from outside."""


@dataclass(frozen=True)
class Case:
    """One object and what becomes of it.

    Attributes
    ----------
    make : callable
        Returns the Part-10 file; its data set and claims are what C-STORE sends.
    tags : tuple of int
        Attributes that the answer must name.
    claimed : callable, optional
        SOP class and instance UID of the command set.
    """

    id: str
    make: Callable[[Objects], bytes]
    kind: Kind
    tags: tuple[int, ...] = ()
    doors: frozenset[str] = ALL
    claimed: Callable[[Objects], tuple[str, str]] | None = None


REFERENCED = 0x00081140
KEY_OBJECTS = b"1.2.840.10008.5.1.4.1.1.88.59"


def _odd(*parts: bytes, end: bytes = b"") -> Callable[[Objects], bytes]:
    """Put elements behind group 0008."""

    def make(o: Objects) -> bytes:
        made = o.dataset()
        at = made.index(element(PATIENT_NAME, *o.base[PATIENT_NAME]))
        return o.file(made[:at] + b"".join(parts) + made[at:] + end)

    return make


def _with(tag: int, vr: str, value: bytes) -> Callable[[Objects], bytes]:
    return lambda o: o.file(o.dataset({tag: (vr, value)}))


def _uid(tag: int, value: bytes) -> Callable[[Objects], bytes]:
    """Give an identifier another value, in File Meta too."""
    claim = value.decode("latin-1").rstrip("\0 ") if tag == INSTANCE_UID else None
    return lambda o: o.file(o.dataset({tag: ("UI", value)}), instance_uid=claim)


def _valid_claim(o: Objects) -> tuple[str, str]:
    return CT, o.instance_uid


A01_TO_A12 = [
    Case("a01_no_bytes", lambda _: b"", Kind.NOT_DICOM, doors=frozenset({"import"})),
    Case("a01_no_bytes", lambda _: b"", Kind.MALFORMED, doors=frozenset({"stow"})),
    Case("a01_no_data_set", lambda o: o.file(b""), Kind.MALFORMED, doors=FILES),
    Case("a01_two_bytes", lambda o: o.file(b"\0\0"), Kind.MALFORMED),
    Case("a02_no_preamble", lambda o: o.dataset(), Kind.NOT_DICOM, doors=FILES),
    Case(
        "a02_no_preamble_implicit",
        lambda o: o.implicit_dataset(),
        Kind.NOT_DICOM,
        doors=FILES,
    ),
    *(
        Case(
            f"a03_{name}",
            lambda o, magic=magic: o.file(o.dataset(), preamble=magic),
            Kind.STORED,
            doors=FILES,
        )
        for name, magic in (
            ("elf", b"\x7fELF\2\1\1"),
            ("pe", b"MZ\x90\0"),
            ("pdf", b"%PDF-1.7"),
            ("tiff", b"II*\0"),
            ("script", b"#!/bin/sh\n"),
            ("html", b"<html><script>"),
        )
    ),
    *(
        Case(
            f"a04_cut_{n}_bytes_short",
            lambda o, n=n: o.file(o.dataset())[:-n],
            Kind.MALFORMED,
            (PIXEL_DATA,),
        )
        for n in (1, 24, 47)
    ),
    Case(
        "a04_cut_in_a_fragment",
        lambda o: o.file(o.encapsulated([bytes(100)], end=b"")[:-20], JPEG_LS),
        Kind.MALFORMED,
        (PIXEL_DATA,),
    ),
    Case(
        "a04_no_sequence_delimiter",
        lambda o: o.file(o.encapsulated([bytes(100)], end=b""), JPEG_LS),
        Kind.MALFORMED,
        (PIXEL_DATA,),
    ),
    *(
        Case(
            f"a05_cut_at_{n}",
            lambda o, n=n: o.file(o.dataset())[:n],
            Kind.MALFORMED,
            doors=FILES,
        )
        for n in (133, 140, 200, 250)
    ),
    *(
        Case(
            f"a06_length_of_4_gib_{vr}",
            _odd(element(0x00082130, vr, b"x" * 8, 0xFFFFFFFE)),
            Kind.MALFORMED,
            (0x00082130,),
        )
        for vr in ("OB", "UT", "UN", "SQ")
    ),
    Case(
        "a06_length_of_4_gib_pixel_data",
        lambda o: o.file(
            o.dataset(without=(PIXEL_DATA,))
            + element(PIXEL_DATA, "OW", bytes(8), 0xFFFFFFFE)
        ),
        Kind.MALFORMED,
        (PIXEL_DATA,),
    ),
    Case(
        "a06_length_of_4_gib_implicit",
        lambda o: o.file(
            implicit(0x00080005, b"", 0xFFFFFFFE) + o.implicit_dataset(), IMPLICIT
        ),
        Kind.MALFORMED,
        (0x00080005,),
    ),
    Case(
        "a06_length_beyond_the_item",
        _odd(element(REFERENCED, "SQ", item(element(0x00081150, "UI", b"1.2\0", 60)))),
        Kind.MALFORMED,
        (0x00081150,),
    ),
    Case(
        "a06_item_beyond_the_sequence",
        _odd(element(REFERENCED, "SQ", item(b"", 400), 8)),
        Kind.MALFORMED,
        (REFERENCED,),
    ),
    *(
        Case(
            f"a07_undefined_length_{vr}",
            _odd(element(0x00082130, vr, length=UNDEFINED)),
            Kind.MALFORMED,
            (0x00082130,),
        )
        for vr in ("OB", "OW", "UT", "UC", "UR", "OF")
    ),
    Case(
        "a07_undefined_length_of_native_pixel_data",
        lambda o: o.file(
            o.dataset(without=(PIXEL_DATA,))
            + element(PIXEL_DATA, "OW", length=UNDEFINED)
            + bytes(48)
        ),
        Kind.MALFORMED,
        (PIXEL_DATA,),
    ),
    *(
        Case(
            f"a08_{depth}_deep_{'un' if undefined else ''}defined",
            _odd(nested(depth, undefined=undefined)),
            Kind.STORED if depth <= 64 else Kind.MALFORMED,
            () if depth <= 64 else (REFERENCED,),
        )
        for depth in (1, 63, 64, 65, 100, 300, 5000)
        for undefined in (True, False)
    ),
    Case(
        "a09_no_item_delimiter",
        _odd(element(REFERENCED, "SQ", length=UNDEFINED), item(length=UNDEFINED)),
        Kind.MALFORMED,
    ),
    Case(
        "a09_no_sequence_delimiter",
        _odd(element(REFERENCED, "SQ", length=UNDEFINED), item(b"")),
        Kind.MALFORMED,
        (REFERENCED,),
    ),
    Case(
        "a09_delimiters_with_a_length",
        _odd(
            element(REFERENCED, "SQ", length=UNDEFINED),
            item(length=UNDEFINED),
            ITEM_END[:4] + struct.pack("<I", 77),
            SEQUENCE_END[:4] + struct.pack("<I", 0xFFFFFFFF),
        ),
        Kind.STORED,
    ),
    Case("a09_item_delimiter_alone", _odd(ITEM_END), Kind.MALFORMED),
    Case("a09_sequence_delimiter_alone", _odd(SEQUENCE_END), Kind.MALFORMED),
    Case(
        "a09_no_item",
        _odd(element(REFERENCED, "SQ", element(0x00081150, "UI", b"1.2\0"))),
        Kind.MALFORMED,
        (REFERENCED,),
    ),
    Case(
        "a12_one_pad_byte",
        lambda o: o.file(deflated(o.dataset()) + b"\0", DEFLATED),
        Kind.STORED,
    ),
    Case(
        "a12_other_garbage",
        lambda o: o.file(deflated(o.dataset()) + b"garbage", DEFLATED),
        Kind.MALFORMED,
    ),
    Case(
        "a12_cut",
        lambda o: o.file(deflated(o.dataset())[:-9], DEFLATED),
        Kind.MALFORMED,
    ),
    Case(
        "a12_not_deflated",
        lambda o: o.file(o.dataset(), DEFLATED),
        Kind.MALFORMED,
    ),
]

A13_TO_A23 = [
    Case(
        "a13_overflows_32_bits",
        lambda o: o.file(
            o.dataset({ROWS: us(65_535), COLUMNS: us(65_535), 0x00280002: us(3)})
        ),
        Kind.WARNED,
        (PIXEL_DATA,),
    ),
    Case(
        "a13_overflows_64_bits",
        lambda o: o.file(
            o.dataset(
                {
                    ROWS: us(65_535), COLUMNS: us(65_535), 0x00280002: us(65_535),
                    BITS_ALLOCATED: us(64), FRAMES: ("IS", b"2147483647"),
                }
            )
        ),
        Kind.WARNED,
        (PIXEL_DATA,),
    ),
    Case("a13_no_rows", _with(ROWS, *us(0)), Kind.WARNED, (ROWS,)),
    Case("a13_99_bits", _with(BITS_ALLOCATED, *us(99)), Kind.WARNED,
         (BITS_ALLOCATED,)),
    Case("a14_rows_as_ul", _with(ROWS, "UL", struct.pack("<I", 4)), Kind.WARNED,
         (ROWS,)),
    Case("a14_rows_as_text", _with(ROWS, "IS", b"512 "), Kind.WARNED, (ROWS,)),
    Case("a14_two_values", _with(COLUMNS, *us(6, 6)), Kind.WARNED, (COLUMNS,)),
    Case("a15_too_short", _with(PIXEL_DATA, "OW", bytes(46)), Kind.WARNED,
         (PIXEL_DATA,)),
    Case("a15_empty", _with(PIXEL_DATA, "OW", b""), Kind.WARNED, (PIXEL_DATA,)),
    Case("a15_no_fragments", lambda o: o.file(o.encapsulated([]), JPEG_LS),
         Kind.WARNED, (PIXEL_DATA,)),
    Case("a16_too_long", _with(PIXEL_DATA, "OW", bytes(200)), Kind.STORED),
    *(
        Case(f"a17_{name}", lambda o, lut=lut: o.file(o.dataset({
                 0x00280004: ("CS", b"PALETTE COLOR "), **lut})),
             Kind.STORED)
        for name, lut in (
            ("no_tables", {}),
            ("short_table", {0x00281101: us(256, 0, 16), 0x00281201: ("OW", b"ab")}),
            ("overflow", {0x00281101: us(0, 65_535, 16),
                          0x00281201: ("OW", bytes(131_072))}),
        )
    ),
    Case("a18_no_frames", _with(FRAMES, "IS", b"0 "), Kind.WARNED, (FRAMES,)),
    Case("a18_minus_one", _with(FRAMES, "IS", b"-1"), Kind.WARNED, (FRAMES,)),
    Case("a18_billion", _with(FRAMES, "IS", b"1000000000"), Kind.WARNED,
         (PIXEL_DATA,)),
    Case("a18_exponent", _with(FRAMES, "IS", b"1e9 "), Kind.WARNED, (FRAMES,)),
    Case("a18_word", _with(FRAMES, "IS", b"many"), Kind.WARNED, (FRAMES,)),
    Case("a18_empty", _with(FRAMES, "IS", b""), Kind.STORED),
    *(
        Case(f"a19_rle_{i}", lambda o, f=f: o.file(o.encapsulated([f]), RLE),
             Kind.STORED)
        for i, f in enumerate(
            (struct.pack("<16I", 2, 64, 4_000_000, *[0] * 13) + bytes(20),
             bytes(64), struct.pack("<16I", 16, *range(64, 79)))
        )
    ),
    *(
        Case(f"a21_{syntax}",
             lambda o, s=syntax: o.file(o.encapsulated([bytes(99)]), s), Kind.STORED)
        for syntax in (JPEG, JPEG_2000, HTJ2K, JPEG_LS)
    ),
    Case(
        "a23_says_explicit_is_implicit",
        lambda o: o.file(o.implicit_dataset(), EXPLICIT),
        Kind.MALFORMED,
    ),
    Case(
        "a23_says_implicit_is_explicit",
        lambda o: o.file(o.dataset(), IMPLICIT),
        Kind.MALFORMED,
    ),
    Case(
        "a23_says_big_is_little",
        lambda o: o.file(o.dataset(), BIG),
        Kind.MALFORMED,
    ),
    Case(
        "a23_says_jpeg_is_native",
        lambda o: o.file(o.dataset(), JPEG),
        Kind.MALFORMED,
        (PIXEL_DATA,),
    ),
    Case(
        "a23_says_native_is_jpeg",
        lambda o: o.file(o.encapsulated([bytes(10)]), EXPLICIT),
        Kind.MALFORMED,
        (PIXEL_DATA,),
    ),
]  # fmt: skip

BAD_UIDS = {
    "66_characters": b"1.2.826.0.1.3680043.10.1999." + b"1" * 38,
    "letters": b"1.2.840.abc",
    "leading_zero": b"1.2.840.01.5\0",
    "empty": b"",
    "only_nul": b"\0\0",
    "two_values": b"1.2.3\\1.2.4\0",
    "double_dot": b"1.2..3",
    "trailing_dot": b"1.2.3.",
    "space_inside": b"1.2. 3",
}
PATHS = {
    "climbs": b"../../etc/x",
    "climbs_backwards": b"..\\..\\x ",
    "drive": b"C:\\x",
    "slash": b"a/b ",
    "nul_inside": b"1.2\x003.4 ",
    "4096_characters": b"1." * 2048,
}

A24_TO_A34 = [
    Case(
        "a24_file_meta_differs",
        lambda o: o.file(o.dataset(), instance_uid="1.2.3.4"),
        Kind.IDENTITY,
        (INSTANCE_UID,),
    ),
    Case(
        "a24_command_differs",
        lambda o: o.file(o.dataset()),
        Kind.IDENTITY,
        (INSTANCE_UID,),
        doors=frozenset({"cstore"}),
        claimed=lambda _: (CT, "1.2.3.4"),
    ),
    Case(
        "a25_class_differs",
        lambda o: o.file(o.dataset(), class_uid="1.2.840.10008.5.1.4.1.1.4"),
        Kind.IDENTITY,
        (CLASS_UID,),
    ),
    *(
        Case(f"a26_{name}_{tag:08x}", _uid(tag, value), Kind.IDENTITY, (tag,),
             claimed=_valid_claim)
        for name, value in BAD_UIDS.items()
        for tag in (INSTANCE_UID, STUDY_UID, SERIES_UID)
    ),
    *(
        Case(f"a26_absent_{tag:08x}",
             lambda o, tag=tag: o.file(o.dataset(without=(tag,))),
             Kind.IDENTITY, (tag,))
        for tag in (CLASS_UID, INSTANCE_UID, STUDY_UID, SERIES_UID)
    ),
    Case(
        "a26_trailing_nul_and_space",
        lambda o: o.file(
            o.dataset(
                {
                    INSTANCE_UID: ("UI", o.instance_uid.encode() + b" \0"),
                    STUDY_UID: ("UI", o.study_uid.encode() + b"\0\0"),
                }
            )
        ),
        Kind.STORED,
    ),
    *(
        Case(f"a27_{name}_{tag:08x}", _uid(tag, value), Kind.IDENTITY, (tag,),
             claimed=_valid_claim)
        for name, value in PATHS.items()
        for tag in (INSTANCE_UID, STUDY_UID, SERIES_UID)
    ),
    Case("a28_absent", lambda o: o.file(o.dataset(without=(PATIENT_ID,))),
         Kind.WARNED, (PATIENT_ID,)),
    Case("a28_empty", _with(PATIENT_ID, "LO", b""), Kind.WARNED, (PATIENT_ID,)),
    Case("a28_spaces", _with(PATIENT_ID, "LO", b"    "), Kind.WARNED, (PATIENT_ID,)),
    Case("a28_long", _with(PATIENT_ID, "LO", b"P" * 200), Kind.WARNED, (PATIENT_ID,)),
    Case("a28_far_too_long", _with(PATIENT_ID, "LO", b"P" * 60_000), Kind.IDENTITY,
         (PATIENT_ID,)),
    Case(
        "a33_private_class",
        lambda o: o.file(
            o.dataset({CLASS_UID: ("UI", b"1.3.46.670589.5.0.1\0")}),
            class_uid="1.3.46.670589.5.0.1",
        ),
        Kind.STORED,
        doors=FILES,
    ),
    *(
        Case(
            f"a33_{name}",
            lambda o, uid=uid: o.file(
                o.dataset({CLASS_UID: ("UI", uid + b"\0" * (len(uid) % 2))}),
                class_uid=uid.decode(),
            ),
            Kind.SOP_CLASS,
            # A named file that claims to be a DICOMDIR is read as one.
            doors=ALL - {"import"} if name == "directory" else ALL,
        )
        for name, uid in (
            ("directory", b"1.2.840.10008.1.3.10"),
            ("verification", b"1.2.840.10008.1.1"),
            ("study_root_find", b"1.2.840.10008.5.1.4.1.2.2.1"),
        )
    ),
    *(
        Case(f"a34_{syntax}", lambda o, s=syntax: o.file(o.dataset(), s), Kind.SYNTAX)
        for syntax in ("1.2.840.10008.1.2.4.999", "1.2.840.10008.1.2.4.94", "1.2.3.4")
    ),
]  # fmt: skip

A35_TO_A50 = [
    *(
        Case(f"a35_{tag:08x}_{value.decode()}",
             _with(tag, vr, value + b" " * (len(value) % 2)), Kind.WARNED, (tag,))
        for tag, vr, value in (
            (0x00080020, "DA", b"20260230"), (0x00080020, "DA", b"NotADate"),
            (0x00080020, "DA", b"2026"), (0x00100030, "DA", b"00000000"),
            (0x00080030, "TM", b"2560"), (0x00080030, "TM", b"noon"),
            (0x00200013, "IS", b"1e3"), (0x00200011, "IS", b"1.5"),
            (0x00200013, "IS", b"99999999999"),
            (0x00280030, "DS", b"1,5"), (0x00281053, "DS", b"NaN"),
            (0x00200032, "DS", b"1\\2\\" + b"3" * 40),
        )
    ),
    Case("a36_controls",
         _with(PATIENT_NAME, "PN", b"A\r\nB: c^\0\x1b[31m\x7f\t"), Kind.STORED),
    Case("a36_bidi",
         lambda o: o.file(o.dataset({
             CHARSET: ("CS", b"ISO_IR 192"),
             PATIENT_NAME: ("PN", "\u202eevil^\u2066x\u200b ".encode())})),
         Kind.STORED),
    *(
        Case(f"a37_{i}", _with(PATIENT_NAME, "PN", value), Kind.STORED)
        for i, value in enumerate(
            (b"<script>alert(1)</script> ", b'"><img src=x onerror=alert(1)>',
             b"${jndi:ldap://x/a}", b"=HYPERLINK(1) ", b"' OR 1=1 --", b"100%_\\ ")
        )
    ),
    *(
        Case(f"a38_{term.decode().strip()}",
             lambda o, term=term: o.file(o.dataset({
                 CHARSET: ("CS", term), PATIENT_NAME: ("PN", b"Wang^\xce\xb0 ")})),
             Kind.WARNED, (CHARSET,))
        for term in (b"ISO IR 192", b"KLINGON ", b"UTF-8 ", b"GB18030\\ISO_IR 6")
    ),
    # In a file, File Meta Information ends where its group does.
    *(
        Case("a42_group_2", lambda o: o.file(
                 element(0x00020010, "UI", b"1.2.840.10008.1.2\0") + o.dataset()),
             kind, tags, doors)
        for kind, tags, doors in (
            (Kind.WARNED, (0x00020010,), ALL - FILES), (Kind.STORED, (), FILES),
        )
    ),
    Case("a42_group_0", lambda o: o.file(
             element(0x00000002, "UI", b"1.2\0") + o.dataset()),
         Kind.WARNED, (0x00000002,)),
    Case("a42_twice", lambda o: o.file(
             o.dataset(tail=element(PATIENT_ID, "LO", b"SECOND"))),
         Kind.WARNED, (PATIENT_ID,)),
    Case("a42_descending", lambda o: o.file(
             o.dataset(tail=element(0x00080005, "CS", b"ISO_IR 100"))),
         Kind.WARNED, (0x00080005,)),
    Case("a43_trailing", lambda o: o.file(o.dataset(
             tail=element(0x7FE10010, "LO", b"MINE") + element(0x7FE11001, "OB", b"ab")
             + element(0xFFFCFFFC, "OB", bytes(100)))),
         Kind.STORED),
    Case("a44_odd_lengths", lambda o: o.file(o.dataset({
             0x00090010: ("LO", b"ODD"), 0x00091001: ("OW", b"abc"),
             0x00091002: ("OB", b"a")})),
         Kind.STORED),
    Case("a44_many_tags", _with(0x00280009, "AT", struct.pack("<6H", *range(6))),
         Kind.STORED),
    Case("a44_64_bits", lambda o: o.file(o.dataset({
             0x00090010: ("LO", b"WIDE"), 0x00091001: ("OV", bytes(16)),
             0x00091002: ("SV", b"\xff" * 8), 0x00091003: ("UV", b"\xff" * 8)})),
         Kind.STORED),
    *(
        Case(f"a44_10_mb_{vr}", lambda o, vr=vr: o.file(o.dataset({
                 0x00090010: ("LO", b"LONG"), 0x00091001: (vr, b"x" * 10_000_000)})),
             Kind.STORED)
        for vr in ("UC", "UR", "UT")
    ),
    Case("a45_not_finite", _with(0x00189073, "FD",
             struct.pack("<3d", float("nan"), float("inf"), float("-inf"))),
         Kind.STORED),
    Case("a49_pdf_with_a_wrong_type", lambda o: o.file(
             o.dataset({CLASS_UID: ("UI", b"1.2.840.10008.5.1.4.1.1.104.1\0"),
                        0x00420011: ("OB", b"<html><script>alert(1)</script></html>"),
                        0x00420012: ("LO", b"text/html\r\nX: y ")},
                       without=(PIXEL_DATA,)),
             class_uid="1.2.840.10008.5.1.4.1.1.104.1"),
         Kind.STORED),
    Case("a50_refers_to_itself", lambda o: o.file(
             o.dataset({CLASS_UID: ("UI", KEY_OBJECTS + b"\0"),
                        0x0040A375: ("SQ", item(
                            element(0x00081115, "SQ", item(element(0x00081199, "SQ",
                                item(element(0x00081155, "UI",
                                             o.instance_uid.encode()))))))) },
                       without=(PIXEL_DATA,)),
             class_uid=KEY_OBJECTS.decode()),
         Kind.STORED),
]  # fmt: skip

CASES = [*A01_TO_A12, *A13_TO_A23, *A24_TO_A34, *A35_TO_A50]
