"""Rules of identity, without a database: names, passwords, codes, locks, roles."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache

import pyotp

from pacs.services.permissions import ALONE, GRANTABLE, SEPARATE
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Role

MAX_NAME = 64
#: argon2 takes any length; nobody types more, and a megabyte would cost us.
MAX_PASSWORD = 256
#: A name for logging in: no spaces, nothing that looks like another name.
_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}\Z")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
#: Steps of TOTP (RFC 6238) before and after the present one whose codes are taken.
TOTP_WINDOW = 1
TOTP_SECONDS = 30
#: Passwords so common that they are refused, by rank (compliance A-02).
COMMON = 10_000
TOKEN_BYTES = 32


def account_name(text: str) -> str:
    """Return `text` as accounts are named.

    Raises
    ------
    InvalidParameter
    """
    name = text.strip().lower()
    if not _NAME.match(name):
        raise InvalidParameter(
            "name", "1 to 64 of a-z, 0-9, '.', '_', '-', '@', beginning with a-z or 0-9"
        )
    return name


def claimed_name(text: str) -> str:
    """Return what somebody gave as a name, in the form that names are compared in."""
    # No text column of PostgreSQL takes a NUL; and no account has one.
    shown = text[:MAX_NAME].replace("\0", "\ufffd")
    return unicodedata.normalize("NFKC", shown).strip().lower()


def tenant_name(text: str) -> str:
    """Return `text` as tenants are named.

    Raises
    ------
    InvalidParameter
    """
    if not _TENANT.match(text):
        raise InvalidParameter("tenant", "a short name of letters, digits, . _ -")
    return text


def roles_of(names: Iterable[str]) -> frozenset[Role]:
    """Return roles that one account or token may have together.

    Raises
    ------
    InvalidParameter
        No such role, or roles that must not be in one hand.
    """
    known = {role.value: role for role in GRANTABLE}
    found = set()
    for name in names:
        if name not in known:
            raise InvalidParameter(
                "roles", f"no such role: {name[:40]}; one of {', '.join(known)}"
            )
        found.add(known[name])
    if not found:
        raise InvalidParameter("roles", "at least one")
    if len(found & SEPARATE) > 1:
        together = ", ".join(sorted(found & SEPARATE))
        raise InvalidParameter("roles", f"not in one hand: {together}")
    for role in ALONE & found:
        if len(found) > 1:
            raise InvalidParameter("roles", f"{role} goes with no other role")
    return frozenset(found)


class WeakPassword(InvalidParameter):
    """A password breaks a rule.

    Attributes
    ----------
    rule : str
        ``short``, ``long``, ``classes``, ``name``, ``common`` or ``used``. It ends
        the code, so that pages can say it in their own language.
    """

    code = "input.password"

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__("password", detail)
        self.rule = rule
        self.code = f"input.password.{rule}"


@dataclass(frozen=True, slots=True)
class PasswordRule:
    """What a password must be (compliance A-02).

    Attributes
    ----------
    min_length : int
        Characters.
    """

    min_length: int = 10

    def check(self, password: str, name: str) -> None:
        """Refuse a password that is too easy to guess.

        Raises
        ------
        WeakPassword
            Says what is missing, never the password.
        """
        if len(password) < self.min_length:
            raise WeakPassword("short", f"at least {self.min_length} characters")
        if len(password) > MAX_PASSWORD:
            raise WeakPassword("long", f"at most {MAX_PASSWORD} characters")
        if _classes(password) < 3:
            raise WeakPassword(
                "classes", "three of: small letters, capital letters, digits, others"
            )
        lowered = password.lower()
        if name and name in lowered:
            raise WeakPassword("name", "must not contain the account's name")
        letters = lowered.strip(string.digits + string.punctuation + " ")
        if lowered in _common() or letters in _common() or len(set(lowered)) < 5:
            raise WeakPassword("common", "too common")


def _classes(password: str) -> int:
    """Return how many classes of characters there are; other scripts are the fourth."""
    return sum(
        (
            any("a" <= one <= "z" for one in password),
            any("A" <= one <= "Z" for one in password),
            any("0" <= one <= "9" for one in password),
            any(not (one.isascii() and one.isalnum()) for one in password),
        )
    )


@cache
def _common() -> frozenset[str]:
    from zxcvbn.frequency_lists import (  # type: ignore[import-untyped]  # a plain list
        FREQUENCY_LISTS,
    )

    ranked: list[str] = FREQUENCY_LISTS["passwords"]
    # Short ones are parts of good passwords too.
    return frozenset(one for one in ranked[:COMMON] if len(one) >= 5)


def one_time_password() -> str:
    """Return a random password that keeps the rule and is easy to type: 95 bits."""
    alphabet = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
    while True:
        groups = ["".join(secrets.choice(alphabet) for _ in range(4)) for _ in range(4)]
        made = "-".join(groups)
        if _classes(made) == 4:
            return made


def new_secret() -> str:
    """Return a secret for a cookie, a token or a ticket: 256 bits, URL-safe."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def digest_of(secret: str) -> bytes:
    """Return what is kept of a secret of `new_secret`."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def new_totp_secret() -> str:
    """Return a secret for authenticator applications, base32, 160 bits."""
    return pyotp.random_base32()


def totp_uri(secret: str, name: str, issuer: str) -> str:
    """Return the address that sets an authenticator application up."""
    return pyotp.TOTP(secret).provisioning_uri(name=name, issuer_name=issuer)


def totp_step(secret: str, code: str, now_us: int, last_step: int) -> int | None:
    """Return the time step that `code` belongs to; None: it is not good.

    A step is good once: those up to `last_step` are over (RFC 6238 5.2).
    """
    code = code.strip().replace(" ", "")
    if not (len(code) == 6 and code.isascii() and code.isdigit()):
        return None
    totp = pyotp.TOTP(secret)
    present = now_us // (TOTP_SECONDS * 1_000_000)
    for step in range(max(present - TOTP_WINDOW, 0), present + TOTP_WINDOW + 1):
        is_right = secrets.compare_digest(totp.generate_otp(step), code)
        if is_right and step > last_step:
            return step
    return None


@dataclass(frozen=True, slots=True)
class LockRule:
    """When attempts to log in are no longer listened to (compliance A-03).

    Attributes
    ----------
    account_failures, address_failures : int
        Failures in a row for one name, from one address.
    seconds : float
        How long the lock lasts, and how long failures are remembered.
    """

    account_failures: int = 5
    address_failures: int = 20
    seconds: float = 900.0

    def limit(self, subject: str) -> int:
        """Return how many failures `subject` may have."""
        if subject.startswith("address:"):
            return self.address_failures
        return self.account_failures


def lock_subjects(name: str, address: str) -> tuple[str, ...]:
    """Return what failures are counted by.

    Names are digested: what people type by mistake may be their password.
    """
    digest = hashlib.sha256(claimed_name(name).encode("utf-8", "replace")).hexdigest()
    return (f"account:{digest[:40]}", f"address:{address[:64]}")


def needs_second_factor(roles: Collection[Role], demanded: Collection[str]) -> bool:
    """Tell whether one of `roles` is among those that need two factors (A-04)."""
    return any(role.value in demanded for role in roles)
