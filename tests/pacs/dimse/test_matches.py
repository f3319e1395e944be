"""Matches written as identifiers read back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacs.dimse import identifier
from pacs.dimse.matches import SPECIFIC_CHARACTER_SET, MatchWriter
from pacs.dimse.observer import OncePerPeer
from pacs.imaging import charset
from storage.kernel.limits import Limits
from tests.support.dimse import EXPLICIT, IMPLICIT

KEYS = {
    0x00080052: b"CS",
    0x00080061: b"CS",
    0x00100010: b"PN",
    0x00100020: b"LO",
    0x0020000D: b"UI",
    0x00280010: b"US",
}
SEQUENCE = 0x00400275
INNER = {0x00400009: b"SH", 0x00401001: b"SH"}
TEXT = st.text(
    st.sampled_from("ab^=é测试赵敏𠮷やまПет"), max_size=20
)  # hanzi of GB 2312, one of plane 2, kana, Cyrillic
MATCHES = st.fixed_dictionaries(
    {
        0x00080061: st.sampled_from(["", "CT", "CT\\MR"]),
        0x00100010: TEXT,
        0x00100020: TEXT,
        0x0020000D: st.sampled_from(["1.2.3", "1.2.34"]),
        0x00280010: st.integers(0, 0xFFFF).map(str),
        0x00400009: TEXT,
        0x00401001: st.just(""),
    }
)
TERMS = st.sampled_from(
    [
        ("",),
        ("ISO_IR 192",),
        ("GB18030",),
        ("GBK",),
        ("ISO_IR 100",),
        ("ISO_IR 144",),
        ("", "ISO 2022 IR 58"),
        ("", "ISO 2022 IR 87"),
        ("ISO 2022 IR 6", "ISO 2022 IR 149"),
        ("no such set",),
    ]
)


@settings(deadline=None)
@given(MATCHES, TERMS, st.sampled_from([EXPLICIT, IMPLICIT, "1.2.840.10008.1.2.2"]))
def test_a_match_reads_back_in_the_set_it_declares(
    match: dict[int, str], terms: tuple[str, ...], syntax: str
) -> None:
    writer = MatchWriter(
        KEYS,
        transfer_syntax_uid=syntax,
        terms=terms,
        constants={0x00080052: "STUDY"},
        sequence=(SEQUENCE, INNER),
    )

    elements = identifier.read(writer.write(match), syntax, Limits())

    assert list(elements) == sorted(elements)
    declared = elements.pop(SPECIFIC_CHARACTER_SET, b"")
    assert isinstance(declared, bytes)
    decoder = charset.decoder(declared)
    assert not decoder.warning or declared == b"no such set "
    for tag, vr in KEYS.items():
        raw = elements[tag]
        assert isinstance(raw, bytes)
        assert len(raw) % 2 == 0
        wanted = "STUDY" if tag == 0x00080052 else match[tag]
        if vr == b"US":
            order = "big" if syntax.endswith(".2.2") else "little"
            assert int.from_bytes(raw, order) == int(wanted)  # type: ignore[arg-type]
        else:
            assert decoder.decode(raw, vr.decode()).rstrip("\0 ") == wanted
    items = elements[SEQUENCE]
    assert isinstance(items, list)
    assert len(items) == bool(match[0x00400009])
    for item in items:
        inner = item[0x00400009]
        assert isinstance(inner, bytes)
        assert decoder.decode(inner, "SH").rstrip("\0 ") == match[0x00400009]


def test_a_value_too_long_for_its_vr_goes_out_as_un() -> None:
    long = "x" * 70_000
    writer = MatchWriter(KEYS, transfer_syntax_uid=EXPLICIT, terms=("",), constants={})

    raw = writer.write({0x00100020: long})

    assert identifier.read(raw, EXPLICIT, Limits())[0x00100020] == long.encode()
    assert b"\x10\x00\x20\x00UN" in raw


@pytest.mark.parametrize(
    ("seconds", "passed"), [(60.0, [True, False, False]), (0.0, [True, True, True])]
)
def test_an_event_of_a_peer_passes_once_in_a_while(
    seconds: float, passed: list[bool]
) -> None:
    once = OncePerPeer(seconds)

    assert [once.passes("a") for _ in range(3)] == passed
    assert once.passes("b")


def test_peers_are_forgotten_before_they_are_too_many() -> None:
    once = OncePerPeer(60.0, most=2)

    assert [once.passes(name) for name in "abca"] == [True] * 4
