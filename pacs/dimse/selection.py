"""What a C-GET or C-MOVE identifier selects (PS3.4 C.4.2.1.4, C.4.3.1.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.association import Association, Message
from pacs.dimse.identifier import Elements
from pacs.domain.matching import BY_TAG, LEVELS, UNIQUE_KEYS
from pacs.domain.study import Level, StoredInstance
from pacs.imaging import charset
from pacs.services.query import ROOTS
from pacs.services.retrieve import RetrieveService
from storage.kernel.errors import (
    IdentityMismatch,
    MalformedObject,
    TooLarge,
    UnsupportedSopClass,
)
from storage.kernel.limits import Limits

_Q = "1.2.840.10008.5.1.4.1.2"
MOVE_CLASSES: Mapping[str, str] = {
    f"{_Q}.1.2": "PATIENT",
    f"{_Q}.2.2": "STUDY",
    f"{_Q}.3.2": "PATIENT_STUDY_ONLY",
}
GET_CLASSES: Mapping[str, str] = {
    f"{_Q}.1.3": "PATIENT",
    f"{_Q}.2.3": "STUDY",
    f"{_Q}.3.3": "PATIENT_STUDY_ONLY",
}
_ROOT_OF = {**MOVE_CLASSES, **GET_CLASSES}

SPECIFIC_CHARACTER_SET = 0x00080005
PATIENT_ID = UNIQUE_KEYS[LEVELS[0]]
ISSUER = 0x00100021
QUERY_RETRIEVE_LEVEL = 0x00080052
MAX_UID = 64


@dataclass(frozen=True, slots=True)
class Selection:
    """Unique keys of a retrieve request, down to its level.

    Beside a Patient ID stands the Issuer of Patient ID, when one was given: without
    it the ID may name several patients.
    """

    level: Level
    keys: Mapping[int, tuple[str, ...]]


def selection(association: Association, message: Message, limits: Limits) -> Selection:
    """Read the identifier of a C-GET-RQ or C-MOVE-RQ.

    Raises
    ------
    IdentityMismatch
        A key is missing, has a wildcard or too many values; its `tag` is the
        Offending Element (0000,0901).
    MalformedObject, TooLarge, UnsupportedSopClass
    """
    context = association.contexts[message.context_id]
    class_uid = cmd.text(message.command, cmd.AFFECTED_CLASS)
    root = _ROOT_OF.get(class_uid)
    if root is None or class_uid != context.abstract_syntax:
        raise UnsupportedSopClass("not a retrieve service of this context")
    if not message.dataset:
        raise MalformedObject("the identifier is missing", QUERY_RETRIEVE_LEVEL)
    elements = identifier.read(message.dataset, context.transfer_syntax, limits)
    levels = ROOTS[root]
    name = identifier.text(elements, QUERY_RETRIEVE_LEVEL)
    level = next((one for one in levels if one == name), None)
    if level is None:
        raise IdentityMismatch("not a level of this root:", QUERY_RETRIEVE_LEVEL)
    # Extended negotiation, byte 1: relational-retrieval (PS3.4 C.5.2.1).
    relational = association.extended.get(class_uid, b"")[:1] == b"\x01"
    keys: dict[int, tuple[str, ...]] = {}
    for one in levels[: levels.index(level) + 1]:
        tag = UNIQUE_KEYS[one]
        values = _values(elements, tag, limits)
        if not values and relational and one != level:
            continue
        several = one == level and one is not LEVELS[0]
        if not values or (len(values) > 1 and not several):
            wanted = "values" if several else "a single value"
            raise IdentityMismatch(f"{BY_TAG[tag].keyword} needs {wanted}", tag)
        keys[tag] = values
    if PATIENT_ID in keys:
        issuers = _values(elements, ISSUER, limits)
        if len(issuers) > 1:
            raise IdentityMismatch("IssuerOfPatientID needs a single value", ISSUER)
        if issuers:
            keys[ISSUER] = issuers
    return Selection(level, keys)


def _values(elements: Elements, tag: int, limits: Limits) -> tuple[str, ...]:
    raw = elements.get(tag, b"")
    if isinstance(raw, list):
        raise IdentityMismatch("a sequence where a value belongs", tag)
    if tag in {PATIENT_ID, ISSUER}:
        declared = elements.get(SPECIFIC_CHARACTER_SET, b"")
        decoder = charset.decoder(declared if isinstance(declared, bytes) else b"")
        # A backslash cannot be part of an LO value; it would be a list.
        values = charset.split_values(decoder.decode(raw, "LO"))
    else:
        values = raw.decode("ascii", "replace").split("\\")
        values = [value.strip(" \0") for value in values]
        if any(len(value) > MAX_UID for value in values):
            raise IdentityMismatch("not a UID:", tag)
    values = [value for value in values if value]
    if len(values) > limits.uid_list:
        raise TooLarge("uid_list", limits.uid_list)
    if any("*" in value or "?" in value for value in values):
        raise IdentityMismatch("wildcards do not select:", tag)
    return tuple(dict.fromkeys(values))


def select(
    retrieve: RetrieveService, association: Association, wanted: Selection
) -> list[StoredInstance]:
    """Return the selected instances of the requestor's tenants.

    Raises
    ------
    TooLarge
        More sub-operations than the counters of the responses can hold; they are
        unsigned shorts.
    """
    found = retrieve.select(association.actor, wanted.level, wanted.keys)
    allowed = association.limits.move_instances
    if len(found) > allowed:
        raise TooLarge("move_instances", allowed)
    return found
