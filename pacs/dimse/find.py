"""C-FIND SCP: matches stream from the index to the peer (PS3.4 C.4.1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.association import Association, Message
from pacs.dimse.identifier import Elements
from pacs.dimse.matches import SPECIFIC_CHARACTER_SET, MatchWriter
from pacs.dimse.negotiation import FIND_CLASSES
from pacs.dimse.status import Status, comment_of, status_of
from pacs.domain.matching import (
    ATTRIBUTES,
    BY_TAG,
    REQUEST_ATTRIBUTES_SEQUENCE,
    REQUEST_KEYS,
    UNIQUE_KEYS,
    reaches,
)
from pacs.domain.study import Level
from pacs.imaging import charset, dictionary, syntaxes
from pacs.imaging.charset import Charset
from pacs.imaging.encoding import encoding_of
from pacs.services.policy import AccessPolicy, Action
from pacs.services.query import ROOTS, QueryService
from storage.kernel.errors import (
    IdentityMismatch,
    ImagingError,
    InvalidParameter,
    MalformedObject,
    TooLarge,
    UnsupportedSopClass,
)
from storage.kernel.limits import Limits

log = logging.getLogger(__name__)

QUERY_RETRIEVE_LEVEL: Final = 0x00080052
RETRIEVE_AE_TITLE: Final = 0x00080054
#: Elements of an identifier that say how to read it, and are no keys.
_CONTROL: Final = frozenset(
    (SPECIFIC_CHARACTER_SET, QUERY_RETRIEVE_LEVEL, RETRIEVE_AE_TITLE)
)
_TAG_OF: Final[Mapping[str, int]] = {
    "QueryRetrieveLevel": QUERY_RETRIEVE_LEVEL,
    **{found.keyword: found.tag for found in ATTRIBUTES},
}
#: Responses that go out together, and after which C-CANCEL is looked for.
_BATCH: Final = 50
#: Choices of the dictionary that depend on other attributes.
_UNDECIDED: Final = {
    dictionary.US_OR_SS: b"US",
    dictionary.OB_OR_OW: b"OW",
    dictionary.US_OR_OW: b"US",
}


@dataclass(frozen=True, slots=True)
class _Request:
    """A C-FIND identifier that has been read.

    Attributes
    ----------
    keys : mapping of int to str
        Text of each key, those of Request Attributes Sequence among them.
    sequence_keys : tuple of int
        Keys that were in the item of Request Attributes Sequence.
    sequences : tuple of int
        Tags of all sequences in the identifier.
    """

    level: Level
    keys: Mapping[int, str]
    sequence_keys: tuple[int, ...]
    sequences: tuple[int, ...]
    charset: Charset


@dataclass(frozen=True, slots=True)
class FindHandler:
    """Answer C-FIND-RQ of Patient Root, Study Root and Patient/Study Only.

    Each match is a pending response; those that have gathered go out together.
    """

    query: QueryService
    policy: AccessPolicy
    limits: Limits

    def __call__(self, association: Association, message: Message) -> None:
        context = association.contexts[message.context_id]
        class_uid = context.abstract_syntax
        agreed = association.extended.get(class_uid, b"").ljust(3, b"\0")
        try:
            self.policy.require(association.actor, Action.FIND)
            root = FIND_CLASSES.get(class_uid)
            if root is None or class_uid != cmd.text(
                message.command, cmd.AFFECTED_CLASS
            ):
                raise UnsupportedSopClass("not a query service of this context")
            request = read_request(
                message.dataset or b"", context.transfer_syntax, root, self.limits
            )
            association.accesses.searched(request.level, request.keys)
            matches = self.query.find(
                association.actor,
                request.level,
                request.keys,
                root=root,
                relational=bool(agreed[0]),
                fuzzy=bool(agreed[2]),
            )
        except ImagingError as error:
            self._refuse(association, message, error)
            return
        with closing(matches):
            try:
                status = self._stream(association, message, request, matches)
            except ImagingError as error:
                self._refuse(association, message, error)
                return
        association.send(message.context_id, cmd.response(message.command, status))

    def _stream(
        self,
        association: Association,
        message: Message,
        request: _Request,
        matches: Iterator[Mapping[int, str]],
    ) -> Status:
        """Send the matches; return how the operation ends."""
        pending, writer = self._answer(association, message, request)
        context_id = message.context_id
        message_id = cmd.number(message.command, cmd.MESSAGE_ID)
        for number, match in enumerate(matches, 1):
            association.post_encoded(context_id, pending, writer.write(match))
            if number % _BATCH == 0:
                association.flush()
                if association.cancelled(message_id):
                    return Status.CANCEL
                if association.stopping():
                    return Status.OUT_OF_RESOURCES
        if association.cancelled(message_id):
            return Status.CANCEL
        return Status.SUCCESS

    def _answer(
        self, association: Association, message: Message, request: _Request
    ) -> tuple[bytes, MatchWriter]:
        """Return the pending response's command, and what writes identifiers."""
        context = association.contexts[message.context_id]
        root = ROOTS[FIND_CLASSES[context.abstract_syntax]]
        level = request.level
        unique = [UNIQUE_KEYS[one] for one in root[: root.index(level) + 1]]
        own = set(request.keys) - set(request.sequence_keys)
        empty = set(request.sequences)
        sequence = None
        if request.sequence_keys:
            empty.discard(REQUEST_ATTRIBUTES_SEQUENCE)
            sequence = (
                REQUEST_ATTRIBUTES_SEQUENCE,
                {tag: _vr(tag) for tag in request.sequence_keys},
            )
        writer = MatchWriter(
            {
                **{tag: _vr(tag) for tag in (*own, *unique)},
                **dict.fromkeys(empty, b"SQ"),
                QUERY_RETRIEVE_LEVEL: b"CS",
                RETRIEVE_AE_TITLE: b"AE",
            },
            transfer_syntax_uid=context.transfer_syntax,
            terms=request.charset.terms,
            constants={
                QUERY_RETRIEVE_LEVEL: level,
                RETRIEVE_AE_TITLE: association.called_ae,
            },
            sequence=sequence,
        )
        known = self.query.supported(level)
        partial = bool(empty) or any(
            tag not in known or (_narrows(value) and not BY_TAG[tag].column)
            for tag, value in request.keys.items()
        )
        status = Status.PENDING_UNSUPPORTED_KEYS if partial else Status.PENDING
        response = cmd.response(message.command, status, has_dataset=True)
        return association.encoded(message.context_id, response), writer

    def _refuse(
        self, association: Association, message: Message, error: ImagingError
    ) -> None:
        """Send the failure, with the element to blame where there is one."""
        association.accesses.refused(Action.FIND, error)
        tag = getattr(error, "tag", None)
        if isinstance(error, InvalidParameter):
            tag = _TAG_OF.get(error.name, QUERY_RETRIEVE_LEVEL)
        status = _status(error)
        response = cmd.response(message.command, status)
        response[cmd.COMMENT] = comment_of(error)
        if tag:
            response[cmd.OFFENDING] = cmd.tags(tag)
        association.send(message.context_id, response)
        log.warning(
            "query refused",
            extra={
                "event": "dimse.find_refused",
                "peer": association.peer,
                "calling_ae": association.calling_ae,
                "status": f"{status:04X}",
                "reason": error.code,
                "tag": tag,
            },
        )


def read_request(
    raw: bytes, transfer_syntax_uid: str, root: str, limits: Limits
) -> _Request:
    """Read an identifier.

    Raises
    ------
    IdentityMismatch
        The level is missing or not one of `root`.
    MalformedObject, TooLarge
    """
    if not raw:
        raise IdentityMismatch("the identifier is missing", QUERY_RETRIEVE_LEVEL)
    elements = identifier.read(raw, transfer_syntax_uid, limits)
    name = identifier.text(elements, QUERY_RETRIEVE_LEVEL)
    level = next((one for one in ROOTS[root] if one == name), None)
    if level is None:
        raise IdentityMismatch("not a level of this root:", QUERY_RETRIEVE_LEVEL)
    declared = elements.get(SPECIFIC_CHARACTER_SET, b"")
    if isinstance(declared, list):
        raise MalformedObject(
            "a sequence where a value belongs", SPECIFIC_CHARACTER_SET
        )
    decoder = charset.decoder(declared)
    order = encoding_of(syntaxes.get(transfer_syntax_uid)).order
    keys: dict[int, str] = {}
    sequences = []
    sequence_keys: tuple[int, ...] = ()
    for tag, value in elements.items():
        if tag in _CONTROL or not tag & 0xFFFF:
            continue
        if not isinstance(value, list):
            keys[tag] = _text(tag, value, decoder, order)
            continue
        sequences.append(tag)
        if tag == REQUEST_ATTRIBUTES_SEQUENCE and value and reaches(level, tag):
            inner = _sequence_keys(value[0], decoder)
            sequence_keys = tuple(inner)
            keys.update(inner)
    return _Request(level, keys, sequence_keys, tuple(sequences), decoder)


def _sequence_keys(item: Elements, decoder: Charset) -> dict[int, str]:
    """Return the keys that are matched within Request Attributes Sequence."""
    return {
        tag: decoder.decode(value, _vr(tag).decode())
        for tag, value in item.items()
        if tag in REQUEST_KEYS and isinstance(value, bytes)
    }


def _text(tag: int, raw: bytes, decoder: Charset, order: str) -> str:
    """Return a key as text; Rows and its like are binary."""
    vr = _vr(tag)
    if vr == b"US":
        numbers = [
            int.from_bytes(
                raw[start : start + 2], "little" if order == "little" else "big"
            )
            for start in range(0, len(raw), 2)
        ]
        return "\\".join(map(str, numbers))
    return decoder.decode(raw, vr.decode())


def _vr(tag: int) -> bytes:
    known = BY_TAG.get(tag)
    if known is not None:
        return known.vr.encode()
    vr = dictionary.vr_of(tag)
    return _UNDECIDED.get(vr, vr)


def _narrows(value: str) -> bool:
    """Tell whether a key asks for more than to be returned."""
    return bool(value.strip(" \0*"))


def _status(error: ImagingError) -> Status:
    """Return the status of a failed C-FIND (PS3.4 C.4.1.1.4).

    A request that is too much is C001; too many matches are A700, after as many as
    are allowed.
    """
    if isinstance(error, TooLarge) and error.limit != "find_results":
        return Status.LIMIT_EXCEEDED
    return status_of(error)
