"""Ranged reads of packs, wherever they lie: local folder first, then object store."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from storage.kernel.errors import CorruptData, DependencyDown, NotFound
from storage.kernel.limits import MIB
from storage.objects.protocol import ObjectStore
from storage.packs.writer import pack_path

#: Open packs one process keeps.
MAX_OPEN = 128
#: How long an unlinked pack may stay open.
RECHECK_SECONDS = 30.0


class PackGone(NotFound):
    """The pack is no longer where the index said; look the location up again."""

    code = "not_found.pack"


def object_key(key: str) -> str:
    """Return the key of a sealed pack in the object store."""
    return f"packs/{key[:2]}/{key}.pack"


class _File:
    """An open pack; closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.checked_at = time.monotonic()

    def __del__(self) -> None:
        fd = getattr(self, "fd", None)
        if fd is not None:
            os.close(fd)


class PackReader:
    """Read ranges of packs; safe from any thread.

    Parameters
    ----------
    folder : Path
        Local packs.
    objects : ObjectStore, optional
        Where sealed packs are.
    """

    def __init__(self, folder: Path, objects: ObjectStore | None = None) -> None:
        self._folder = folder
        self._objects = objects
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._remote: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, pack_key: str, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes at `offset`.

        Raises
        ------
        PackGone
        CorruptData
            The pack is shorter than the index says.
        DependencyDown
            The object store does not answer, or the disk fails.
        """
        if length <= 0:
            return b""
        opened = self._local(pack_key)
        if opened is None:
            data = self._read_object(pack_key, offset, length)
        else:
            try:
                data = os.pread(opened.fd, length, offset)
                while 0 < len(data) < length:
                    more = os.pread(opened.fd, length - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
            except OSError as error:
                raise DependencyDown(f"pack storage: {error.strerror}") from error
        if len(data) != length:
            raise CorruptData("a pack is shorter than the index says")
        return data

    def iter_range(
        self, pack_key: str, offset: int, length: int, chunk: int = MIB
    ) -> Iterator[bytes]:
        """Yield the range in pieces of at most `chunk` bytes."""
        while length > 0:
            data = self.read(pack_key, offset, min(chunk, length))
            yield data
            offset += len(data)
            length -= len(data)

    def size(self, pack_key: str) -> int:
        """Return the length of a pack in bytes.

        Raises
        ------
        PackGone
        """
        opened = self._local(pack_key)
        if opened is not None:
            return os.fstat(opened.fd).st_size
        if self._objects is not None:
            info = self._objects.stat(object_key(pack_key))
            if info is not None:
                return info.size
        raise PackGone("no such pack")

    def forget(self, pack_key: str) -> None:
        """Close a pack that is about to be unlinked."""
        with self._lock:
            self._files.pop(pack_key, None)
            self._remote.pop(pack_key, None)

    def sweep(self) -> int:
        """Close packs that were unlinked, so that their bytes are given back."""
        with self._lock:
            gone = [
                key
                for key, opened in self._files.items()
                if not os.fstat(opened.fd).st_nlink
            ]
            for key in gone:
                del self._files[key]
            return len(gone)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _local(self, key: str) -> _File | None:
        """Return the open local pack, or None when it lies elsewhere."""
        with self._lock:
            opened = self._files.get(key)
            if opened is not None:
                self._files.move_to_end(key)
                now = time.monotonic()
                if now - opened.checked_at < RECHECK_SECONDS:
                    return opened
                opened.checked_at = now
                if os.fstat(opened.fd).st_nlink:
                    return opened
                del self._files[key]
            if key in self._remote:
                return None
        try:
            opened = _File(pack_path(self._folder, key))
        except FileNotFoundError:
            if self._objects is None:
                raise PackGone("no such pack") from None
            with self._lock:
                self._remote[key] = None
                if len(self._remote) > MAX_OPEN:
                    self._remote.popitem(last=False)
            return None
        except OSError as error:
            raise DependencyDown(f"pack storage: {error.strerror}") from error
        with self._lock:
            self._files[key] = opened
            if len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)
        return opened

    def _read_object(self, key: str, offset: int, length: int) -> bytes:
        if self._objects is None:
            raise PackGone("no such pack")
        try:
            return self._objects.read(object_key(key), offset, length)
        except NotFound as error:
            self.forget(key)
            raise PackGone("no such pack") from error
