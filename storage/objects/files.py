"""Objects as files: temporary file, sync, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from storage.kernel.errors import (
    CorruptData,
    DependencyDown,
    ImagingError,
    NotFound,
    StorageFull,
)
from storage.kernel.limits import MIB
from storage.objects.protocol import ObjectInfo, check_key

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SUFFIX = ".sha256"
_UNFINISHED = ".put-"
#: No upload takes this long: what is older belongs to a process that was killed.
LEFT_SECONDS = 86_400.0


class FileObjectStore:
    """Objects below one folder; `<key>.sha256` beside each holds its digest."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._root.mkdir(parents=True, exist_ok=True)

    def put_file(self, key: str, path: Path, sha256: str) -> ObjectInfo:
        target = self._path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=target.parent, prefix=_UNFINISHED, delete=False
            ) as temporary:
                try:
                    size, digest = _copy(path, temporary.fileno())
                    if digest != sha256:
                        raise CorruptData("the file changed while it was stored")
                    os.fsync(temporary.fileno())
                    self._write_digest(target, sha256)
                    Path(temporary.name).rename(target)
                except BaseException:
                    Path(temporary.name).unlink(missing_ok=True)
                    raise
            _sync_up(target.parent, self._root)
        except OSError as error:
            raise _translated(error) from error
        return ObjectInfo(key, size, sha256)

    def read(self, key: str, offset: int, length: int) -> bytes:
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound("no such object") from None
        except OSError as error:
            raise _translated(error) from error
        try:
            parts = []
            while length > 0:
                data = os.pread(fd, length, offset)
                if not data:
                    break
                parts.append(data)
                offset += len(data)
                length -= len(data)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            raise _translated(error) from error
        finally:
            os.close(fd)

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _translated(error) from error
        return ObjectInfo(key, size, self._digest(path))

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
            _digest_path(path).unlink(missing_ok=True)
        except OSError as error:
            raise _translated(error) from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = []
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name.startswith(_UNFINISHED) or name.endswith(_SUFFIX):
                    continue
                path = Path(folder) / name
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    found.append((key, path))
        for key, path in sorted(found):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue  # deleted meanwhile
            yield ObjectInfo(key, size, self._digest(path))

    def health(self) -> None:
        try:
            with tempfile.NamedTemporaryFile(
                dir=self._root, prefix=_UNFINISHED
            ) as probe:
                probe.write(b"ok")
                probe.flush()
            shutil.disk_usage(self._root)
        except OSError as error:
            raise _translated(error) from error

    def sweep(self) -> int:
        """Remove what processes that were killed left behind; return how many files."""
        before = time.time() - LEFT_SECONDS
        removed = 0
        try:
            for folder, _, names in os.walk(self._root):
                there = set(names)
                for name in names:
                    left = name.startswith(_UNFINISHED) or (
                        name.endswith(_SUFFIX)
                        and name.removesuffix(_SUFFIX) not in there
                    )
                    path = Path(folder) / name
                    if left and path.stat().st_mtime < before:
                        path.unlink()
                        removed += 1
        except FileNotFoundError:
            pass  # stored or deleted meanwhile; the next round sees the rest
        except OSError as error:
            raise _translated(error) from error
        return removed

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _write_digest(self, target: Path, sha256: str) -> None:
        path = _digest_path(target)
        with path.open("w", encoding="ascii") as file:
            file.write(sha256)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _digest(path: Path) -> str:
        try:
            return _digest_path(path).read_text("ascii")
        except FileNotFoundError:
            return ""


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + _SUFFIX)


def _copy(source: Path, fd: int) -> tuple[int, str]:
    """Copy a file; return its length and SHA-256."""
    digest = hashlib.sha256()
    size = 0
    with source.open("rb") as file:
        while chunk := file.read(4 * MIB):
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
            size += len(chunk)
    return size, digest.hexdigest()


def _sync_up(folder: Path, root: Path) -> None:
    """Make the entries from `folder` up to `root` durable."""
    while True:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        if folder == root:
            return
        folder = folder.parent


def _translated(error: OSError) -> ImagingError:
    if error.errno in _NO_SPACE:
        return StorageFull("no space left for objects")
    return DependencyDown(f"object store: {error.strerror}")
