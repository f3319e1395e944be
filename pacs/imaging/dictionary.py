"""Which VR a tag has when the data set does not say (PS3.6 chapter 6).

A compact table from tag to VR, made once from pydicom's dictionary when the first
implicit VR data set or the first UN element needs it.
"""

from __future__ import annotations

from functools import cache

UNKNOWN = b"UN"

#: Choices that the dictionary leaves to other attributes (PS3.5 A.1, A.2).
US_OR_SS = b"xs"
OB_OR_OW = b"ox"
US_OR_OW = b"lt"

_CHOICES = {
    "US or SS": US_OR_SS,
    "US or SS or OW": US_OR_OW,
    "US or OW": US_OR_OW,
    "OB or OW": OB_OR_OW,
    "NONE": UNKNOWN,
}


@cache
def standard_vrs() -> dict[int, bytes]:
    """Return the VR of each tag of the standard; choices as the constants above."""
    from pydicom._dicom_dict import DicomDictionary

    return {
        tag: _CHOICES.get(entry[0]) or entry[0].encode()
        for tag, entry in DicomDictionary.items()
    }


@cache
def _repeating() -> tuple[tuple[int, int, bytes], ...]:
    """Return (mask, tag under the mask, VR) of repeating groups (50xx, 60xx)."""
    from pydicom._dicom_dict import RepeatersDictionary

    rows = []
    for pattern, entry in RepeatersDictionary.items():
        mask = int("".join("0" if char == "x" else "F" for char in pattern), 16)
        tag = int(pattern.replace("x", "0"), 16)
        rows.append((mask, tag, _CHOICES.get(entry[0]) or entry[0].encode()))
    return tuple(rows)


@cache
def sequence_tags() -> frozenset[int]:
    """Return the standard's tags with VR SQ."""
    return frozenset(tag for tag, vr in standard_vrs().items() if vr == b"SQ")


def vr_of(tag: int) -> bytes:
    """Return the VR of `tag`: a choice constant where it depends, ``UN`` if unknown.

    Examples
    --------
    >>> vr_of(0x00100010), vr_of(0x60003000), vr_of(0x00091010), vr_of(0x00090010)
    (b'PN', b'ox', b'UN', b'LO')
    """
    known = standard_vrs().get(tag)
    if known is not None:
        return known
    if not tag & 0xFFFF:
        return b"UL"
    if tag >> 16 & 1:
        # PS3.5 7.8.1: Private Creator elements.
        return b"LO" if 0x10 <= tag & 0xFFFF <= 0xFF else UNKNOWN
    for mask, pattern, vr in _repeating():
        if tag & mask == pattern:
            return vr
    return UNKNOWN
