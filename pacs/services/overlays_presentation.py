"""Graphics and text of softcopy presentation states (PS3.3 C.10.5, C.11)."""

from __future__ import annotations

from typing import Any

from pacs.domain.attributes import (
    Attributes,
    items,
    number,
    numbers,
    text,
    whole,
)
from pacs.services.overlays_budget import Budget, Reader, described

_IMAGES = "00081140"


def read(attributes: Attributes, reader: Reader, budget: Budget) -> dict[str, Any]:
    """Return a presentation state as a layer.

    Points are in image coordinates, or, where their ``units`` are ``display``, in
    fractions of the displayed area.
    """
    graphics: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for annotation in items(attributes, "00700001"):
        shared = described(
            layer=text(annotation, "00700002"), images=_images(annotation)
        )
        for found in items(annotation, "00700009"):
            made = _graphic(found, reader, budget)
            if made is not None:
                graphics.append({**shared, **made})
        for found in items(annotation, "00700008"):
            made = _text(found, reader, budget)
            if made is not None:
                texts.append({**shared, **made})
        if next(items(annotation, "00700209"), None) is not None:
            budget.problem(reader.instance, "compound graphics are not shown")
    series = [image for one in items(attributes, "00081115") for image in _images(one)]
    return {
        "kind": "pr",
        **described(
            label=text(attributes, "00700080"),
            description=text(attributes, "00700081"),
            images=series,
            layers=_layers(attributes),
            windows=_windows(attributes),
        ),
        "rotation": whole(attributes, "00700042") or 0,
        "flipped": text(attributes, "00700041") == "Y",
        "graphics": graphics,
        "texts": texts,
    }


def _images(holder: Attributes) -> list[dict[str, Any]]:
    return [
        {
            "image": text(one, "00081155"),
            **described(
                frames=[int(frame) for frame in numbers(one, "00081160") or ()]
            ),
        }
        for one in items(holder, _IMAGES)
        if text(one, "00081155")
    ]


def _graphic(
    found: Attributes, reader: Reader, budget: Budget
) -> dict[str, Any] | None:
    points = reader.coordinates(found, "00700022", 2)
    if points is None:
        budget.problem(reader.instance, "a graphic has no coordinates")
        return None
    if not budget.take_points(len(points)):
        return None
    return {
        "type": text(found, "00700023").lower(),
        "units": text(found, "00700005").lower() or "pixel",
        "filled": text(found, "00700024") == "Y",
        "points": points,
    }


def _text(found: Attributes, reader: Reader, budget: Budget) -> dict[str, Any] | None:
    corners = [reader.coordinates(found, tag, 2) for tag in ("00700010", "00700011")]
    anchor = reader.coordinates(found, "00700014", 2)
    if not budget.take_points(3):
        return None
    box = None
    if corners[0] and corners[1]:
        box = [corners[0][0], corners[1][0]]
    return {
        "text": text(found, "00700006"),
        **described(
            box=box,
            box_units=text(found, "00700003").lower() if box else None,
            anchor=anchor[0] if anchor else None,
            anchor_units=text(found, "00700004").lower() if anchor else None,
        ),
    }


def _layers(attributes: Attributes) -> list[dict[str, Any]]:
    return [
        {
            "name": text(one, "00700002"),
            **described(
                order=whole(one, "00700062"),
                description=text(one, "00700068"),
                rgb=_rgb(one),
            ),
        }
        for one in items(attributes, "00700060")
    ]


def _rgb(layer: Attributes) -> list[int] | None:
    found = numbers(layer, "00700067", 3)
    return None if found is None else [int(value) >> 8 for value in found]


def _windows(attributes: Attributes) -> list[dict[str, Any]]:
    made = []
    for one in items(attributes, "00283110"):
        centre, width = number(one, "00281050"), number(one, "00281051")
        if centre is not None and width is not None:
            made.append(
                described(images=_images(one)) | {"center": centre, "width": width}
            )
    return made
