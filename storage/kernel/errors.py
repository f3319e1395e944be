"""Every exception this product raises on purpose.

* ImagingError
  + InvalidInput          the caller's data is wrong; do not retry
    - MalformedObject       bytes are not the DICOM/XML/JSON they claim to be
    - InvalidParameter      a query, path or configuration value is wrong
    - IdentityMismatch      UIDs or patients contradict each other
    - Unsupported           understood, but this SOP class, syntax or form is not
    - TooLarge              a named limit was exceeded
  + NotFound              nothing with that identity for this actor
  + Conflict              true now, may change: duplicate, hold, lost race
    - DuplicateInstance     the UID is taken by other content
    - NewerSchema           the index was written by a newer version
  + NotAllowed            the caller may not do this
    - NotAuthenticated      nobody has said who asks
    - TooManyAttempts       guessing is over for a while
  + Unavailable           our side is short of something; retry later
    - StorageFull           the free-space guard or the disk said no
    - DependencyDown        database, object store or peer does not answer
    - LostRace              a concurrent transaction won; doing it again can help
    - Cancelled             whoever asked has left
    - CorruptData           stored bytes are not the bytes that were stored

Branches say what the caller can do: fix the input, look elsewhere, wait, ask for
rights. Protocol codes are not chosen where an error is raised: `pacs.dimse.status`
and `gateway.http.problems` each hold one table from class to code.
"""

from __future__ import annotations


class ImagingError(Exception):
    """Base class; catch it only at a protocol boundary.

    Attributes
    ----------
    code : str
        Stable, dotted, lower-case name for logs, metrics and problem bodies.
    """

    code = "internal"


class InvalidInput(ImagingError):
    """The caller's data is wrong. Retrying unchanged cannot help."""

    code = "input.invalid"


class MalformedObject(InvalidInput):
    """Bytes are not the format they claim to be.

    Attributes
    ----------
    tag : int or None
        Where reading stopped, as 0xggggeeee, when an element is to blame.
    """

    code = "input.malformed"

    def __init__(self, message: str, tag: int | None = None) -> None:
        super().__init__(f"{message} at {format_tag(tag)}" if tag else message)
        self.tag = tag


class InvalidParameter(InvalidInput):
    """A named parameter is missing, out of range or of the wrong form."""

    code = "input.parameter"

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


class IdentityMismatch(InvalidInput):
    """Identifiers are missing, illegal, or contradict each other.

    Attributes
    ----------
    tag : int
        The attribute to blame, as 0xggggeeee.
    """

    code = "input.identity"

    def __init__(self, message: str, tag: int) -> None:
        super().__init__(f"{message} {format_tag(tag)}")
        self.tag = tag


class Unsupported(InvalidInput):
    """A SOP class, transfer syntax or form that is not handled."""

    code = "input.unsupported"


class UnsupportedSopClass(Unsupported):
    """The SOP class is not one this archive stores."""

    code = "input.unsupported_sop_class"


class UnsupportedTransferSyntax(Unsupported):
    """The transfer syntax is unknown, or cannot be converted as asked."""

    code = "input.unsupported_transfer_syntax"


class TooLarge(InvalidInput):
    """A named limit was exceeded.

    Attributes
    ----------
    limit : str
        Field of `storage.kernel.limits.Limits`.
    """

    code = "input.too_large"

    def __init__(self, limit: str, allowed: int) -> None:
        super().__init__(f"more than {allowed} ({limit})")
        self.limit = limit
        self.allowed = allowed


class NotFound(ImagingError):
    """Nothing with that identity exists for this actor."""

    code = "not_found"


class Gone(NotFound):
    """It was here and has been deleted while being read."""

    code = "gone"


class Conflict(ImagingError):
    """The request clashes with the present state of the archive."""

    code = "conflict"


class DuplicateInstance(Conflict):
    """An instance with this UID and other content is already stored."""

    code = "conflict.duplicate_instance"

    def __init__(self, sop_instance_uid: str, kept_digest: str) -> None:
        super().__init__("SOP Instance UID (0008,0018) is taken by other content")
        self.sop_instance_uid = sop_instance_uid
        self.kept_digest = kept_digest


class NewerSchema(Conflict):
    """The index has a revision this version does not know."""

    code = "conflict.newer_schema"


class NotAllowed(ImagingError):
    """The caller may not do this."""

    code = "not_allowed"


class NotAuthenticated(NotAllowed):
    """Nobody has said who asks."""

    code = "not_authenticated"


class CodeNeeded(NotAuthenticated):
    """The password is right; a code of the second factor is needed beside it."""

    code = "not_authenticated.code"


class TooManyAttempts(NotAllowed):
    """Attempts to log in are not looked at for a while.

    Attributes
    ----------
    retry_seconds : int
    """

    code = "not_allowed.attempts"

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"too many attempts; try again in {retry_seconds} seconds")
        self.retry_seconds = retry_seconds


class Unavailable(ImagingError):
    """Our side is short of something. Retrying later can help."""

    code = "unavailable"


class StorageFull(Unavailable):
    """Less free space than the guard keeps back."""

    code = "unavailable.storage_full"


class DependencyDown(Unavailable):
    """A database, object store or peer does not answer."""

    code = "unavailable.dependency"


class Cancelled(Unavailable):
    """Whoever asked has left."""

    code = "unavailable.cancelled"


class LostRace(Unavailable):
    """A concurrent transaction won. The same work, done again, can succeed."""

    code = "unavailable.lost_race"


class CorruptData(Unavailable):
    """Stored bytes fail their checksum; they are never served."""

    code = "unavailable.corrupt"


def format_tag(tag: int | None) -> str:
    """Return `tag` as ``(gggg,eeee)``.

    Examples
    --------
    >>> format_tag(0x00100020)
    '(0010,0020)'
    """
    if tag is None:
        return "(----,----)"
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
