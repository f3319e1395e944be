"""One table from exception class to DIMSE status (PS3.4 B.2.3, C.4; PS3.7 Annex C)."""

from __future__ import annotations

from enum import IntEnum

from storage.kernel.errors import (
    Conflict,
    DuplicateInstance,
    IdentityMismatch,
    ImagingError,
    InvalidInput,
    InvalidParameter,
    MalformedObject,
    NotAllowed,
    NotFound,
    TooLarge,
    Unavailable,
    UnsupportedSopClass,
    UnsupportedTransferSyntax,
)


class Status(IntEnum):
    """Statuses this archive sends."""

    SUCCESS = 0x0000
    CANCEL = 0xFE00
    PENDING = 0xFF00
    PENDING_UNSUPPORTED_KEYS = 0xFF01
    COERCED = 0xB000
    MISMATCH_WARNING = 0xB007
    PROCESSING_FAILURE = 0x0110
    DUPLICATE_INSTANCE = 0x0111
    NO_SUCH_INSTANCE = 0x0112
    NO_SUCH_ARGUMENT = 0x0114
    INVALID_ARGUMENT = 0x0115
    INVALID_INSTANCE = 0x0117
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    NO_SUCH_ACTION = 0x0123
    NOT_AUTHORIZED = 0x0124
    DUPLICATE_TRANSACTION = 0x0131
    DUPLICATE_INVOCATION = 0x0210
    UNRECOGNIZED_OPERATION = 0x0211
    MISTYPED_ARGUMENT = 0x0212
    RESOURCE_LIMITATION = 0x0213
    OUT_OF_RESOURCES = 0xA700
    CANNOT_COUNT = 0xA701
    CANNOT_PERFORM = 0xA702
    MOVE_DESTINATION_UNKNOWN = 0xA801
    MISMATCH = 0xA900
    CANNOT_UNDERSTAND = 0xC000
    LIMIT_EXCEEDED = 0xC001


#: The first class that matches wins.
_TABLE: tuple[tuple[type[ImagingError], Status], ...] = (
    (DuplicateInstance, Status.DUPLICATE_INSTANCE),
    (UnsupportedSopClass, Status.SOP_CLASS_NOT_SUPPORTED),
    (UnsupportedTransferSyntax, Status.CANNOT_UNDERSTAND),
    (IdentityMismatch, Status.MISMATCH),
    (InvalidParameter, Status.MISMATCH),
    (TooLarge, Status.OUT_OF_RESOURCES),
    (MalformedObject, Status.CANNOT_UNDERSTAND),
    (InvalidInput, Status.CANNOT_UNDERSTAND),
    (NotAllowed, Status.NOT_AUTHORIZED),
    (NotFound, Status.NO_SUCH_INSTANCE),
    (Conflict, Status.PROCESSING_FAILURE),
    (Unavailable, Status.OUT_OF_RESOURCES),
)


def status_of(error: ImagingError) -> Status:
    """Return the status that answers `error`."""
    for kind, status in _TABLE:
        if isinstance(error, kind):
            return status
    return Status.PROCESSING_FAILURE


def comment_of(error: ImagingError) -> str:
    """Return Error Comment (0000,0902): at most 64 characters, no patient data."""
    return str(error).encode("ascii", "replace").decode()[:64]
