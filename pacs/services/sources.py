"""Bytes of a known length that are read where they are asked for."""

from __future__ import annotations

import io
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO

from storage.kernel.errors import Unavailable
from storage.kernel.limits import MIB

#: The most that is read, or handed on, at a time.
CHUNK = 1 * MIB


@dataclass(frozen=True, slots=True)
class ByteSource:
    """Bytes of a known length that can be read from anywhere.

    `transfer_syntax_uid` says what they are in; `transcoded` whether they are not
    the bytes that were received. `whole` reads all of them in a way of its own.
    """

    length: int
    read: Callable[[int, int], bytes]
    transfer_syntax_uid: str
    transcoded: bool = False
    whole: Callable[[], Iterator[bytes]] | None = None

    @classmethod
    def of(
        cls, data: bytes | memoryview, transfer_syntax_uid: str, *, transcoded: bool
    ) -> ByteSource:
        """Return a source of bytes that are in memory."""
        view = memoryview(data)

        def read(offset: int, length: int) -> bytes:
            return bytes(view[offset : offset + length])

        return cls(len(view), read, transfer_syntax_uid, transcoded)

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, at most 1 MiB at a time."""
        end = self.length if stop is None else min(stop, self.length)
        if self.whole is not None and (start, end) == (0, self.length):
            yield from self.whole()
            return
        while start < end:
            chunk = self.read(start, min(CHUNK, end - start))
            yield chunk
            start += len(chunk)


class LazyBytes:
    """Bytes made at the first read and let go at the last."""

    def __init__(self, make: Callable[[], bytes], length: int) -> None:
        self._make = make
        self._length = length
        self._data: bytes | None = None

    def read(self, offset: int, length: int) -> bytes:
        if self._data is None:
            self._data = self._make()
        data = self._data
        if offset + length >= self._length:
            self._data = None
        return data[offset : offset + length]


class Spool:
    """Bytes that are written first and read then, in memory up to a limit.

    Longer ones lie in an unnamed file of the folder for temporary files, which goes
    with the last reader.

    Parameters
    ----------
    memory : int
        Bytes that are kept in memory.
    """

    def __init__(self, memory: int) -> None:
        # Closed by the finalizer.
        self._file: IO[bytes] = SpooledTemporaryFile(max_size=memory)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self.length = 0

    def fill(self, write: Callable[[IO[bytes]], object]) -> None:
        """Have everything written.

        Raises
        ------
        Unavailable
            There is no room.
        """
        try:
            write(self._file)
            self.length = self._file.seek(0, io.SEEK_END)
        except OSError as error:
            reason = f"no room for what is made: {error.strerror}"
            raise Unavailable(reason) from error

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of the bytes."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(length)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes, at most 1 MiB at a time."""
        for start in range(0, self.length, CHUNK):
            yield self.read(start, CHUNK)


def spliced(
    read: Callable[[int, int], bytes],
    parts: Sequence[tuple[int, int]],
    transfer_syntax_uid: str,
) -> ByteSource:
    """Return several ranges as one source; only what is asked for is read."""
    if len(parts) == 1:
        start, length = parts[0]
        return ByteSource(
            length,
            lambda offset, size: read(start + offset, size),
            transfer_syntax_uid,
        )

    def read_across(offset: int, size: int) -> bytes:
        found = []
        for start, length in parts:
            if size > 0 and offset < length:
                found.append(read(start + offset, min(size, length - offset)))
                size -= len(found[-1])
            offset = max(0, offset - length)
        return b"".join(found)

    return ByteSource(
        sum(length for _, length in parts), read_across, transfer_syntax_uid
    )
