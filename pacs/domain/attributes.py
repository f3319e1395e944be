"""Reading attributes of the DICOM JSON model (PS3.18 Annex F), bad values included.

What is absent, empty or of the wrong form reads as absent: callers decide what that
means for them, and no value of a stored object can raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

#: Attributes of one data set or item: ``"00280010": {"vr": "US", "Value": [512]}``.
Attributes = Mapping[str, Any]


def values(attributes: Attributes, tag: str) -> list[Any]:
    """Return the values of an element; empty without."""
    element = attributes.get(tag)
    if not isinstance(element, Mapping):
        return []
    found = element.get("Value")
    return found if isinstance(found, list) else []


def text(attributes: Attributes, tag: str) -> str:
    """Return the first value as text; of a person's name the alphabetic group."""
    for value in values(attributes, tag):
        if isinstance(value, Mapping):
            name = value.get("Alphabetic") or value.get("Ideographic") or ""
            return str(name)
        return "" if value is None else str(value)
    return ""


def texts(attributes: Attributes, tag: str) -> list[str]:
    """Return all values as text."""
    return ["" if one is None else str(one) for one in values(attributes, tag)]


def numbers(attributes: Attributes, tag: str, count: int = 0) -> list[float] | None:
    """Return all values as finite numbers, or None.

    Parameters
    ----------
    count : int
        So many values there must be; 0: at least one.
    """
    found: list[float] = []
    for value in values(attributes, tag):
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        if not math.isfinite(number):
            return None
        found.append(number)
    if not found or (count and len(found) != count):
        return None
    return found


def number(attributes: Attributes, tag: str) -> float | None:
    """Return the first value as a finite number, or None."""
    found = numbers(attributes, tag)
    return found[0] if found else None


def whole(attributes: Attributes, tag: str) -> int | None:
    """Return the first value as a whole number, or None."""
    found = number(attributes, tag)
    return int(found) if found is not None and found == int(found) else None


def items(attributes: Attributes, tag: str) -> Iterator[Attributes]:
    """Yield the items of a sequence."""
    for value in values(attributes, tag):
        if isinstance(value, Mapping):
            yield value


def item(attributes: Attributes, tag: str) -> Attributes:
    """Return the first item of a sequence; empty without."""
    return next(items(attributes, tag), {})


def reference(attributes: Attributes, tag: str) -> str:
    """Return the path of a value that is given by reference; empty without."""
    element = attributes.get(tag)
    uri = element.get("BulkDataURI") if isinstance(element, Mapping) else None
    return uri.rpartition("/bulkdata/")[2] if isinstance(uri, str) else ""


def code(attributes: Attributes) -> dict[str, str] | None:
    """Return an item of a code sequence as value, scheme and meaning; None without.

    Long Code Value and URN Code Value stand in for Code Value (PS3.3 8.1).
    """
    value = (
        text(attributes, "00080100")
        or text(attributes, "00080119")
        or text(attributes, "00080120")
    )
    meaning = text(attributes, "00080104")
    if not value and not meaning:
        return None
    return {
        "value": value,
        "scheme": text(attributes, "00080102"),
        "meaning": meaning,
    }
