"""The key of the audit, and the memory that lies beside it, outside the database.

The memory says how far this host has seen the chain grow. It is what tells a
database that was put back to an earlier state, head and signatures included, from
one that never had more.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from storage.audit.chain import Keyring, Sealer
from storage.kernel.errors import DependencyDown, InvalidParameter

log = logging.getLogger(__name__)

KEY_FILE = "audit.key"
KEY_BYTES = 32
#: Read at most; what is longer is no memory of ours.
MEMORY_BYTES = 4096


def load_key(path: Path) -> Sealer:
    """Return the key of a file.

    Raises
    ------
    InvalidParameter
        It is not there, or no key.
    """
    try:
        text = path.read_text("ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise InvalidParameter("audit key", f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidParameter("audit key", f"{path} is not hexadecimal") from error
    if len(key) != KEY_BYTES:
        raise InvalidParameter("audit key", f"{path} does not hold {KEY_BYTES} bytes")
    return Sealer(key)


def own_key(folder: Path) -> Sealer:
    """Return the key of this data folder; the first call makes it, mode 0600.

    Raises
    ------
    InvalidParameter
        The file holds no key. It is never replaced: what it signed needs it.
    DependencyDown
        The folder cannot be written.
    """
    path = folder / KEY_FILE
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _publish(path, secrets.token_hex(KEY_BYTES).encode() + b"\n")
        except OSError as error:
            raise DependencyDown(f"audit key: {error.strerror}") from error
    return load_key(path)


def keyring(folder: Path) -> Keyring:
    """Return the own key, and all others that end in ``.key`` in the folder.

    Raises
    ------
    InvalidParameter
        One of the files holds no key.
    DependencyDown
        As `own_key`.
    """
    own = own_key(folder)
    paths = sorted(folder.glob("*.key"))
    others = (load_key(path) for path in paths if path.name != KEY_FILE)
    return Keyring(own, tuple(others))


def _publish(path: Path, content: bytes) -> None:
    """Write a file that appears whole and is never replaced; processes may race."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(partial, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """A record that this host knows to be in the chain."""

    sequence: int
    hash: bytes
    time_us: int


class Memory:
    """The highest record this host has written, in a file beside the key.

    Written after the commit, so it is never ahead of the database; it may be behind
    by what was committed in the moment of a crash. A memory that the chain no longer
    agrees with is kept, in a second file, before it is overwritten.
    """

    def __init__(self, folder: Path, stream: str, sealer: Sealer) -> None:
        self._folder = folder
        self._path = folder / f"{stream}.head"
        self._stream = stream
        self._sealer = sealer

    @property
    def lost_path(self) -> Path:
        """Where memories are kept that the chain did not agree with."""
        return self._folder / f"{self._stream}.lost"

    def read(self) -> Seen | None:
        """Return what is remembered, or None when there is nothing.

        Raises
        ------
        InvalidParameter
            The file is damaged, or was signed with another key.
        """
        try:
            with self._path.open("rb") as file:
                text = file.read(MEMORY_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DependencyDown(f"audit memory: {error.strerror}") from error
        return self._parsed(text)

    def lost(self) -> Iterator[Seen]:
        """Yield the memories that the chain did not agree with."""
        try:
            file = self.lost_path.open("rb")
        except FileNotFoundError:
            return
        with file:
            while line := file.readline(MEMORY_BYTES):
                yield self._parsed(line)

    def advance(self, seen: Seen, hash_of: Callable[[int], bytes | None]) -> bool:
        """Remember `seen` unless more is remembered already.

        Parameters
        ----------
        hash_of : callable
            Returns the hash the chain has now at a sequence number, or None.

        Returns
        -------
        bool
            False when the chain does not agree with what was remembered: the
            database was put back, or its records were replaced.
        """
        try:
            with self._locked():
                known = self._known()
                if known is not None and known.sequence >= seen.sequence:
                    return known.sequence > seen.sequence or known.hash == seen.hash
                agrees = known is None or hash_of(known.sequence) == known.hash
                if known is not None and not agrees:
                    self._keep(known)
                self._replace(seen)
                return agrees
        except OSError as error:
            raise DependencyDown(f"audit memory: {error.strerror}") from error

    def begin_anew(self, seen: Seen) -> None:
        """Remember `seen` instead of all that was; that is put into a file aside."""
        with self._locked():
            known = self._known()
            if known is not None:
                self._keep(known)
            if self.lost_path.exists():
                aside = self._folder / f"{self._stream}.accepted"
                with aside.open("ab") as file:
                    file.write(self.lost_path.read_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                self.lost_path.unlink()
            self._replace(seen)

    def _known(self) -> Seen | None:
        """Read; a file damaged by a power cut is put aside, and costs its memory."""
        try:
            return self.read()
        except InvalidParameter as error:
            log.error("%s", error, extra={"event": "audit.memory_damaged"})  # noqa: TRY400
            self._path.replace(self._path.with_suffix(".damaged"))
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(
            self._folder / f"{self._stream}.lock",
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
            0o600,
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _replace(self, seen: Seen) -> None:
        # Not synced: after a power cut an older memory is a true one still.
        partial = self._path.with_suffix(".partial")
        fd = os.open(
            partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(fd, "wb") as file:
            file.write(self._line(seen))
        partial.replace(self._path)

    def _keep(self, known: Seen) -> None:
        fd = os.open(
            self.lost_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(fd, "ab") as file:
            file.write(self._line(known))
            file.flush()
            os.fsync(file.fileno())

    def _line(self, seen: Seen) -> bytes:
        signature = self._sealer.anchor(
            self._stream, seen.sequence, seen.hash, seen.time_us
        )
        return orjson.dumps(
            {
                "sequence": seen.sequence,
                "hash": seen.hash.hex(),
                "time_us": seen.time_us,
                "mac": signature.hex(),
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )

    def _parsed(self, line: bytes) -> Seen:
        try:
            found = orjson.loads(line)
            seen = Seen(
                int(found["sequence"]),
                bytes.fromhex(found["hash"]),
                int(found["time_us"]),
            )
            signature = bytes.fromhex(found["mac"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidParameter("audit memory", f"{self._path}: damaged") from error
        wanted = self._sealer.anchor(
            self._stream, seen.sequence, seen.hash, seen.time_us
        )
        if signature != wanted:
            raise InvalidParameter(
                "audit memory", f"{self._path}: not signed with this folder's key"
            )
        return seen
