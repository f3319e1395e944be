"""DICOM unique identifiers: check them, and make our own."""

from __future__ import annotations

import re
import uuid
from functools import lru_cache

#: Our implementation. Made from a UUID (PS3.5 B.2); fixed for all versions.
IMPLEMENTATION_CLASS_UID = "2.25.207653116520310884106390113370927046421"
IMPLEMENTATION_VERSION_NAME = "HUYING_0_1"

_UID = re.compile(r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))*\Z")


def is_uid(value: str) -> bool:
    """Tell whether `value` is a legal UID (PS3.5 9.1): 1 to 64 characters,
    dotted decimal components without leading zeros.

    Examples
    --------
    >>> is_uid("1.2.840.10008.1.1"), is_uid("1.02"), is_uid("../etc"), is_uid("")
    (True, False, False, False)
    """
    # Order matters: nothing long is ever remembered.
    return len(value) <= 64 and _is_uid(value)


@lru_cache(maxsize=4096)
def _is_uid(value: str) -> bool:
    return _UID.match(value) is not None


def new_uid() -> str:
    """Return a new UID under 2.25 (PS3.5 B.2), at most 44 characters."""
    return f"2.25.{uuid.uuid4().int}"
