"""Contours of RT structure sets (PS3.3 C.8.8.5, C.8.8.6), per image."""

from __future__ import annotations

from typing import Any

import numpy as np

from pacs.domain.attributes import Attributes, item, items, numbers, text, whole
from pacs.services.overlays_budget import Budget, Reader, described
from pacs.services.overlays_planes import ImageAt, ImagePlanes, in_image


def read(
    attributes: Attributes, reader: Reader, planes: ImagePlanes, budget: Budget
) -> dict[str, Any]:
    """Return a structure set as a layer.

    Each contour has its points in the patient, and for each image it lies on (the one
    it names, else those whose planes it lies in) in image coordinates.
    """
    observed = {
        whole(one, "30060084"): text(one, "300600A4")
        for one in items(attributes, "30060080")
    }
    frames = {
        whole(one, "30060022"): text(one, "30060024")
        for one in items(attributes, "30060020")
    }
    regions = [
        {
            "number": whole(one, "30060022"),
            "name": text(one, "30060026"),
            **described(
                algorithm=text(one, "30060036"),
                type=observed.get(whole(one, "30060022")),
            ),
        }
        for one in items(attributes, "30060020")
    ]
    colours = {}
    contours: list[dict[str, Any]] = []
    for drawn in items(attributes, "30060039"):
        region = whole(drawn, "30060084")
        colour = numbers(drawn, "3006002A", 3)
        if colour is not None:
            colours[region] = [min(255, max(0, int(value))) for value in colour]
        frame_of_reference = frames.get(region, "")
        for contour in items(drawn, "30060040"):
            made = _contour(contour, frame_of_reference, reader, planes, budget)
            if made is not None:
                contours.append({"region": region, **made})
    for one in regions:
        if one["number"] in colours:
            one["rgb"] = colours[one["number"]]
    return {
        "kind": "rtstruct",
        **described(label=text(attributes, "30060002")),
        "regions": regions,
        "contours": contours,
    }


def _contour(
    contour: Attributes,
    frame_of_reference: str,
    reader: Reader,
    planes: ImagePlanes,
    budget: Budget,
) -> dict[str, Any] | None:
    points = reader.coordinates(contour, "30060050", 3, "DS")
    if points is None:
        budget.problem(reader.instance, "a contour has no coordinates")
        return None
    if not budget.take_points(len(points)):
        return None
    placed = np.array(points)
    seen_in = []
    for image in _images(contour, placed, frame_of_reference, planes):
        if not budget.take_points(len(points)):
            break
        seen_in.append(
            {
                "image": image.instance,
                "frame": image.frame,
                "points": in_image(image, placed).round(3).tolist(),
            }
        )
    return {
        "type": text(contour, "30060042").lower(),
        "points": points,
        "images": seen_in,
    }


def _images(
    contour: Attributes,
    points: np.typing.NDArray[np.float64],
    frame_of_reference: str,
    planes: ImagePlanes,
) -> list[ImageAt]:
    named = item(contour, "30060016")
    if text(named, "00081155"):
        frame = whole(named, "00081160") or 1
        image = planes.image(text(named, "00081155"), frame)
        if image is not None:
            return [image]
    return planes.through(points, frame_of_reference)
