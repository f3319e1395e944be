"""What an audit record says, and how outside text is made fit to be recorded.

The content follows the DICOM Audit Trail Message (PS3.15 A.5): event (action,
outcome, time), active participant (actor, roles, network address), participant
objects (patient, study, query), and the purpose of use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

import orjson

from storage.kernel.types import DEFAULT_TENANT, TenantId

Scalar: TypeAlias = str | int | bool | None
#: Values of `AuditEvent.detail`: flat, so that its depth is bounded by its type.
Detail: TypeAlias = Mapping[str, Scalar | list[str]]


class Outcome(StrEnum):
    """How an access ended (PS3.15 A.5.1, Event Outcome Indicator)."""

    ALLOW = "allow"
    DENY = "deny"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One access, decision or change, before it has a place in the chain.

    Text may come from outside: it is cut to the length of its field and control
    characters are made visible when it is recorded; callers pass it as it came.

    Attributes
    ----------
    action : str
        What was asked: a value of the policy's actions, or a dotted name
        (``"login"``, ``"account.change"``); at most 40 characters.
    actor : str
        Account, AE title or service; as claimed when it could not be verified.
    outcome : Outcome
    tenant : TenantId
        Home tenant of the actor.
    roles : iterable of str
        Roles the actor had.
    session : str
        The login, ticket or token the actor came with; useless to log in with.
    source : str
        Network address; empty for the node itself.
    door : str
        By which way: ``web``, ``dimse``, ``cli``, ...
    reason : str
        Why it was refused or failed.
    object_kind : str
        ``study``, ``series``, ``instance``, ``query``, ``account``, ...
    object_tenant : str
        Whose object it is, where that is not the actor's home tenant.
    patient_id, study_uid, series_uid, instance_uid : str
        Patient ID (0010,0020) and the UIDs, as far as the access names them.
    object_id : str
        Identity of an object that has no UID: an account, a peer, a ticket.
    purpose : str
        Purpose of use: treatment, consent, break-glass, ...
    request_id : str
        The request it belongs to, for finding it in the logs.
    detail : Detail, optional
        What else matters: query keys, counts, formats. Flat; no pixel data and no
        secrets.
    before, after : bytes or None
        Digests of what was changed.
    time_us : int
        When, in microseconds since 1970; 0: now.
    """

    action: str
    actor: str
    outcome: Outcome = Outcome.ALLOW
    tenant: TenantId = DEFAULT_TENANT
    roles: Iterable[str] = ()
    session: str = ""
    source: str = ""
    door: str = ""
    reason: str = ""
    object_kind: str = ""
    object_tenant: str = ""
    patient_id: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_uid: str = ""
    object_id: str = ""
    purpose: str = ""
    request_id: str = ""
    detail: Detail | None = None
    before: bytes | None = None
    after: bytes | None = None
    time_us: int = 0


#: Characters kept of each field; longer text ends in `CUT`.
LENGTHS: Mapping[str, int] = MappingProxyType(
    {
        "outcome": 8,
        "tenant": 64,
        "actor": 128,
        "roles": 128,
        "session": 64,
        "source": 64,
        "door": 16,
        "action": 40,
        "reason": 256,
        "object_kind": 24,
        "object_tenant": 64,
        "patient_id": 64,
        "study_uid": 64,
        "series_uid": 64,
        "instance_uid": 64,
        "object_id": 128,
        "purpose": 64,
        "request_id": 64,
    }
)
CUT = "…"
#: Digests longer than this belong to no algorithm we know.
MAX_DIGEST_BYTES = 64

#: C0 controls and DEL become their pictures (U+2400 ...); what reorders or breaks
#: lines elsewhere, and what no encoding can carry, becomes U+FFFD.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20)},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys((0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF), 0xFFFD),
    **dict.fromkeys(range(0x202A, 0x202F), 0xFFFD),
    **dict.fromkeys(range(0x2066, 0x206A), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}


def clean(text: str, length: int) -> str:
    r"""Return outside text on one line, encodable, of at most `length` characters.

    Examples
    --------
    >>> clean("eve\n2026 root allow", 64)
    'eve␊2026 root allow'
    >>> clean("abcdef", 4)
    'abc…'
    """
    if len(text) > length:
        # Cut first: a megabyte costs no more than its beginning.
        text = text[: length - 1] + CUT
    return text if text.isprintable() else text.translate(_VISIBLE)


def plain(text: str) -> str:
    """Return the text itself: of members of enumerations drivers write the name."""
    return text if type(text) is str else str.__str__(text)


def detail_text(detail: Detail | None, allowed: int) -> str:
    """Return `detail` as a JSON object of at most `allowed` bytes in UTF-8.

    A longer one is replaced by its size and its beginning.

    Raises
    ------
    TypeError
        For values that `Detail` does not allow.
    """
    if not detail:
        return "{}"
    text = _dumped(
        {clean(key, 64): _fit(value, allowed) for key, value in detail.items()}
    )
    size = len(text.encode())
    if size <= allowed:
        return text
    # Half: every quote and backslash of the beginning is escaped once more.
    start = text.encode()[: max(0, allowed // 2 - 32)].decode(errors="ignore")
    return _dumped({"cut": size, "start": start})


def _dumped(value: Mapping[str, object]) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _fit(value: Scalar | list[str], allowed: int) -> Scalar | list[str]:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean(value, allowed)
    if isinstance(value, int):
        # JSON readers elsewhere lose larger numbers.
        return value if abs(value) < 1 << 53 else clean(f"{value:#x}", allowed)
    if isinstance(value, list | tuple):
        return list(_fitting(value, allowed))
    raise TypeError(f"detail: {type(value).__name__} is not text, number or list")


def _fitting(texts: Iterable[str], allowed: int) -> Iterator[str]:
    """Yield texts until `allowed` characters are used up; `CUT` for the rest."""
    for text in texts:
        if allowed <= 0:
            yield CUT
            return
        kept = clean(str(text), allowed)
        allowed -= len(kept) + 3
        yield kept
