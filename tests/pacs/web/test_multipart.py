"""Multipart bodies, split wherever the network splits them (RFC 2046 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacs.web.multipart import (
    DATA,
    END,
    PART,
    MultipartReader,
    MultipartWriter,
    Part,
    boundary_of,
    parse_content_type,
)
from storage.kernel.errors import InvalidParameter, MalformedObject, TooLarge

Read = list[tuple[dict[str, str], bytes]]

BODY = (
    b"preamble --B\r\n--Bx\r\n--B \t\r\nContent-Type: a/b\r\nX:  y \r\n\r\n"
    b"hello\r\n--Bx\r\n--\r\n\n-\r\n\r\n--B\r\n\r\n\r\n"
    b"--B\r\nA: b\r\n\r\n--B\nC: d\n\nlf\n--B\r\n\r\nx\r\r\n"
    b"--B--epilogue\r\n--B\r\n\r\nnot a part"
)
PARTS: Read = [
    ({"content-type": "a/b", "x": "y"}, b"hello\r\n--Bx\r\n--\r\n\n-\r\n"),
    ({}, b""),
    ({"a": "b"}, b""),
    ({"c": "d"}, b"lf"),
    ({}, b"x\r"),
]


def read(
    pieces: Sequence[bytes],
    boundary: bytes = b"B",
    *,
    header_bytes: int = 1000,
    max_parts: int = 100,
) -> Read:
    reader = MultipartReader(boundary, header_bytes=header_bytes, max_parts=max_parts)
    found: list[tuple[dict[str, str], list[bytes]]] = []
    opened = False
    for piece in pieces:
        for kind, value in reader.feed(piece):
            if kind == PART:
                assert not opened
                assert not isinstance(value, bytes | None)
                found.append((dict(value), []))
                opened = True
            elif kind == DATA:
                assert isinstance(value, bytes)
                assert value
                found[-1][1].append(value)
            else:
                assert kind == END
                opened = False
    reader.close()
    return [(headers, b"".join(data)) for headers, data in found]


def test_every_split_in_two_places_reads_the_same() -> None:
    for first in range(len(BODY)):
        for second in range(first, len(BODY)):
            pieces = [BODY[:first], BODY[first:second], BODY[second:]]
            assert read(pieces) == PARTS


def test_byte_by_byte_reads_the_same() -> None:
    assert read([bytes([value]) for value in BODY]) == PARTS


@given(
    bodies=st.lists(
        st.one_of(
            st.binary(max_size=64),
            st.text(alphabet="\r\n-B", max_size=24).map(str.encode),
        ),
        max_size=5,
    ),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_what_is_written_is_read(bodies: list[bytes], cuts: list[int]) -> None:
    writer = MultipartWriter(
        "application/dicom",
        [
            Part((("X", str(i)),), len(body), lambda body=body: iter((body,)))  # type: ignore[misc]
            for i, body in enumerate(bodies)
        ],
    )
    whole = b"".join(writer)
    boundary = boundary_of(parse_content_type(writer.content_type))
    edges = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    pieces = [whole[a:b] for a, b in pairwise(edges)]

    found = read(pieces, boundary)

    assert writer.length == len(whole)
    assert [data for _, data in found] == bodies
    assert [headers["content-length"] for headers, _ in found] == [
        str(len(body)) for body in bodies
    ]


@given(raw=st.text(alphabet="\r\n-B: x", max_size=60).map(str.encode))
def test_any_bytes_read_the_same_in_any_pieces(raw: bytes) -> None:
    def outcome(pieces: Sequence[bytes]) -> Read | str:
        try:
            return read(pieces, header_bytes=64, max_parts=3)
        except (MalformedObject, TooLarge) as error:
            return type(error).__name__

    whole = outcome([raw])

    assert outcome([bytes([value]) for value in raw]) == whole


def test_a_part_passes_through_without_being_held() -> None:
    reader = MultipartReader(b"B", header_bytes=100, max_parts=1)
    list(reader.feed(b"--B\r\n\r\n"))
    held = 0
    for _ in range(100):
        given_out = sum(
            len(value)
            for kind, value in reader.feed(bytes(1000))
            if kind == DATA and value
        )
        held += 1000 - given_out
        assert held < 10


def test_parts_and_headers_are_bounded() -> None:
    with pytest.raises(TooLarge, match="request_parts"):
        read([b"--B\r\n\r\n" * 5], max_parts=3)
    with pytest.raises(TooLarge, match="part_header_bytes"):
        read([b"--B\r\n", *[b"X: yyyyyyyy\r\n"] * 100])


def test_a_missing_end_is_an_error() -> None:
    with pytest.raises(MalformedObject):
        read([b"--B\r\n\r\nx\r\n--B"])


@pytest.mark.parametrize(
    ("text", "boundary"),
    [
        ("multipart/related; boundary=abc", b"abc"),
        ('multipart/related; boundary="a b"; type=x', b"a b"),
        ('MULTIPART/related;BOUNDARY="a\\"b"', None),
        ('multipart/related; boundary="a;b"', None),
        ("multipart/related; boundary=", None),
        ("multipart/related", None),
        (f"multipart/related; boundary={'x' * 73}", b"x" * 73),
        (f"multipart/related; boundary={'x' * 201}", None),
        ('multipart/related; boundary="ends in space "', None),
    ],
)
def test_boundaries(text: str, boundary: bytes | None) -> None:
    if boundary is None:
        with pytest.raises(InvalidParameter):
            boundary_of(parse_content_type(text))
    else:
        assert boundary_of(parse_content_type(text)) == boundary


def test_an_unknown_length_leaves_the_whole_unknown() -> None:
    parts = [Part((), None, lambda: iter((b"x",))), Part((), 1, lambda: iter((b"y",)))]

    writer = MultipartWriter("a/b", parts)

    assert writer.length is None
    boundary = boundary_of(parse_content_type(writer.content_type))
    assert [data for _, data in read([b"".join(writer)], boundary)] == [b"x", b"y"]
