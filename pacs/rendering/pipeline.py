"""One frame as a picture: every step from stored samples to pixels (PS3.4 N.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pacs.rendering import overlays
from pacs.rendering.annotation import (
    burn_text,
    draw_graphics,
    patient_lines,
    technique_lines,
)
from pacs.rendering.colour import (
    colour_frame,
    palette_frame,
    palette_of,
    supplemented,
    through_palette,
)
from pacs.rendering.geometry import Box, View, pixel_aspect, placement_of
from pacs.rendering.grayscale import Voi, chain_of, padding_of
from pacs.rendering.header import Header
from pacs.rendering.parameters import Wanted
from pacs.rendering.pixels import Frame
from pacs.rendering.softcopy import (
    PSEUDO_COLOUR,
    SOP_CLASS,
    Target,
    chain_of_state,
    check_applies,
    view_of_state,
)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is shown: one frame, and the presentation state it is shown by.

    Attributes
    ----------
    index : int
        Of the frame, from 0.
    """

    header: Header
    frame: Frame
    index: int
    instance_uid: str = ""
    state: Header | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.frame.raw.shape[:2]
        return rows, columns

    @property
    def target(self) -> Target:
        return Target(self.instance_uid, self.index + 1, *self.shape)


def picture_of(subject: Subject, wanted: Wanted) -> tuple[Image.Image, set[str]]:
    """Return the picture of a frame, and what to warn of.

    Raises
    ------
    InvalidInput, NotFound
        Of whichever step the object, or what is wanted, does not allow.
    """
    state = subject.state
    if state is not None:
        check_applies(state, subject.target)
    pixels, voi = _pixels(subject, wanted)
    pixels = _planes(subject, pixels, wanted)
    aspect = pixel_aspect(subject.header)
    rows, columns = subject.shape
    view = View(Box(0.0, 0.0, float(columns), float(rows)), aspect)
    if state is not None:
        view = view_of_state(state, subject.target, aspect)
    placement = placement_of(view, wanted)
    picture = placement.apply(Image.fromarray(pixels))
    warnings: set[str] = set()
    if state is not None:
        warnings |= draw_graphics(picture, state, subject.target, placement)
    if wanted.annotations:
        top = patient_lines(subject.header) if "patient" in wanted.annotations else []
        technique = "technique" in wanted.annotations
        bottom = technique_lines(subject.header, voi) if technique else []
        warnings |= burn_text(picture, top, bottom)
    return picture, warnings


def _pixels(subject: Subject, wanted: Wanted) -> tuple[Pixels, Voi | None]:
    """Return grey or colour of 8 bits, and the window that made it."""
    header, frame, state = subject.header, subject.frame, subject.state
    if frame.is_colour:
        return colour_frame(frame), None
    if frame.photometric == "PALETTE COLOR":
        return palette_frame(header, frame), None
    if state is None:
        chain = chain_of(header, frame, wanted.window)
        grey = chain.render(frame)
        coloured = supplemented(header, frame, grey)
        return (grey if coloured is None else coloured), chain.voi
    chain = chain_of_state(
        state, subject.target, frame, padding_of(header, frame), wanted.window
    )
    grey = chain.render(frame)
    if state.code(SOP_CLASS) == PSEUDO_COLOUR:
        return _pseudo_colour(state, grey), chain.voi
    return grey, chain.voi


def _pseudo_colour(state: Header, grey: Pixels) -> Pixels:
    """Return grey through the palette of a pseudo-colour state (PS3.4 N.2.2)."""
    palette = palette_of(state, signed=False)
    top = len(palette[0].entries) - 1
    domain = np.arange(256) * top / 255 + palette[0].first
    return through_palette(domain, palette)[grey]


def _planes(subject: Subject, pixels: Pixels, wanted: Wanted) -> Pixels:
    """Return pixels with shutters closed and overlay planes burned in."""
    header, state, shape = subject.header, subject.state, subject.shape
    source = header if state is None else state
    seen = overlays.shutter_mask(source, shape)
    if seen is not None:
        pixels = overlays.hide(pixels, seen, overlays.shutter_grey(source))
    masks: list[NDArray[np.bool_]] = []

    def add(item: Header, group: int, frame: Frame | None) -> None:
        mask = overlays.overlay_mask(item, group, shape, subject.index, frame)
        if mask is not None:
            masks.append(mask)

    if state is None:
        for group in overlays.overlay_groups(header) if wanted.overlays else ():
            if overlays.overlay_type(header, group) == overlays.GRAPHICS:
                add(header, group, subject.frame)
    else:
        shutter = state.whole(overlays.SHUTTER_OVERLAY_GROUP)
        for group in overlays.overlay_groups(state):
            if group == shutter:
                mask = overlays.overlay_mask(state, group, shape, subject.index, None)
                if mask is not None:
                    grey = overlays.shutter_grey(state)
                    pixels = overlays.hide(pixels, ~mask, grey)
            elif overlays.activation_layer(state, group):
                add(state, group, None)
        for group in overlays.overlay_groups(header):
            # The state names which planes of the image are shown (PS3.3 C.11.7).
            if overlays.activation_layer(state, group):
                add(header, group, subject.frame)
    if masks and not pixels.flags.writeable:
        pixels = pixels.copy()
    for mask in masks:
        overlays.draw(pixels, mask)
    return pixels


def frame_milliseconds(header: Header) -> int:
    """Return how long a frame of a cine loop is shown; 100 ms when nothing says so."""
    time = header.number(0x00181063)
    if not time:
        vector = header.numbers(0x00181065)
        time = vector[1] if len(vector) > 1 else None
    if not time:
        rate = header.number(0x00082144) or header.number(0x00180040)
        time = 1000 / rate if rate and rate > 0 else None
    return round(min(max(time or 100.0, 20.0), 5000.0))
