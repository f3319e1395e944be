"""Softcopy presentation states (PS3.3 A.33, C.10, C.11; PS3.4 N.2).

Grayscale, colour and pseudo-colour states. What a state does not say about grey is
the identity: it never falls back on the image's own window (PS3.4 N.2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pacs.rendering.geometry import Box, View, checked_area, ratio
from pacs.rendering.grayscale import (
    Chain,
    Modality,
    Padding,
    Voi,
    read_modality,
    read_presentation,
    read_voi,
)
from pacs.rendering.header import Item
from pacs.rendering.parameters import Window
from pacs.rendering.pixels import Frame
from storage.kernel.errors import NotFound, Unsupported

_STORAGE: Final = "1.2.840.10008.5.1.4.1.1.11."
GRAYSCALE, COLOUR, PSEUDO_COLOUR = (_STORAGE + n for n in ("1", "2", "3"))
#: Presentation states that are applied here.
APPLIED: Final = frozenset((GRAYSCALE, COLOUR, PSEUDO_COLOUR))

SOP_CLASS: Final = 0x00080016
REFERENCED_SERIES: Final = 0x00081115
REFERENCED_IMAGE: Final = 0x00081140
REFERENCED_INSTANCE: Final = 0x00081155
REFERENCED_FRAMES: Final = 0x00081160
SERIES_UID: Final = 0x0020000E
SOFTCOPY_VOI: Final = 0x00283110
DISPLAYED_AREA: Final = 0x0070005A
#: References of one state that are looked at.
MAX_REFERENCES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Reference:
    """An image that a presentation state is for; no frames means all of them."""

    series_uid: str
    instance_uid: str
    frames: tuple[int, ...]


def references(state: Item) -> list[Reference]:
    """Return the images that a presentation state applies to, in its order."""
    found: list[Reference] = []
    for series in state.items(REFERENCED_SERIES):
        uid = series.code(SERIES_UID)
        for image in series.items(REFERENCED_IMAGE):
            numbers = tuple(int(n) for n in image.numbers(REFERENCED_FRAMES))
            found.append(Reference(uid, image.code(REFERENCED_INSTANCE), numbers))
            if len(found) >= MAX_REFERENCES:
                return found
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """The frame that a state is applied to.

    Attributes
    ----------
    frame_number : int
        From 1.
    """

    instance_uid: str
    frame_number: int
    rows: int
    columns: int

    def is_meant_by(self, item: Item) -> bool:
        """Tell whether an item's references include this; none mean all images."""
        images = item.items(REFERENCED_IMAGE)
        if not images:
            return True
        for image in images:
            numbers = image.numbers(REFERENCED_FRAMES)
            if image.code(REFERENCED_INSTANCE) == self.instance_uid and (
                not numbers or self.frame_number in numbers
            ):
                return True
        return False


def _chosen(state: Item, tag: int, target: Target) -> Iterator[Item]:
    """Yield the items of a sequence that are meant for the target."""
    return (item for item in state.items(tag) if target.is_meant_by(item))


def check_applies(state: Item, target: Target) -> None:
    """Raise unless the state can be applied here, and refers to the target.

    Raises
    ------
    Unsupported
        A kind of presentation state that is not rendered.
    NotFound
        It is for other images.
    """
    kind = state.code(SOP_CLASS)
    if kind not in APPLIED:
        raise Unsupported(f"presentation states of class {kind[:64]}")
    for one in references(state):
        if one.instance_uid == target.instance_uid and (
            not one.frames or target.frame_number in one.frames
        ):
            return
    raise NotFound("the presentation state does not refer to this image")


def chain_of_state(
    state: Item,
    target: Target,
    frame: Frame,
    padding: Padding | None,
    window: Window | None,
) -> Chain:
    """Return the grey scale steps of a state, with another window if given."""
    modality = read_modality(state, signed=frame.signed) or Modality()
    signed = modality.is_signed(stored_signed=frame.signed)
    voi: Voi | None = window
    if voi is None:
        for item in _chosen(state, SOFTCOPY_VOI, target):
            voi = read_voi(item, signed=signed)
            break
    return Chain(modality, voi, read_presentation(state), padding)


def view_of_state(state: Item, target: Target, aspect: float) -> View:
    """Return what part of the image a state shows, and which way round.

    Parameters
    ----------
    aspect : float
        Of the image's pixels, where the state declares none.

    Raises
    ------
    MalformedObject
    """
    box = Box(0.0, 0.0, float(target.columns), float(target.rows))
    magnification = 1.0
    for item in _chosen(state, DISPLAYED_AREA, target):
        first = item.numbers(0x00700052)
        last = item.numbers(0x00700053)
        if len(first) >= 2 and len(last) >= 2:
            # Column and row of pixels, from 1; both ends belong to the area.
            box = checked_area(
                Box(first[0] - 1, first[1] - 1, last[0], last[1]),
                target.rows,
                target.columns,
            )
        for tag in (0x00700102, 0x00700101):
            declared = ratio(item, tag)
            if declared is not None:
                aspect = declared
        if item.code(0x00700100) == "MAGNIFY":
            magnification = item.number(0x00700103) or 1.0
        break
    rotation = state.whole(0x00700042) % 360
    return View(
        box,
        aspect,
        rotation if rotation % 90 == 0 else 0,
        flip_x=state.code(0x00700041) == "Y",
        magnification=min(max(magnification, 0.01), 64.0),
    )


def graphics_for(state: Item, target: Target) -> Iterator[Item]:
    """Yield the graphic annotations for the target, those of the lowest layer first."""
    order = {
        layer.code(0x00700002): layer.whole(0x00700062)
        for layer in state.items(0x00700060)
    }
    chosen = list(_chosen(state, 0x00700001, target))
    yield from sorted(chosen, key=lambda one: order.get(one.code(0x00700002), 0))


def layer_grey(state: Item, name: str) -> int:
    """Return the grey that a graphic layer is drawn in, as 8 bits."""
    for layer in state.items(0x00700060):
        if layer.code(0x00700002) == name:
            words = layer.words(0x00700066)
            if len(words):
                return int(words[0]) >> 8
    return 255
