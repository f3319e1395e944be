"""Frames of a whole series in one answer: the binary framing.

All numbers are little endian. The answer begins with a head of 16 bytes,

====== ===== =====================================================
offset bytes meaning
====== ===== =====================================================
0      8     ``HYFRAMES``
8      2     version, 1
10     2     0
12     4     length of the JSON object that follows
====== ===== =====================================================

the JSON object (``study``, ``series``, ``version``, ``order``, ``level``, ``form``,
``from``, ``frames``: how many there are in all, ``instances``: SOP Instance UIDs,
``syntaxes``: transfer syntax UIDs), and then one record for each frame: a head of 32
bytes and the frame.

====== ===== =====================================================
offset bytes meaning
====== ===== =====================================================
0      4     position in the order, from 0: ``from`` to go on there
4      4     instance: index into ``instances``
8      4     frame number, from 1
12     2     syntax: index into ``syntaxes``
14     2     flags: 1 failed, 2 reduced, 0x8000 end
16     4     rows
20     4     columns
24     8     length of what follows
====== ===== =====================================================

A frame that cannot be read is flagged as failed: what follows is its reason in UTF-8,
or zeros where its length had been announced. It is announced only for frames that do
not show beforehand that they fail, and a stream whose announced frames are out of all
proportion to what is stored is refused (``limits.stream_ratio``, ``stream_bytes``).
The last record has the flag end and no bytes; a stream without it was cut off.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Final

import orjson

from storage.kernel.errors import ImagingError
from viewer.sources import FramePlace, FrameSource, SeriesFrames

MEDIA_TYPE: Final = "application/vnd.huying.frames"
MAGIC: Final = b"HYFRAMES"
VERSION: Final = 1
HEAD: Final = struct.Struct("<8sHHI")
RECORD: Final = struct.Struct("<IIIHHIIQ")
FAILED: Final = 1
REDUCED: Final = 2
END: Final = 0x8000
#: Small pieces are joined up to this, so that each is worth a packet.
GATHER: Final = 256 * 1024
GATHER_SECONDS: Final = 0.25
_ZEROS: Final = bytes(64 * 1024)


def head(
    frames: SeriesFrames, *, form: str, order: str, level: int, start: int
) -> bytes:
    """Return the beginning of a stream."""
    described = orjson.dumps(
        {
            "study": frames.study,
            "series": frames.series,
            "version": frames.version,
            "form": form,
            "order": order,
            "level": level,
            "from": start,
            "frames": len(frames.places),
            "instances": list(frames.instances),
            "syntaxes": list(frames.syntaxes),
        }
    )
    return HEAD.pack(MAGIC, VERSION, 0, len(described)) + described


def total_length(frames: SeriesFrames, beginning: bytes, start: int) -> int | None:
    """Return the length of the stream in bytes, when every frame's is known."""
    total = len(beginning) + RECORD.size
    for place in frames.places[start:]:
        if place.length is None:
            return None
        total += RECORD.size + place.length
    return total


def stream(
    source: FrameSource, frames: SeriesFrames, beginning: bytes, start: int
) -> Iterator[bytes]:
    """Yield the stream from position `start`; a frame is read when its turn comes."""
    pending = bytearray(beginning)
    sent = time.monotonic()
    for position in range(start, len(frames.places)):
        for piece in _record(source, frames, position):
            pending += piece
            # In time too: who takes it may have left, which shows when it is sent.
            late = time.monotonic() - sent > GATHER_SECONDS
            if len(pending) >= GATHER or late:
                yield bytes(pending)
                pending.clear()
                sent = time.monotonic()
    pending += RECORD.pack(0xFFFFFFFF, 0, 0, 0, END, 0, 0, 0)
    yield bytes(pending)


def _record(
    source: FrameSource, frames: SeriesFrames, position: int
) -> Iterator[bytes]:
    place = frames.places[position]
    try:
        length, chunks = source.read(frames, position)
        # The first piece is where it fails, before the head says that it did not.
        first = next(chunks, b"")
    except ImagingError as error:
        yield from _failure(position, place, error)
        return
    if place.length is not None and length != place.length:
        wrong = ImagingError(f"{length} bytes, not {place.length}")
        yield from _failure(position, place, wrong)
        return
    yield _head(position, place, REDUCED if place.reduced else 0, length)
    sent = len(first)
    yield first
    for chunk in chunks:
        sent += len(chunk)
        yield chunk
    if sent != length:
        # Too late for a flag: the connection is all there is left to break.
        raise ImagingError("a frame ended early")


def _failure(position: int, place: FramePlace, error: ImagingError) -> Iterator[bytes]:
    reason = f"{error.code}: {error}".encode()[:1024]
    if place.length is None:
        yield _head(position, place, FAILED, len(reason)) + reason
        return
    yield _head(position, place, FAILED, place.length)
    left = place.length
    while left:
        yield _ZEROS[:left]
        left -= min(left, len(_ZEROS))


def _head(position: int, place: FramePlace, flags: int, length: int) -> bytes:
    return RECORD.pack(
        position,
        place.instance,
        place.frame_number,
        place.syntax,
        flags,
        place.rows,
        place.columns,
        length,
    )
