"""Which part of an image a picture shows, which way round, and how large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from PIL import Image

from pacs.rendering.header import Header, Item
from pacs.rendering.parameters import Viewport, Wanted
from storage.kernel.errors import InvalidParameter, MalformedObject

PIXEL_ASPECT_RATIO: Final = 0x00280034
#: Where the distance between pixels is declared, the best first.
SPACINGS: Final = (0x00280030, 0x00181164, 0x00182010)
PIXEL_MEASURES: Final = 0x00289110
#: A pixel this many times as high as wide, or wide as high, is no pixel.
MAX_ASPECT: Final = 20.0
#: What differs by less is square: spacings are written with few digits.
SQUARE: Final = 0.005
#: Pixels along a side of a picture: no JPEG or GIF has more.
MAX_SIDE: Final = 65_500
#: A displayed area may reach this many image sizes beyond the image.
MAX_AREA: Final = 8.0


def pixel_aspect(header: Header) -> float:
    """Return the height of a pixel over its width; 1 when nothing believable says so.

    Pixel Aspect Ratio, else the row and column spacing (PS3.3 C.7.6.3.1.7).
    """
    declared: list[tuple[int, list[Item]]] = [(PIXEL_ASPECT_RATIO, [header])]
    declared += [(tag, list(header.places(PIXEL_MEASURES))) for tag in SPACINGS]
    for tag, places in declared:
        for place in places:
            aspect = ratio(place, tag)
            if aspect is not None:
                return aspect
    return 1.0


def ratio(place: Item, tag: int) -> float | None:
    """Return first over second number of an element, or None."""
    numbers = place.numbers(tag)
    if len(numbers) < 2 or min(numbers[:2]) <= 0:
        return None
    aspect = numbers[0] / numbers[1]
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        return None
    return 1.0 if abs(aspect - 1) < SQUARE else aspect


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image in its pixels; the first pixel covers 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True, slots=True)
class Placement:
    """How a part of an image lies in a picture.

    Attributes
    ----------
    rotation : int
        Degrees clockwise: 0, 90, 180 or 270; before flipping.
    flip_x, flip_y : bool
        Left and right, above and below are exchanged.
    width, height : int
        Of the picture.
    """

    box: Box
    width: int
    height: int
    rotation: int = 0
    flip_x: bool = False
    flip_y: bool = False

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point of the image is in the picture."""
        u = (x - self.box.left) / self.box.width
        v = (y - self.box.top) / self.box.height
        for _ in range(self.rotation // 90):
            u, v = 1 - v, u
        u = 1 - u if self.flip_x else u
        v = 1 - v if self.flip_y else v
        return u * self.width, v * self.height

    @property
    def scale(self) -> float:
        """Pixels of the picture for one of the image, on average."""
        area = self.width * self.height / (self.box.width * self.box.height)
        return math.sqrt(area)

    def apply(self, image: Image.Image, background: int = 0) -> Image.Image:
        """Return the picture of an image; what lies outside it is background."""
        turned = self.rotation % 180 == 90
        size = (self.height, self.width) if turned else (self.width, self.height)
        part = self._part(image, size, background)
        if self.rotation:
            # Pillow turns the other way.
            part = part.transpose(_TURNS[self.rotation])
        if self.flip_x:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.flip_y:
            part = part.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return part

    def _part(
        self, image: Image.Image, size: tuple[int, int], background: int
    ) -> Image.Image:
        box = self.box
        corners = (box.left, box.top, box.right, box.bottom)
        inside = Box(
            max(0.0, box.left),
            max(0.0, box.top),
            min(float(image.width), box.right),
            min(float(image.height), box.bottom),
        )
        if (inside.left, inside.top, inside.right, inside.bottom) == corners:
            return _resized(image, size, corners)
        fill = background if image.mode == "L" else (background,) * 3
        canvas = Image.new(image.mode, size, fill)
        if inside.width <= 0 or inside.height <= 0:
            return canvas
        across, down = size[0] / box.width, size[1] / box.height
        left = round((inside.left - box.left) * across)
        top = round((inside.top - box.top) * down)
        right = round((inside.right - box.left) * across)
        bottom = round((inside.bottom - box.top) * down)
        if right > left and bottom > top:
            shown = _resized(
                image,
                (right - left, bottom - top),
                (inside.left, inside.top, inside.right, inside.bottom),
            )
            canvas.paste(shown, (left, top))
        return canvas


_TURNS: Final = {
    90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_90,
}


def _resized(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]
) -> Image.Image:
    if size == image.size and box == (0, 0, *map(float, image.size)):
        return image
    smaller = size[0] * size[1] < (box[2] - box[0]) * (box[3] - box[1])
    kind = Image.Resampling.HAMMING if smaller else Image.Resampling.BICUBIC
    # Means of whole pixels first, then what is left: several times as fast.
    return image.resize(size, kind, box, reducing_gap=1.0 if smaller else None)


@dataclass(frozen=True, slots=True)
class View:
    """What a presentation state, or the image itself, shows by default.

    Attributes
    ----------
    aspect : float
        Height of a pixel over its width.
    magnification : float
        Pixels of the picture for one of the image, when nothing else says how large.
    """

    box: Box
    aspect: float = 1.0
    rotation: int = 0
    flip_x: bool = False
    magnification: float = 1.0


def placement_of(view: View, wanted: Wanted) -> Placement:
    """Return how `view` fits into what is wanted.

    Raises
    ------
    InvalidParameter
        The region is not inside what is shown.
    """
    box, flip_x, flip_y = view.box, view.flip_x, False
    viewport = wanted.viewport
    if viewport is not None:
        box, x, y = _region(box, viewport)
        flip_x, flip_y = flip_x != x, y
    elif wanted.region is not None:
        part = wanted.region
        box = Box(
            box.left + part.left * box.width,
            box.top + part.top * box.height,
            box.left + part.right * box.width,
            box.top + part.bottom * box.height,
        )
    # The longer side of a pixel gets more of them: nothing is lost.
    width = box.width * max(1.0, 1 / view.aspect)
    height = box.height * max(1.0, view.aspect)
    if view.rotation % 180 == 90:
        width, height = height, width
    scale = _scale(width, height, wanted, view.magnification)
    return Placement(
        box,
        max(1, round(width * scale)),
        max(1, round(height * scale)),
        view.rotation,
        flip_x,
        flip_y,
    )


def _scale(width: float, height: float, wanted: Wanted, natural: float) -> float:
    fits = []
    if wanted.viewport is not None:
        fits = [wanted.viewport.width / width, wanted.viewport.height / height]
    else:
        if wanted.max_width is not None:
            fits.append(wanted.max_width / width)
        if wanted.max_height is not None:
            fits.append(wanted.max_height / height)
    # Bound: a picture never has more pixels than one request may cost.
    most = min(
        math.sqrt(wanted.max_pixels / (width * height)), MAX_SIDE / max(width, height)
    )
    return min([*fits, most] if fits else [natural, most])


def _region(box: Box, viewport: Viewport) -> tuple[Box, bool, bool]:
    """Return the part of `box` that a viewport names, and what it flips."""
    left, top = viewport.x, viewport.y
    width = viewport.region_width
    height = viewport.region_height
    wide = box.width - left if width is None else abs(width)
    high = box.height - top if height is None else abs(height)
    if wide <= 0 or high <= 0 or left + wide > box.width or top + high > box.height:
        raise InvalidParameter("viewport", "the region is outside the image")
    part = Box(
        box.left + left, box.top + top, box.left + left + wide, box.top + top + high
    )
    return part, (width or 0) < 0, (height or 0) < 0


def checked_area(box: Box, rows: int, columns: int) -> Box:
    """Return a displayed area if it is one.

    Raises
    ------
    MalformedObject
        It has no size, or reaches absurdly far.
    """
    if box.width <= 0 or box.height <= 0:
        raise MalformedObject("a displayed area without size", 0x0070005A)
    far = MAX_AREA * max(rows, columns)
    if max(map(abs, (box.left, box.top, box.right, box.bottom))) > far:
        raise MalformedObject("a displayed area far from the image", 0x0070005A)
    return box
