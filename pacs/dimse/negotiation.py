"""What we accept of a proposed association (PS3.8 9.3.3, PS3.7 D.3.3).

Pure decisions: a parsed request in, the answer's items out. Whether the peer may
associate at all is for `pacs.services.policy` to say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from pacs.dimse.association import AcceptedContext
from pacs.dimse.command import CommandField
from pacs.dimse.pdu import (
    APPLICATION_CONTEXT,
    AbortReason,
    AssociateRequest,
    ContextResult,
    NegotiatedContext,
    ProposedContext,
    ProtocolError,
    encode_associate_rj,
)
from pacs.dimse.selection import GET_CLASSES, MOVE_CLASSES
from pacs.imaging import sopclasses, syntaxes
from storage.kernel.limits import MIB, Limits

_MODELS = "1.2.840.10008.5.1.4.1.2"
#: Query/Retrieve models by FIND class: PS3.4 C.6.1, C.6.2, C.6.3.
FIND_CLASSES: Final = {
    f"{_MODELS}.1.1": "PATIENT",
    f"{_MODELS}.2.1": "STUDY",
    f"{_MODELS}.3.1": "PATIENT_STUDY_ONLY",
}
STORAGE_COMMITMENT: Final = "1.2.840.10008.1.20.1"

_COMMANDS: Final[Mapping[str, CommandField]] = {
    sopclasses.VERIFICATION: CommandField.C_ECHO_RQ,
    STORAGE_COMMITMENT: CommandField.N_ACTION_RQ,
    **dict.fromkeys(FIND_CLASSES, CommandField.C_FIND_RQ),
    **dict.fromkeys(MOVE_CLASSES, CommandField.C_MOVE_RQ),
    **dict.fromkeys(GET_CLASSES, CommandField.C_GET_RQ),
}
#: Syntaxes of everything but storage: what messages are written in by hand.
_NATIVE: Final = frozenset(
    (syntaxes.IMPLICIT_VR_LE, syntaxes.EXPLICIT_VR_LE, syntaxes.EXPLICIT_VR_BE)
)

#: SOP Class Extended Negotiation, byte by byte. C-FIND: relational queries and fuzzy
#: matching of names, not combined date-time matching (PS3.4 C.5.1.1).
_FIND_EXTENDED: Final = bytes((1, 0, 1))
#: C-MOVE and C-GET: relational retrieval (PS3.4 C.5.2.1, C.5.3.1).
_RETRIEVE_EXTENDED: Final = bytes((1, 0))
#: Storage: level 2, digital signatures kept, no coercion (PS3.4 B.3.1).
_STORAGE_EXTENDED: Final = bytes((2, 0, 3, 0, 0, 0))

#: Below this a PDU cannot carry a command set in a sane number of fragments.
_MIN_PDU: Final = 128
_MAX_SEND: Final = MIB


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why there is no association: result, source and reason (PS3.8 9.3.4)."""

    result: int
    source: int
    reason: int
    words: str

    def encoded(self) -> bytes:
        """Return the A-ASSOCIATE-RJ."""
        return encode_associate_rj(self.result, self.source, self.reason)


NO_REASON: Final = Rejection(1, 1, 1, "no reason given")
APPLICATION_CONTEXT_NAME: Final = Rejection(1, 1, 2, "application context name")
CALLING_AE: Final = Rejection(1, 1, 3, "calling AE title not recognized")
CALLED_AE: Final = Rejection(1, 1, 7, "called AE title not recognized")
PROTOCOL_VERSION: Final = Rejection(1, 2, 2, "protocol version not supported")
CONGESTED: Final = Rejection(2, 3, 1, "temporary congestion")
LOCAL_LIMIT: Final = Rejection(2, 3, 2, "local limit exceeded")


@dataclass(frozen=True, slots=True)
class Agreement:
    """The items of an A-ASSOCIATE-AC, and what they mean for us."""

    results: tuple[NegotiatedContext, ...]
    contexts: Mapping[int, AcceptedContext]
    roles: Mapping[str, tuple[bool, bool]]
    extended: Mapping[str, bytes]
    max_send: int


def is_ae_title(title: str) -> bool:
    """Tell whether `title` is a legal AE value: visible, no backslash (PS3.5 6.2)."""
    return (
        0 < len(title) <= 16
        and title.isascii()
        and title.isprintable()
        and "\\" not in title
    )


def refuse_form(request: AssociateRequest) -> Rejection | None:
    """Return why a request is rejected for its form alone, or None."""
    if not request.protocol_version & 1:
        return PROTOCOL_VERSION
    if request.application_context not in {"", APPLICATION_CONTEXT.decode()}:
        return APPLICATION_CONTEXT_NAME
    if not is_ae_title(request.called_ae):
        return CALLED_AE
    if not is_ae_title(request.calling_ae):
        return CALLING_AE
    return None


def only_verifies(request: AssociateRequest) -> bool:
    """Tell whether nothing but C-ECHO is proposed: a monitor."""
    return all(
        context.abstract_syntax == sopclasses.VERIFICATION
        for context in request.contexts
    )


def negotiate(
    request: AssociateRequest, services: Collection[int], limits: Limits
) -> Agreement:
    """Answer every proposed context, role and extended item.

    Parameters
    ----------
    services : collection of int
        Command fields that have a handler; a service without one is not accepted.

    Raises
    ------
    ProtocolError
        The peer's maximum PDU length leaves no room for anything.
    """
    if 0 < request.max_length < _MIN_PDU:
        raise ProtocolError("maximum PDU length is too small to be used")
    results: list[NegotiatedContext] = []
    contexts: dict[int, AcceptedContext] = {}
    classes: set[str] = set()
    for proposed in request.contexts:
        result, syntax = _answer(proposed, services)
        results.append(NegotiatedContext(proposed.context_id, result, syntax))
        if result is not ContextResult.ACCEPTED:
            continue
        uid = proposed.abstract_syntax
        scu, scp = _roles(uid, request.roles.get(uid), services)
        classes.add(uid)
        contexts[proposed.context_id] = AcceptedContext(
            uid, syntax, as_scu=scp, as_scp=scu
        )
    return Agreement(
        tuple(results),
        contexts,
        {
            uid: _roles(uid, asked, services)
            for uid, asked in request.roles.items()
            if uid in classes
        },
        _extended(request.extended, classes),
        min(request.max_length or limits.pdu_bytes, _MAX_SEND),
    )


def _answer(
    proposed: ProposedContext, services: Collection[int]
) -> tuple[ContextResult, str]:
    """Choose the first proposed syntax that we can work with: the sender's order."""
    uid = proposed.abstract_syntax
    if uid in _COMMANDS:
        if _COMMANDS[uid] not in services:
            return ContextResult.ABSTRACT_SYNTAX, ""
        known = [one for one in proposed.transfer_syntaxes if one in _NATIVE]
    elif sopclasses.is_storage(uid) and CommandField.C_STORE_RQ in services:
        known = list(filter(syntaxes.is_known, proposed.transfer_syntaxes))
    else:
        return ContextResult.ABSTRACT_SYNTAX, ""
    if not known:
        return ContextResult.TRANSFER_SYNTAXES, ""
    return ContextResult.ACCEPTED, known[0]


def _roles(
    uid: str, asked: tuple[bool, bool] | None, services: Collection[int]
) -> tuple[bool, bool]:
    """Return the requestor's roles as SCU and SCP (PS3.7 D.3.3.4).

    Without an item it is the SCU. It may be the SCP where we send requests: C-STORE
    for its C-GET, and the results of storage commitment.
    """
    if asked is None:
        return True, False
    wants_scu, wants_scp = asked
    if uid == STORAGE_COMMITMENT:
        we_send = CommandField.N_EVENT_REPORT_RQ in services
    else:
        we_send = uid not in _COMMANDS and CommandField.C_GET_RQ in services
    return wants_scu, wants_scp and we_send


def _extended(asked: Mapping[str, bytes], classes: Collection[str]) -> dict[str, bytes]:
    """Answer with what is implemented, and no more bytes than were asked for."""
    answers = {}
    for uid, information in asked.items():
        if uid not in classes or not information:
            continue
        if uid in FIND_CLASSES:
            answers[uid] = _agreed(information, _FIND_EXTENDED, 7)
        elif uid in MOVE_CLASSES or uid in GET_CLASSES:
            answers[uid] = _agreed(information, _RETRIEVE_EXTENDED, 3)
        elif uid not in _COMMANDS:
            answers[uid] = _STORAGE_EXTENDED[: len(information)]
    return answers


def _agreed(asked: bytes, ours: bytes, most: int) -> bytes:
    """Return 1 for each byte that is asked for and implemented, else 0."""
    wanted = asked[:most]
    return bytes(
        one & known for one, known in zip(wanted, ours.ljust(most, b"\0"), strict=False)
    )


def abort_reason(first: int) -> AbortReason:
    """Return why a first PDU that is no A-ASSOCIATE-RQ aborts (PS3.8 Table 9-10)."""
    return (
        AbortReason.UNEXPECTED_PDU if 2 <= first <= 7 else AbortReason.UNRECOGNIZED_PDU
    )
