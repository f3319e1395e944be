"""Text and drawings that are burned into pictures.

Text about patient and technique (PS3.18 8.3.5.1.1), and the graphic annotations of a
presentation state (PS3.3 C.10.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from pacs.rendering import fonts
from pacs.rendering.geometry import Placement
from pacs.rendering.grayscale import Voi
from pacs.rendering.header import Header, Item
from pacs.rendering.parameters import Window
from pacs.rendering.softcopy import Target, graphics_for, layer_grey
from storage.kernel.errors import MalformedObject

Point = tuple[float, float]

#: Smaller pictures have no room for text.
MIN_SIDE: Final = 96
#: Points, and objects, of the annotations of one state.
MAX_POINTS: Final = 200_000
MAX_OBJECTS: Final = 10_000
#: Steps between two points of an interpolated curve.
CURVE_STEPS: Final = 8
#: Distance of lines, in sizes of their letters.
LINE: Final = 1.3
PINYIN: Final = "no font with hanzi here: Chinese is written in pinyin"


def patient_lines(header: Header) -> list[str]:
    """Return who is in the image: name, ID, birth date and sex."""
    groups = [part for part in header.text(0x00100010, "PN").split("=") if part]
    # The ideographic group is how a Chinese reader knows the patient.
    name = next((one for one in groups if fonts.is_chinese(one)), "")
    name = name or next(iter(groups), "")
    name = " ".join(part for part in name.replace("^", " ").split())
    person = " ".join(
        part
        for part in (
            _date(header.code(0x00100030)), header.code(0x00100040),
            header.code(0x00101010),
        )
        if part
    )  # fmt: skip
    return [line for line in (name, header.text(0x00100020), person) if line]


def technique_lines(header: Header, voi: Voi | None) -> list[str]:
    """Return how the image was made: modality, series, exposure, window."""
    series = header.text(0x0008103E)
    number, instance = header.code(0x00200011), header.code(0x00200013)
    lines = [
        " ".join(
            part
            for part in (header.code(0x00080060), _date(header.code(0x00080020)))
            if part
        ),
        f"Se {number} {series}".strip() if number or series else "",
        f"Im {instance}" if instance else "",
        _measured(header, (("kV", 0x00180060), ("mAs", 0x00181152))),
        _measured(header, (("TR", 0x00180080), ("TE", 0x00180081))),
        _measured(header, (("ST", 0x00180050), ("SL", 0x00201041))),
    ]
    if isinstance(voi, Window):
        lines.append(f"WL {voi.center:g} WW {voi.width:g}")
    return [line for line in lines if line]


def _measured(header: Header, wanted: Sequence[tuple[str, int]]) -> str:
    found = ((name, header.number(tag)) for name, tag in wanted)
    return "  ".join(f"{name} {value:g}" for name, value in found if value is not None)


def _date(text: str) -> str:
    if len(text) == 8 and text.isdigit():
        return f"{text[:4]}-{text[4:6]}-{text[6:]}"
    return text


def burn_text(picture: Image.Image, top: list[str], bottom: list[str]) -> set[str]:
    """Write lines into the upper and lower left corner; return what to warn of.

    Text is white with a black rim, so that it is read on any ground.
    """
    warnings: set[str] = set()
    if min(picture.size) < MIN_SIDE:
        return {"the picture is too small for annotations"} if top or bottom else set()
    size = max(10, min(picture.size) // 34)
    height = round(size * LINE)
    margin = size // 2
    draw = ImageDraw.Draw(picture)
    start = picture.height - margin - height * len(bottom)
    placed = [(margin + i * height, line) for i, line in enumerate(top)]
    placed += [(start + i * height, line) for i, line in enumerate(bottom)]
    for y, text in placed:
        line, changed = fonts.drawable(text)
        if changed:
            warnings.add(PINYIN)
        _write(draw, (margin, y), line, size, 255)
    return warnings


def _write(
    draw: ImageDraw.ImageDraw, place: Point, line: str, size: int, grey: int
) -> None:
    """Write a line whose upper left corner is at `place`."""
    font = fonts.font_for(size, chinese=fonts.is_chinese(line))
    rim = 0 if grey > 127 else 255
    colour = draw.mode == "RGB"
    # By the middle: fonts differ in what they leave free above and below.
    draw.text(
        (place[0], place[1] + size * LINE / 2),
        line,
        anchor="lm",
        fill=(grey,) * 3 if colour else grey,
        font=font,
        stroke_width=max(1, size // 14),
        stroke_fill=(rim,) * 3 if colour else rim,
    )


def draw_graphics(
    picture: Image.Image, state: Item, target: Target, placement: Placement
) -> set[str]:
    """Draw the graphic annotations that a presentation state has for an image.

    Returns
    -------
    set of str
        What to warn of.

    Raises
    ------
    MalformedObject
        More points or objects than anyone draws.
    """
    sketch = _Sketch(picture, placement)
    for annotation in graphics_for(state, target):
        sketch.grey = layer_grey(state, annotation.code(0x00700002))
        for item in annotation.items(0x00700009):
            sketch.graphic(item)
        for item in annotation.items(0x00700008):
            sketch.text(item)
    return sketch.warnings


class _Sketch:
    """Draws objects of a presentation state in a picture."""

    def __init__(self, picture: Image.Image, placement: Placement) -> None:
        self.grey = 255
        self.warnings: set[str] = set()
        self._picture = picture
        self._draw = ImageDraw.Draw(picture)
        self._placement = placement
        self._width = max(1, round(min(picture.size) / 400))
        self._objects = self._points = 0

    @property
    def _ink(self) -> int | tuple[int, int, int]:
        grey = self.grey
        return (grey, grey, grey) if self._picture.mode == "RGB" else grey

    def _count(self, points: int) -> None:
        self._objects += 1
        self._points += points
        if self._objects > MAX_OBJECTS or self._points > MAX_POINTS:
            raise MalformedObject("too many graphic annotations", 0x00700001)

    def _place(self, x: float, y: float, units: str) -> Point:
        if units == "DISPLAY":
            x, y = x * self._picture.width, y * self._picture.height
        else:
            x, y = self._placement.point(x, y)
        # Bound: what lies far outside is drawn no further than it shows.
        far = 4.0 * max(self._picture.size)
        return min(max(x, -far), far), min(max(y, -far), far)

    def graphic(self, item: Item) -> None:
        """Draw one item of Graphic Object Sequence (PS3.3 C.10.5.1)."""
        numbers = item.numbers(0x00700022)
        self._count(len(numbers) // 2)
        units = item.code(0x00700005)
        raw = [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers) - 1, 2)]
        points = [self._place(x, y, units) for x, y in raw]
        kind = item.code(0x00700023)
        filled = item.code(0x00700024) == "Y"
        if kind == "POINT" and points:
            (x, y), r = points[0], 2 * self._width
            self._draw.ellipse((x - r, y - r, x + r, y + r), fill=self._ink)
        elif kind == "POLYLINE" and len(points) > 1:
            self._line(points, filled=filled)
        elif kind == "INTERPOLATED" and len(points) > 1:
            self._line(_curve(points), filled=filled)
        elif kind == "CIRCLE" and len(points) == 2:
            self._line(_circle(points), filled=filled)
        elif kind == "ELLIPSE" and len(points) == 4:
            self._line(_ellipse(points), filled=filled)

    def _line(self, points: list[Point], *, filled: bool) -> None:
        if filled and len(points) > 2:
            self._draw.polygon(points, fill=self._ink)
        self._draw.line(points, fill=self._ink, width=self._width, joint="curve")

    def text(self, item: Item) -> None:
        """Write one item of Text Object Sequence (PS3.3 C.10.5.1)."""
        lines = item.text(0x00700006, "ST").replace("\r", "").split("\n")[:64]
        self._count(len(lines))
        box, anchor = item.numbers(0x00700010), item.numbers(0x00700014)
        size = max(10, min(self._picture.size) // 34)
        if len(box) >= 2:
            place = self._place(box[0], box[1], item.code(0x00700003))
        elif len(anchor) >= 2:
            place = self._place(anchor[0], anchor[1], item.code(0x00700004))
        else:
            return
        if len(anchor) >= 2 and item.code(0x00700015) == "Y":
            point = self._place(anchor[0], anchor[1], item.code(0x00700004))
            self._line([place, point], filled=False)
        for i, text in enumerate(lines):
            line, changed = fonts.drawable(text)
            if changed:
                self.warnings.add(PINYIN)
            spot = (place[0], place[1] + i * size * LINE)
            _write(self._draw, spot, line, size, self.grey)


def _curve(points: list[Point]) -> list[Point]:
    """Return a smooth curve through points (Catmull-Rom)."""
    p = np.array([points[0], *points, points[-1]])
    t = np.linspace(0, 1, CURVE_STEPS, endpoint=False)[:, None]
    parts = [
        0.5
        * (
            2 * p[i + 1]
            + (p[i + 2] - p[i]) * t
            + (2 * p[i] - 5 * p[i + 1] + 4 * p[i + 2] - p[i + 3]) * t**2
            + (3 * p[i + 1] - p[i] - 3 * p[i + 2] + p[i + 3]) * t**3
        )
        for i in range(len(points) - 1)
    ]
    return [(float(x), float(y)) for x, y in np.concatenate([*parts, p[-1:]])]


def _circle(points: list[Point]) -> list[Point]:
    (x, y), (u, v) = points
    radius = math.hypot(u - x, v - y)
    return _around((x, y), (radius, 0.0), (0.0, radius))


def _ellipse(points: list[Point]) -> list[Point]:
    (a, b), (c, d), (e, f), (g, h) = points
    major = ((c - a) / 2, (d - b) / 2)
    minor = ((g - e) / 2, (h - f) / 2)
    return _around(((a + c) / 2, (b + d) / 2), major, minor)


def _around(center: Point, major: Point, minor: Point) -> list[Point]:
    angles = np.linspace(0, 2 * math.pi, 97)
    x = center[0] + np.cos(angles) * major[0] + np.sin(angles) * minor[0]
    y = center[1] + np.cos(angles) * major[1] + np.sin(angles) * minor[1]
    return list(zip(x.tolist(), y.tolist(), strict=True))
