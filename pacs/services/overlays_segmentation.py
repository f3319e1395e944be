"""Segmentations as masks per source image (PS3.3 C.8.20), of all three types.

Frames are read a few at a time, decoded and packed into runs in bounded processes. A
frame belongs to the image that it says it was derived from; when it names none, or
many, to the image whose pixels are where its own are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pacs.domain.attributes import (
    Attributes,
    code,
    item,
    items,
    numbers,
    text,
    whole,
)
from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.rendering.volume import Plane
from pacs.rendering.volume_attributes import planes_of
from pacs.services.overlays_budget import Budget, described
from pacs.services.overlays_planes import ImagePlanes
from pacs.services.retrieve import RetrieveService
from storage.kernel.errors import NotFound, Unsupported

#: Bytes of frames that one process packs at a time.
BATCH: Final = 8 * 1024 * 1024
#: Segments of one object that are described.
MAX_SEGMENTS: Final = 65_535

#: Packs frames as runs: ``volume_masks.pack`` in a process.
Pack = Callable[[Mapping[str, Any], bytes], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a frame of a segmentation shows."""

    number: int
    segment: int
    image: str
    frame: int
    plane: Plane | None


def read(
    stored: StoredInstance,
    attributes: Attributes,
    retrieve: RetrieveService,
    pack: Pack,
    planes: ImagePlanes,
    budget: Budget,
) -> dict[str, Any]:
    """Return a segmentation as a layer.

    Raises
    ------
    InvalidInput, NotFound, Unavailable
        Its frames cannot be read.
    """
    kind = text(attributes, "00620001").lower() or "binary"
    if kind not in {"binary", "fractional", "labelmap"}:
        raise Unsupported("unknown Segmentation Type (0062,0001)")
    frames = _frames(stored, attributes, planes)
    layer: dict[str, Any] = {
        "kind": "seg",
        "type": kind,
        "rows": stored.rows,
        "columns": stored.columns,
        **described(
            label=text(attributes, "00700080"),
            description=text(attributes, "00700081"),
            maximum=whole(attributes, "0062000E") if kind == "fractional" else None,
            fraction=text(attributes, "00620010").lower(),
        ),
        "segments": _segments(attributes),
        "masks": [],
    }
    masks: list[dict[str, Any]] = layer["masks"]
    for some, packed in _packed(stored, attributes, kind, frames, retrieve, pack):
        for frame, found in zip(some, packed, strict=True):
            for label, mask in found.items():
                if not mask["pixels"]:
                    continue
                if not budget.take_mask(len(mask["runs"]) // 2):
                    return layer
                segment = frame.segment if label == "0" else int(label)
                masks.append(_mask(segment, frame, mask, budget))
    return layer


def _mask(
    segment: int, frame: _Frame, mask: dict[str, Any], budget: Budget
) -> dict[str, Any]:
    if mask.pop("truncated", False):
        budget.truncated = True
    placed: dict[str, Any] = {}
    if frame.image:
        placed = {"image": frame.image, "frame": frame.frame}
    if frame.plane is not None:
        placed |= {
            "position": frame.plane.position,
            "orientation": (*frame.plane.right, *frame.plane.down),
            "spacing": frame.plane.spacing,
        }
    return {"segment": segment, "source_frame": frame.number, **placed, **mask}


def _segments(attributes: Attributes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for one in items(attributes, "00620002"):
        if len(found) >= MAX_SEGMENTS:
            break
        found.append(
            {
                "number": whole(one, "00620004"),
                **described(
                    label=text(one, "00620005"),
                    description=text(one, "00620006"),
                    category=code(item(one, "00620003")),
                    type=code(item(one, "0062000F")),
                    regions=[
                        region
                        for region in map(code, items(one, "00082218"))
                        if region is not None
                    ],
                    algorithm=text(one, "00620008"),
                    algorithm_name=text(one, "00620009"),
                    lab=numbers(one, "0062000D", 3),
                    tracking_id=text(one, "00620020"),
                    tracking_uid=text(one, "00620021"),
                ),
            }
        )
    return found


def _frames(
    stored: StoredInstance, attributes: Attributes, planes: ImagePlanes
) -> list[_Frame]:
    shared = item(attributes, "52009229")
    per_frame = list(items(attributes, "52009230"))
    placed = {plane.frame_number: plane for plane in planes_of(attributes)}
    frame_of_reference = text(attributes, "00200052")
    found = []
    # Bound: as many as there are items; what Number of Frames claims costs nothing.
    if (stored.number_of_frames or 1) != max(1, len(per_frame)):
        raise Unsupported("not as many functional groups as frames")
    for number, own in enumerate(per_frame or [{}], start=1):
        segment = whole(item(own, "0062000A") or item(shared, "0062000A"), "0062000B")
        image, frame = _derived_from(own)
        plane = placed.get(number)
        if not image and plane is not None:
            match = planes.matching(plane, frame_of_reference)
            if match is not None:
                image, frame = match.instance, match.frame
        found.append(_Frame(number, segment or 0, image, frame, plane))
    return found


def _derived_from(own: Attributes) -> tuple[str, int]:
    """Return the one image that a frame was derived from; empty: none, or several."""
    sources = [
        source
        for derivation in items(own, "00089124")
        for source in items(derivation, "00082112")
    ]
    if len(sources) != 1:
        return "", 1
    frames = numbers(sources[0], "00081160") or [1.0]
    if len(frames) != 1:
        return "", 1
    return text(sources[0], "00081155"), int(frames[0])


def _packed(
    stored: StoredInstance,
    attributes: Attributes,
    kind: str,
    frames: list[_Frame],
    retrieve: RetrieveService,
    pack: Pack,
) -> Iterator[tuple[list[_Frame], list[dict[str, Any]]]]:
    """Yield some frames at a time with their masks."""
    bits = stored.bits_allocated or 0
    rows, columns = stored.rows or 0, stored.columns or 0
    if bits not in {1, 8, 16} or not rows or not columns:
        raise Unsupported(f"segmentations of {bits} bits are not read")
    asked: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "bits": bits,
        "first_bit": 0,
        "kind": kind,
        "background": whole(attributes, "00280120"),
    }
    syntax = syntaxes.get(stored.transfer_syntax_uid)
    size = max(1, rows * columns * bits // 8)
    several = max(1, BATCH // size)
    if bits == 1 and not syntax.encapsulated:
        yield from _bits(stored, asked, frames, several, retrieve, pack)
        return
    # Encapsulated frames of 1 bit are filled up to a byte each, so they go one by one.
    if bits == 1 and rows * columns % 8:
        several = 1
    for first in range(0, len(frames), several):
        some = frames[first : first + several]
        opened = retrieve.open_frames(
            stored, [one.number for one in some], syntaxes.EXPLICIT_VR_LE
        )
        data = b"".join(source.read(0, source.length) for source in opened)
        yield some, pack({**asked, "frames": len(some)}, data)


def _bits(
    stored: StoredInstance,
    asked: dict[str, Any],
    frames: list[_Frame],
    several: int,
    retrieve: RetrieveService,
    pack: Pack,
) -> Iterator[tuple[list[_Frame], list[dict[str, Any]]]]:
    """Read native frames of 1 bit, which follow each other without a gap."""
    source = retrieve.bulkdata(stored, "7FE00010").source
    size = asked["rows"] * asked["columns"]
    for first in range(0, len(frames), several):
        some = frames[first : first + several]
        begin, end = first * size, (first + len(some)) * size
        start, stop = begin // 8, -(-end // 8)
        if stop > source.length:
            raise NotFound("a segmentation has fewer pixels than frames")
        data = source.read(start, stop - start)
        yield (
            some,
            pack({**asked, "first_bit": begin % 8, "frames": len(some)}, data),
        )
