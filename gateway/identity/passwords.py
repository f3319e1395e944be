"""Hashing passwords: argon2id, few at a time, at one price for everybody."""

from __future__ import annotations

import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from gateway.identity.rules import MAX_PASSWORD
from storage.kernel.errors import Unavailable

#: Hashes a process computes at a time: each takes its memory and most of a core.
AT_A_TIME = 2
#: How long a login waits for its turn.
WAIT_SECONDS = 10.0


class Passwords:
    """Hash and verify passwords (RFC 9106).

    Parameters
    ----------
    memory_kib, passes : int
        Of new hashes; those of others are verified with their own.

    Attributes
    ----------
    n_computed : int
        Hashes computed so far, for whatever purpose.
    """

    def __init__(self, *, memory_kib: int, passes: int) -> None:
        self._hasher = PasswordHasher(
            time_cost=passes, memory_cost=memory_kib, parallelism=1
        )
        self._turns = threading.BoundedSemaphore(AT_A_TIME)
        self._nobody: str | None = None
        self._lock = threading.Lock()
        self.n_computed = 0

    def hash(self, password: str) -> str:
        """Return a salted hash.

        Raises
        ------
        Unavailable
            Too many logins at once.
        """
        self._take_turn()
        try:
            return self._hasher.hash(password[:MAX_PASSWORD])
        finally:
            self._turns.release()

    def verify(self, password_hash: str | None, password: str) -> bool:
        """Tell whether `password` is the hashed one.

        Without a hash (there is no such account) the same work is done for nothing.

        Raises
        ------
        Unavailable
        """
        wanted = password_hash or self._hash_of_nobody()
        self._take_turn()
        try:
            self._hasher.verify(wanted, password[:MAX_PASSWORD])
        except (VerificationError, InvalidHashError):
            return False
        finally:
            self._turns.release()
        return password_hash is not None

    def is_outdated(self, password_hash: str) -> bool:
        """Tell whether the hash was made with other parameters than those now."""
        try:
            return self._hasher.check_needs_rehash(password_hash)
        except InvalidHashError:
            return True

    def _hash_of_nobody(self) -> str:
        """Return a hash nobody knows the password of, made once."""
        with self._lock:
            if self._nobody is None:
                self._nobody = self._hasher.hash(secrets.token_urlsafe(32))
            return self._nobody

    def _take_turn(self) -> None:
        if not self._turns.acquire(timeout=WAIT_SECONDS):
            raise Unavailable("too many logins at once; try again")
        with self._lock:
            self.n_computed += 1
