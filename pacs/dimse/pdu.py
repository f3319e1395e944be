"""Protocol data units of the DICOM upper layer (PS3.8 9.3).

Everything that arrives is parsed with its lengths checked against the PDU it came
in; what breaks a rule is a `ProtocolError`, answered with A-ABORT.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from storage.kernel.uids import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
)

APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
MAX_CONTEXTS = 128

HEADER = struct.Struct(">BxI")
PDV = struct.Struct(">IBB")
PDU_AND_PDV = struct.Struct(">BxIIBB")

COMMAND = 1
LAST = 2


class PduType(IntEnum):
    """PDU types (PS3.8 9.3.1)."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortReason(IntEnum):
    """Reasons of a provider's A-ABORT (PS3.8 9.3.8)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class ContextResult(IntEnum):
    """Result of one presentation context (PS3.8 9.3.3.2)."""

    ACCEPTED = 0
    USER_REJECTION = 1
    NO_REASON = 2
    ABSTRACT_SYNTAX = 3
    TRANSFER_SYNTAXES = 4


class ProtocolError(Exception):
    """The peer broke a rule of the upper layer; the association is aborted."""

    def __init__(
        self, message: str, reason: AbortReason = AbortReason.INVALID_PARAMETER
    ) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ProposedContext:
    """One proposed presentation context."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UserIdentity:
    """User Identity Negotiation (PS3.7 D.3.3.7); the secret never shows."""

    kind: int
    response_requested: bool
    primary: bytes = field(repr=False)
    secondary: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AssociateRequest:
    """A parsed A-ASSOCIATE-RQ."""

    called_ae: str
    calling_ae: str
    contexts: tuple[ProposedContext, ...]
    max_length: int = 0
    roles: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    extended: Mapping[str, bytes] = field(default_factory=dict)
    user_identity: UserIdentity | None = None
    protocol_version: int = 1
    application_context: str = APPLICATION_CONTEXT.decode()


@dataclass(frozen=True, slots=True)
class NegotiatedContext:
    """The answer to one proposed context."""

    context_id: int
    result: ContextResult
    transfer_syntax: str


@dataclass(frozen=True, slots=True)
class AssociateAccept:
    """A parsed A-ASSOCIATE-AC."""

    contexts: tuple[NegotiatedContext, ...]
    max_length: int
    roles: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)


def item(kind: int, body: bytes) -> bytes:
    """Return an item or sub-item with its two-byte length."""
    return struct.pack(">BxH", kind, len(body)) + body


def _items(body: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (type, start, end) of the items in ``body[start:end]``."""
    while start < end:
        if start + 4 > end:
            raise ProtocolError("an item header is cut off")
        kind, length = struct.unpack_from(">BxH", body, start)
        start += 4
        if start + length > end:
            raise ProtocolError("an item is longer than its PDU")
        yield kind, start, start + length
        start += length


def _uid(raw: bytes) -> str:
    return raw.decode("ascii", "replace").rstrip("\0 ")


def parse_associate_rq(body: bytes) -> AssociateRequest:
    """Parse the body of an A-ASSOCIATE-RQ (PS3.8 9.3.2).

    Raises
    ------
    ProtocolError
    """
    if len(body) < 68:
        raise ProtocolError("A-ASSOCIATE-RQ is too short")
    version, called, calling = struct.unpack_from(">H2x16s16s", body)
    contexts: list[ProposedContext] = []
    user: _UserInformation = _UserInformation()
    seen: set[int] = set()
    name = ""
    for kind, start, end in _items(body, 68, len(body)):
        if kind == 0x10:
            name = _uid(body[start:end])
        elif kind == 0x20:
            context = _parse_context(body, start, end)
            if context.context_id in seen or context.context_id % 2 == 0:
                raise ProtocolError("a presentation context id is even or used twice")
            seen.add(context.context_id)
            if len(contexts) >= MAX_CONTEXTS:
                raise ProtocolError("more than 128 presentation contexts")
            contexts.append(context)
        elif kind == 0x50:
            user = _parse_user_information(body, start, end)
    return AssociateRequest(
        called_ae=_ae(called),
        calling_ae=_ae(calling),
        contexts=tuple(contexts),
        max_length=user.max_length,
        roles=user.roles,
        extended=user.extended,
        user_identity=user.identity,
        protocol_version=version,
        application_context=name,
    )


def _ae(raw: bytes) -> str:
    return raw.decode("latin-1").strip(" ")


def _parse_context(body: bytes, start: int, end: int) -> ProposedContext:
    if start + 4 > end:
        raise ProtocolError("a presentation context is cut off")
    abstract = ""
    syntaxes: list[str] = []
    for kind, first, last in _items(body, start + 4, end):
        if kind == 0x30:
            abstract = _uid(body[first:last])
        elif kind == 0x40:
            syntaxes.append(_uid(body[first:last]))
    if not abstract or not syntaxes:
        raise ProtocolError("a presentation context lacks a syntax")
    return ProposedContext(body[start], abstract, tuple(syntaxes))


@dataclass(slots=True)
class _UserInformation:
    max_length: int = 0
    roles: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    extended: dict[str, bytes] = field(default_factory=dict)
    identity: UserIdentity | None = None


def _counted(body: bytes, start: int, end: int) -> tuple[bytes, int]:
    """Return a field with a two-byte length, and where it ends."""
    if start + 2 > end:
        raise ProtocolError("a sub-item is cut off")
    length = struct.unpack_from(">H", body, start)[0]
    start += 2
    if start + length > end:
        raise ProtocolError("a sub-item is cut off")
    return body[start : start + length], start + length


def _parse_user_information(body: bytes, start: int, end: int) -> _UserInformation:
    """Parse the user information item (PS3.7 D.3.3)."""
    user = _UserInformation()
    for kind, first, last in _items(body, start, end):
        if kind == 0x51:
            if last - first != 4:
                raise ProtocolError("maximum length sub-item is malformed")
            user.max_length = struct.unpack_from(">I", body, first)[0]
        elif kind == 0x54:
            uid, after = _counted(body, first, last)
            if after + 2 > last:
                raise ProtocolError("role selection is cut off")
            user.roles[_uid(uid)] = (bool(body[after]), bool(body[after + 1]))
        elif kind == 0x56:
            uid, after = _counted(body, first, last)
            user.extended[_uid(uid)] = body[after:last]
        elif kind == 0x58:
            if first + 2 > last:
                raise ProtocolError("user identity is cut off")
            primary, after = _counted(body, first + 2, last)
            secondary = b""
            if after < last:
                secondary, after = _counted(body, after, last)
            user.identity = UserIdentity(
                body[first], bool(body[first + 1]), primary, secondary
            )
    return user


def _user_information(
    max_length: int,
    roles: Mapping[str, tuple[bool, bool]],
    extended: Mapping[str, bytes],
    *extra: bytes,
) -> bytes:
    body = item(0x51, struct.pack(">I", max_length))
    body += item(0x52, IMPLEMENTATION_CLASS_UID.encode())
    for uid, (scu, scp) in roles.items():
        raw = uid.encode()
        body += item(0x54, struct.pack(">H", len(raw)) + raw + bytes((scu, scp)))
    body += item(0x55, IMPLEMENTATION_VERSION_NAME.encode())
    for uid, information in extended.items():
        raw = uid.encode()
        body += item(0x56, struct.pack(">H", len(raw)) + raw + information)
    return item(0x50, body + b"".join(extra))


def encode_associate_ac(
    request_body: bytes,
    contexts: Iterable[NegotiatedContext],
    *,
    max_length: int,
    roles: Mapping[str, tuple[bool, bool]],
    extended: Mapping[str, bytes],
    identity_response: bytes | None = None,
) -> bytes:
    """Return an A-ASSOCIATE-AC; AE titles are echoed from the request (PS3.8 9.3.3)."""
    body = struct.pack(">HH", 1, 0) + request_body[4:68]
    body += item(0x10, APPLICATION_CONTEXT)
    for context in contexts:
        syntax = context.transfer_syntax or "1.2.840.10008.1.2"
        body += item(
            0x21,
            bytes((context.context_id, 0, context.result, 0))
            + item(0x40, syntax.encode("ascii", "replace")),
        )
    extra = (
        (item(0x59, struct.pack(">H", len(identity_response)) + identity_response),)
        if identity_response is not None
        else ()
    )
    body += _user_information(max_length, roles, extended, *extra)
    return HEADER.pack(PduType.ASSOCIATE_AC, len(body)) + body


def encode_associate_rq(
    *,
    called_ae: str,
    calling_ae: str,
    contexts: Sequence[ProposedContext],
    max_length: int,
    roles: Mapping[str, tuple[bool, bool]] | None = None,
) -> bytes:
    """Return an A-ASSOCIATE-RQ (PS3.8 9.3.2)."""
    body = struct.pack(
        ">HH16s16s32x",
        1,
        0,
        called_ae.encode("latin-1").ljust(16),
        calling_ae.encode("latin-1").ljust(16),
    )
    body += item(0x10, APPLICATION_CONTEXT)
    for context in contexts:
        syntaxes = b"".join(
            item(0x40, uid.encode()) for uid in context.transfer_syntaxes
        )
        body += item(
            0x20,
            bytes((context.context_id, 0, 0, 0))
            + item(0x30, context.abstract_syntax.encode())
            + syntaxes,
        )
    body += _user_information(max_length, roles or {}, {})
    return HEADER.pack(PduType.ASSOCIATE_RQ, len(body)) + body


def parse_associate_ac(body: bytes) -> AssociateAccept:
    """Parse the body of an A-ASSOCIATE-AC."""
    if len(body) < 68:
        raise ProtocolError("A-ASSOCIATE-AC is too short")
    contexts = []
    user = _UserInformation()
    for kind, start, end in _items(body, 68, len(body)):
        if kind == 0x21:
            if start + 4 > end:
                raise ProtocolError("a presentation context is cut off")
            syntax = ""
            for inner, first, last in _items(body, start + 4, end):
                if inner == 0x40:
                    syntax = _uid(body[first:last])
            result = body[start + 2]
            contexts.append(
                NegotiatedContext(
                    body[start],
                    ContextResult(result) if result < 5 else ContextResult.NO_REASON,
                    syntax,
                )
            )
        elif kind == 0x50:
            user = _parse_user_information(body, start, end)
    return AssociateAccept(tuple(contexts), user.max_length, user.roles)


def encode_associate_rj(result: int, source: int, reason: int) -> bytes:
    """Return an A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
    return HEADER.pack(PduType.ASSOCIATE_RJ, 4) + bytes((0, result, source, reason))


def encode_abort(reason: AbortReason, source: int = 2) -> bytes:
    """Return an A-ABORT; source 2 is the provider (PS3.8 9.3.8)."""
    return HEADER.pack(PduType.ABORT, 4) + bytes((0, 0, source, reason))


RELEASE_RQ = HEADER.pack(PduType.RELEASE_RQ, 4) + bytes(4)
RELEASE_RP = HEADER.pack(PduType.RELEASE_RP, 4) + bytes(4)


def data_pdus(
    context_id: int, flags: int, data: bytes | memoryview, max_pdu: int, *, last: bool
) -> Iterator[bytes | memoryview]:
    """Yield header and fragment buffers of P-DATA-TF PDUs, one PDV each.

    Parameters
    ----------
    flags : int
        `COMMAND` or 0.
    max_pdu : int
        The peer's maximum length; fragments are even (PS3.8 Annex E).
    last : bool
        Whether `data` ends the command or data set.
    """
    step = max(2, (max_pdu - 6) & ~1)
    view = memoryview(data)
    size = len(view)
    start = 0
    while True:
        end = min(start + step, size)
        final = last and end == size
        yield PDU_AND_PDV.pack(
            PduType.DATA,
            end - start + 6,
            end - start + 2,
            context_id,
            flags | (LAST if final else 0),
        )
        yield view[start:end]
        start = end
        if start >= size:
            return
