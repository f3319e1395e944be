"""The digest beside the receive path is that of all bytes, in order."""

from __future__ import annotations

import hashlib
import threading

import pytest

from pacs.dimse.hashing import ALONE, Hasher


@pytest.mark.parametrize("later", [(), (0, 1, 2, 3, 4), (1, 3)])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        (),
        (0,),
        (1, 2, 3),
        (ALONE // 4, ALONE // 4, ALONE // 4, ALONE // 4, 1),
        (ALONE - 1, ALONE, ALONE + 1),
        (ALONE * 4, 5, ALONE * 2, 0, 7),
    ],
)
def test_pieces_of_any_size_make_one_digest(
    sizes: tuple[int, ...], later: tuple[int, ...], *, beside: bool
) -> None:
    pieces = [bytes(range(256)) * (size // 256 + 1) for size in sizes]
    pieces = [piece[:size] for piece, size in zip(pieces, sizes, strict=True)]
    hasher = Hasher()
    digest = hasher.begin(beside=beside)

    for number, piece in enumerate(pieces):
        digest.update(memoryview(piece), later=number in later)

    assert digest.digest() == hashlib.sha256(b"".join(pieces)).digest()
    hasher.close()


@pytest.mark.parametrize("size", [100, ALONE * 8])
def test_a_buffer_may_change_once_it_is_settled(size: int) -> None:
    hasher = Hasher()
    digest = hasher.begin(beside=True)
    buffer = bytearray(b"a" * size)
    wanted = hashlib.sha256(buffer)

    digest.update(memoryview(buffer)[:9], later=True)
    digest.update(memoryview(buffer)[9:], later=True)
    digest.settle()
    buffer[:] = b"b" * len(buffer)
    wanted.update(buffer)
    digest.update(memoryview(buffer))

    assert digest.digest() == wanted.digest()
    hasher.close()


def test_data_sets_one_after_the_other_keep_their_own_digests() -> None:
    hasher = Hasher()
    first, second = hasher.begin(beside=True), hasher.begin(beside=True)
    piece = memoryview(bytes(ALONE * 2))

    first.update(piece)
    second.update(piece)
    second.update(piece)

    assert first.digest() == hashlib.sha256(piece).digest()
    assert second.digest() == hashlib.sha256(bytes(ALONE * 4)).digest()
    hasher.close()


def test_the_thread_ends_with_the_association() -> None:
    before = threading.active_count()
    hasher = Hasher()
    digest = hasher.begin(beside=True)
    digest.update(memoryview(bytes(ALONE)))
    assert threading.active_count() == before, "a slice is hashed without a thread"
    digest.update(memoryview(b"more"))
    assert threading.active_count() == before + 1
    digest.digest()

    hasher.close()

    assert threading.active_count() == before
