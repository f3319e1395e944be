"""Cursors: places in an order, as opaque tokens that clients hand back."""

from __future__ import annotations

import base64
import binascii
from zlib import crc32

import orjson

from pacs.repository.search import After, Selection
from storage.kernel.errors import InvalidParameter

MAX_CHARS = 4096


def encode(after: After, selection: Selection) -> str:
    """Return a place in the order of a selection as a token."""
    values = [_mark(selection), after.phase, *after.values]
    return base64.urlsafe_b64encode(orjson.dumps(values)).decode().rstrip("=")


def decode(token: str, selection: Selection) -> After:
    """Return the place a token stands for.

    Raises
    ------
    InvalidParameter
        It is not one of ours, or of another level or order.
    """
    refused = InvalidParameter("cursor", "is not one that was given out")
    try:
        if len(token) > MAX_CHARS:
            raise refused
        padded = token + "=" * (-len(token) % 4)
        mark, phase, *values = orjson.loads(
            base64.b64decode(padded, b"-_", validate=True)
        )
    except (ValueError, TypeError, binascii.Error) as error:
        raise refused from error
    if type(phase) is not int or phase not in {0, 1}:
        raise refused
    if mark != _mark(selection):
        raise InvalidParameter("cursor", "is not of this search")
    return After(phase, tuple(values))


def _mark(selection: Selection) -> int:
    """Return what tells the places of one order from those of others."""
    order = selection.effective_order
    named = (selection.level.value, order.columns, order.descending)
    return crc32(repr(named).encode())
