"""Structured reports as measurements and shapes (PS3.16 TID 1500, and any other tree).

A Measurement Group (125007, DCM) is a group of its own; shapes and numbers elsewhere
belong to the container they lie in. Coordinates in the patient (SCOORD3D) are also
given in the images whose planes they lie in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from pacs.domain.attributes import (
    Attributes,
    code,
    item,
    items,
    number,
    numbers,
    text,
)
from pacs.services.overlays_budget import Budget, Reader, described
from pacs.services.overlays_planes import ImagePlanes, in_image

#: Content items of one report that are looked at.
MAX_ITEMS: Final = 100_000
MAX_DEPTH: Final = 64

_CONTENT = "0040A730"
_VALUE_TYPE = "0040A040"
_NAME = "0040A043"
_REFERENCED = "00081199"

MEASUREMENT_GROUP: Final = ("DCM", "125007")
TRACKING_ID: Final = ("DCM", "112039")
TRACKING_UID: Final = ("DCM", "112040")
FINDING: Final = ("DCM", "121071")
#: Image Library and its groups (TID 1600, 1601): of the images, not of findings.
IMAGE_LIBRARIES: Final = frozenset((("DCM", "111028"), ("DCM", "126200")))
#: Finding Site, in SNOMED CT and in the SNOMED-RT code that older reports have.
FINDING_SITES: Final = frozenset((("SCT", "363698007"), ("SRT", "G-C0E3")))


def read(
    attributes: Attributes, reader: Reader, planes: ImagePlanes, budget: Budget
) -> dict[str, Any]:
    """Return a report as a layer."""
    tree = _Tree(reader, planes, budget)
    tree.walk(attributes)
    return {
        "kind": "sr",
        **described(
            title=_name(attributes),
            completion=text(attributes, "0040A491"),
            verification=text(attributes, "0040A493"),
        ),
        "groups": [group for group in tree.groups if _is_worth(group)],
    }


def _name(content: Attributes) -> dict[str, str] | None:
    return code(item(content, _NAME))


def _key(content: Attributes) -> tuple[str, str]:
    found = _name(content)
    return ("", "") if found is None else (found["scheme"], found["value"])


def _is_worth(group: dict[str, Any]) -> bool:
    return bool(group["measurements"] or group["shapes"] or group["qualities"])


class _Tree:
    """Collects groups from a content tree."""

    def __init__(self, reader: Reader, planes: ImagePlanes, budget: Budget) -> None:
        self.groups: list[dict[str, Any]] = []
        self._reader = reader
        self._planes = planes
        self._budget = budget

    def walk(self, root: Attributes) -> None:
        """Visit every content item, without recursion, in the order of the tree."""
        group = self._new_group(root)
        pending: list[tuple[Iterator[Attributes], dict[str, Any], str]] = [
            (items(root, _CONTENT), group, "CONTAINER")
        ]
        seen = 0
        while pending:
            children, group, parent = pending[-1]
            content = next(children, None)
            if content is None:
                pending.pop()
                continue
            seen += 1
            if seen > MAX_ITEMS or len(pending) > MAX_DEPTH:
                self._budget.truncated = True
                return
            kind = text(content, _VALUE_TYPE)
            if kind == "CONTAINER":
                if _key(content) not in IMAGE_LIBRARIES:
                    own = self._new_group(content)
                    pending.append((items(content, _CONTENT), own, kind))
                continue
            # Codes below a number say how it was derived: it has them already.
            if not (kind == "CODE" and parent == "NUM"):
                self._visit(content, kind, group)
            pending.append((items(content, _CONTENT), group, kind))

    def _new_group(self, container: Attributes) -> dict[str, Any]:
        group: dict[str, Any] = {
            **described(name=_name(container)),
            "measurement_group": _key(container) == MEASUREMENT_GROUP,
            "measurements": [],
            "qualities": [],
            "texts": [],
            "shapes": [],
        }
        self.groups.append(group)
        return group

    def _visit(self, content: Attributes, kind: str, group: dict[str, Any]) -> None:
        key = _key(content)
        if kind == "TEXT" and key == TRACKING_ID:
            group["tracking_id"] = text(content, "0040A160")
        elif kind == "UIDREF" and key == TRACKING_UID:
            group["tracking_uid"] = text(content, "0040A124")
        elif kind == "TEXT":
            group["texts"].append(
                described(name=_name(content), text=text(content, "0040A160"))
            )
        elif kind == "CODE":
            self._code(content, key, group)
        elif kind == "NUM":
            self._number(content, group)
        elif kind == "SCOORD":
            self._in_image(content, group)
        elif kind == "SCOORD3D":
            self._in_patient(content, group)
        elif kind == "IMAGE" and group["measurement_group"]:
            found = _referenced(content)
            if found is not None:
                group.setdefault("images", []).append(found)

    def _code(
        self, content: Attributes, key: tuple[str, str], group: dict[str, Any]
    ) -> None:
        value = code(item(content, "0040A168"))
        if value is None:
            return
        if key == FINDING:
            group["finding"] = value
        elif key in FINDING_SITES:
            group["site"] = value
        elif group["measurement_group"]:
            group["qualities"].append(described(name=_name(content), value=value))

    def _number(self, content: Attributes, group: dict[str, Any]) -> None:
        measured = item(content, "0040A300")
        value = number(measured, "0040A30A")
        if value is None:
            value = number(measured, "0040A161")
        if value is None:
            return
        group["measurements"].append(
            described(
                name=_name(content),
                unit=code(item(measured, "004008EA")),
                modifiers=[
                    described(name=_name(one), value=code(item(one, "0040A168")))
                    for one in items(content, _CONTENT)
                    if text(one, _VALUE_TYPE) == "CODE"
                ],
            )
            | {"value": value}
        )

    def _in_image(self, content: Attributes, group: dict[str, Any]) -> None:
        points = self._reader.coordinates(content, "00700022", 2)
        if points is None:
            self._budget.problem(self._reader.instance, "a shape has no coordinates")
            return
        if not self._budget.take_points(len(points)):
            return
        selected = (
            _referenced(child)
            for child in items(content, _CONTENT)
            if text(child, _VALUE_TYPE) == "IMAGE"
        )
        image = next((one for one in selected if one is not None), {})
        shape = {
            "type": text(content, "00700023").lower(),
            "space": "image",
            **described(name=_name(content)),
            **image,
            "points": points,
        }
        group["shapes"].append(shape)

    def _in_patient(self, content: Attributes, group: dict[str, Any]) -> None:
        points = self._reader.coordinates(content, "00700022", 3)
        if points is None:
            self._budget.problem(self._reader.instance, "a shape has no coordinates")
            return
        if not self._budget.take_points(len(points)):
            return
        frame_of_reference = text(content, "30060024")
        placed = np.array(points)
        seen_in = []
        for image in self._planes.through(placed, frame_of_reference):
            if not self._budget.take_points(len(points)):
                break
            seen_in.append(
                {
                    "image": image.instance,
                    "frame": image.frame,
                    "points": in_image(image, placed).round(3).tolist(),
                }
            )
        shape = {
            "type": text(content, "00700023").lower(),
            "space": "patient",
            **described(name=_name(content), frame_of_reference=frame_of_reference),
            "points": points,
            "images": seen_in,
        }
        group["shapes"].append(shape)


def _referenced(content: Attributes) -> dict[str, Any] | None:
    """Return the image that a content item refers to, and its frame."""
    found = item(content, _REFERENCED)
    instance = text(found, "00081155")
    if not instance:
        return None
    frames = [int(one) for one in numbers(found, "00081160") or ()]
    segments = [int(one) for one in numbers(found, "0062000B") or ()]
    return {
        "image": instance,
        "frame": frames[0] if frames else 1,
        **described(segments=segments),
    }
