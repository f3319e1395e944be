"""The record: what is written is read back, and damage is seen where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.kernel.errors import CorruptData
from storage.packs.format import (
    ALIGNMENT,
    FILE_HEADER_LENGTH,
    Kind,
    Location,
    Record,
    RecordHeader,
    RecordInfo,
    decode_file_header,
    decode_header,
    decode_prefix,
    encode_file_header,
    encode_header,
    encode_record,
    record_length,
)
from storage.packs.recover import Damage, iter_records, record_at, view_object

KEY = "0123456789abcdef0123456789abcdef"
text = st.text(max_size=40)
headers = st.builds(
    RecordHeader,
    tenant=text,
    door=text,
    received_us=st.integers(0, 2**62),
    transfer_syntax_uid=text,
    sop_class_uid=text,
    sop_instance_uid=text,
    dataset_offset=st.integers(0, 2**31),
    calling_ae=text,
    called_ae=text,
    peer=text,
    origin=st.text(min_size=1, max_size=20),
    digest=text,
)
records = st.builds(
    Record,
    header=headers,
    parts=st.lists(st.binary(max_size=200), max_size=4).map(tuple),
    digest=st.binary(min_size=32, max_size=32),
    kind=st.sampled_from(Kind),
)


def header(number: int = 1) -> RecordHeader:
    return RecordHeader(
        "default", "dimse", 1_700_000_000_000_000 + number, "1.2.840.10008.1.2.1",
        "1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{number}", 128,
    )  # fmt: skip


def a_record(number: int, size: int = 100) -> Record:
    return Record(header(number), (bytes([number]) * size,), bytes([number]) * 32)


def a_pack(*made: Record) -> tuple[bytes, list[int]]:
    """Return a pack, and where each record begins, with the end of the last."""
    raw, places = bytearray(encode_file_header(KEY)), [FILE_HEADER_LENGTH]
    for one in made:
        encoded = encode_record(one)
        raw += b"".join(map(bytes, (encoded.start, *one.parts, encoded.trailer())))
        places.append(places[-1] + encoded.length)
    return bytes(raw), places


@given(records)
def test_a_record_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, one: Record
) -> None:
    raw, places = a_pack(one)
    path = tmp_path_factory.mktemp("pack") / "one.pack"
    path.write_bytes(raw)

    [found] = iter_records(path)

    assert isinstance(found, RecordInfo)
    data = b"".join(bytes(part) for part in one.parts)
    assert (found.kind, found.header, found.digest) == (
        one.kind,
        one.header,
        one.digest,
    )
    assert bytes(view_object(path, found)) == data
    assert found.end == places[-1] == len(raw)
    assert found.location == Location(
        KEY, FILE_HEADER_LENGTH, found.location.object_offset, len(data)
    )


@given(st.lists(records, max_size=5))
def test_records_lie_end_to_end_and_aligned(
    tmp_path_factory: pytest.TempPathFactory, made: list[Record]
) -> None:
    raw, places = a_pack(*made)
    path = tmp_path_factory.mktemp("pack") / "one.pack"
    path.write_bytes(raw)

    found = list(iter_records(path))

    assert [one.header for one in found if isinstance(one, RecordInfo)] == [
        one.header for one in made
    ]
    assert all(place % ALIGNMENT == 0 for place in places)


@given(headers)
def test_a_header_survives(made: RecordHeader) -> None:
    raw = encode_record(Record(made, (), bytes(32))).start
    prefix = decode_prefix(raw)

    assert prefix is not None
    assert prefix.header_length == len(encode_header(made)) == len(raw) - 32
    assert decode_header(raw, raw[32:]) == made


def test_a_length_counts_everything() -> None:
    encoded = encode_record(a_record(1, 101))

    assert len(encoded.start) + 101 == encoded.trailer_offset
    assert encoded.trailer_offset + len(encoded.trailer()) == encoded.length
    assert record_length(len(encoded.start) - 32, 101) == encoded.length


@pytest.mark.parametrize(
    "raw", [b"", b"x" * 64, encode_file_header(KEY)[:63], b"HUYPACK\n" + b"\xff" * 56]
)
def test_what_is_not_a_pack_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptData):
        decode_file_header(raw)


def test_every_torn_tail_is_seen_and_costs_only_the_last_record(tmp_path: Path) -> None:
    raw, places = a_pack(a_record(1), a_record(2), a_record(3))
    path = tmp_path / "torn.pack"
    for size in range(places[2], places[3]):
        path.write_bytes(raw[:size])

        found = list(iter_records(path))
        whole = [one for one in found if isinstance(one, RecordInfo)]
        damage = [one for one in found if isinstance(one, Damage)]

        assert [one.header for one in whole] == [header(1), header(2)]
        assert damage == (
            [Damage(places[2], size, torn=True)] if size > places[2] else []
        )


def test_every_flipped_bit_of_a_record_is_located(tmp_path: Path) -> None:
    raw, places = a_pack(a_record(1), a_record(2, 40), a_record(3))
    path = tmp_path / "flipped.pack"
    padding = places[2] - places[1] - encode_record(a_record(2, 40)).trailer_offset - 56
    digest = range(places[2] - padding - 32, places[2])  # sealed by SHA-256 itself
    unused = {*range(places[1] + 28, places[1] + 32)}  # reserved
    trailer = places[2] - padding - 56
    unused |= {*range(trailer + 12, trailer + 16)}
    for place in range(places[1], places[2]):
        if place in digest or place in unused:
            continue
        broken = bytearray(raw)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)

        found = list(iter_records(path))

        assert found[1] == Damage(places[1], places[2], torn=False), place
        assert [type(one) for one in found] == [RecordInfo, Damage, RecordInfo]


def test_a_record_inside_an_object_is_never_taken_for_one(tmp_path: Path) -> None:
    hostile, _ = a_pack(a_record(66))
    carrier = Record(header(1), (hostile[FILE_HEADER_LENGTH:] * 3,), bytes(32))
    raw, places = a_pack(carrier)
    path = tmp_path / "hostile.pack"

    path.write_bytes(raw[:-8])

    assert list(iter_records(path)) == [Damage(places[0], len(raw) - 8, torn=True)]
    assert record_at(path, places[0]) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.binary(max_size=300),
    st.integers(0, 700),
    st.integers(0, 700),
)
def test_no_bytes_whatever_break_the_reader(
    tmp_path: Path, noise: bytes, at: int, until: int
) -> None:
    raw, _ = a_pack(a_record(1), a_record(2))
    broken = raw[:at] + noise + raw[until:]
    path = tmp_path / "noise.pack"
    path.write_bytes(broken)
    try:
        found = list(iter_records(path))
    except CorruptData:
        return

    position = FILE_HEADER_LENGTH
    for one in found:
        start = one.location.record_offset if isinstance(one, RecordInfo) else one.start
        assert start == position
        position = one.end
    assert position == max(len(broken), FILE_HEADER_LENGTH)
