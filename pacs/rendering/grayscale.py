"""From stored values to grey: modality, value of interest, presentation (PS3.4 N.2).

Each step is a function of numbers, so that a frame of at most 16 bits needs one table
of every possible sample, and anything else the same functions over the frame.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pacs.rendering.header import Header, Item
from pacs.rendering.lookup import Lookup, read_lut
from pacs.rendering.parameters import Function, Window
from pacs.rendering.pixels import Frame
from storage.kernel.errors import InvalidParameter, MalformedObject

Floats = NDArray[np.float64]
Grey = NDArray[np.uint8]

WINDOW_CENTER, WINDOW_WIDTH = 0x00281050, 0x00281051
VOI_LUT_FUNCTION: Final = 0x00281056
VOI_LUT_SEQUENCE: Final = 0x00283010
RESCALE_INTERCEPT, RESCALE_SLOPE = 0x00281052, 0x00281053
MODALITY_LUT_SEQUENCE: Final = 0x00283000
PIXEL_PADDING_VALUE, PIXEL_PADDING_LIMIT = 0x00280120, 0x00280121
PRESENTATION_LUT_SHAPE: Final = 0x20500020
PRESENTATION_LUT_SEQUENCE: Final = 0x20500010
#: Functional groups (PS3.3 C.7.6.16.2.9, C.7.6.16.2.10).
TRANSFORMATION: Final = 0x00289145
FRAME_VOI_LUT: Final = 0x00289132

#: Values of VOI LUT Function.
FUNCTIONS: Final[dict[str, Function]] = {
    "": "linear",
    "LINEAR": "linear",
    "LINEAR_EXACT": "linear-exact",
    "SIGMOID": "sigmoid",
}


def windowed(window: Window, x: Floats) -> Floats:
    """Return grey from 0 to 1 (PS3.3 C.11.2.1.2.1, C.11.2.1.3.2, C.11.2.1.3.1)."""
    c, w = window.center, window.width
    if window.function == "sigmoid":
        # Beyond this the exponential is 0 or 1 to every digit.
        power = np.clip(-4 * (x - c) / w, -700, 700)
        return np.asarray(1 / (1 + np.exp(power)), np.float64)
    if window.function == "linear-exact":
        return np.clip((x - c) / w + 0.5, 0, 1)
    if w == 1:
        return (x > c - 0.5).astype(np.float64)
    return np.clip((x - (c - 0.5)) / (w - 1) + 0.5, 0, 1)


@dataclass(frozen=True, slots=True)
class Modality:
    """Modality LUT or rescale: stored values to what the modality measured."""

    slope: float = 1.0
    intercept: float = 0.0
    lut: Lookup | None = None

    def __call__(self, stored: NDArray[Any]) -> Floats:
        values = stored.astype(np.float64)
        if self.lut is not None:
            return self.lut(values).astype(np.float64)
        if self.slope != 1.0:
            values *= self.slope
        if self.intercept:
            values += self.intercept
        return values

    def is_signed(self, *, stored_signed: bool) -> bool:
        """Tell whether what comes out can be negative."""
        if self.lut is not None:
            return False
        return stored_signed or self.intercept < 0 or self.slope < 0


def modality_of(header: Header, *, signed: bool) -> Modality:
    """Return the modality transformation of a frame of an image."""
    for place in header.places(TRANSFORMATION):
        found = read_modality(place, signed=signed)
        if found is not None:
            return found
    return Modality()


def read_modality(place: Item, *, signed: bool) -> Modality | None:
    """Return the modality transformation declared in one place, if any.

    Tolerates: a slope of 0, which would make one value of all: left out.
    """
    lut = place.first(MODALITY_LUT_SEQUENCE)
    if lut is not None:
        return Modality(lut=read_lut(lut, signed=signed))
    intercept, slope = place.number(RESCALE_INTERCEPT), place.number(RESCALE_SLOPE)
    if intercept is None and slope is None:
        return None
    return Modality(slope or 1.0, intercept or 0.0)


Voi = Window | Lookup


def voi_of(header: Header, *, signed: bool) -> Voi | None:
    """Return the first window, or VOI LUT, of a frame of an image."""
    for place in header.places(FRAME_VOI_LUT):
        found = read_voi(place, signed=signed)
        if found is not None:
            return found
    return None


def read_voi(place: Item, *, signed: bool) -> Voi | None:
    """Return the window declared in one place, else its VOI LUT, else None.

    Tolerates: windows that no function takes (a width of 0), as if absent; LINEAR
    narrower than 1 as LINEAR_EXACT, which parametric maps mean by it.
    """
    center, width = place.number(WINDOW_CENTER), place.number(WINDOW_WIDTH)
    if center is not None and width is not None and width > 0:
        function = FUNCTIONS.get(place.code(VOI_LUT_FUNCTION), "linear")
        if function == "linear" and width < 1:
            function = "linear-exact"
        try:
            return Window(center, width, function)
        except InvalidParameter:
            pass
    lut = place.first(VOI_LUT_SEQUENCE)
    return None if lut is None else read_lut(lut, signed=signed)


@dataclass(frozen=True, slots=True)
class Presentation:
    """From VOI output, 0 to 1, to grey (PS3.3 C.11.4, C.11.6).

    Attributes
    ----------
    inverse : bool
        MONOCHROME1, or Presentation LUT Shape INVERSE.
    """

    inverse: bool = False
    lut: Lookup | None = None

    def __call__(self, grey: Floats) -> Floats:
        if self.lut is not None:
            index = grey * (len(self.lut.entries) - 1) + self.lut.first
            grey = self.lut(index) / self.lut.maximum
        return 1 - grey if self.inverse else grey


def presentation_of(header: Header, photometric: str) -> Presentation:
    """Return how an image without a presentation state is shown."""
    shape = header.code(PRESENTATION_LUT_SHAPE)
    return Presentation(inverse=photometric == "MONOCHROME1" or shape == "INVERSE")


def read_presentation(state: Item) -> Presentation:
    """Return the presentation LUT of a presentation state (PS3.3 C.11.6)."""
    lut = state.first(PRESENTATION_LUT_SEQUENCE)
    if lut is not None:
        return Presentation(lut=read_lut(lut, signed=False))
    return Presentation(inverse=state.code(PRESENTATION_LUT_SHAPE) == "INVERSE")


@dataclass(frozen=True, slots=True)
class Padding:
    """Stored values that are no image (PS3.3 C.7.5.1.1.2), both ends included."""

    low: int
    high: int

    def __call__(self, stored: NDArray[Any]) -> NDArray[np.bool_]:
        return (stored >= self.low) & (stored <= self.high)


def padding_of(header: Header, frame: Frame) -> Padding | None:
    """Return the range of padded values, or None."""
    if PIXEL_PADDING_VALUE not in header or frame.is_float:
        return None
    ends = []
    for tag in (PIXEL_PADDING_VALUE, PIXEL_PADDING_LIMIT):
        if tag in header:
            words = header.words(tag)
            if not len(words):
                return None
            # US or SS by Pixel Representation, whatever the VR says.
            word = int(words[0])
            ends.append(word - 0x10000 if frame.signed and word > 0x7FFF else word)
    return Padding(min(ends), max(ends))


#: Tables of 64 KiB that one process remembers.
MAX_TABLES: Final = 64
_TABLES: OrderedDict[tuple[Any, ...], Grey] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Chain:
    """All steps from stored values to 8-bit grey.

    Attributes
    ----------
    voi : Window, Lookup or None
        None: the range of the frame's own values, without padding.
    """

    modality: Modality = field(default_factory=Modality)
    voi: Voi | None = None
    presentation: Presentation = field(default_factory=Presentation)
    padding: Padding | None = None

    def render(self, frame: Frame) -> Grey:
        """Return the grey of each pixel, padding black.

        Raises
        ------
        MalformedObject
            There is nothing but padding or numbers that are none, and no window.
        """
        raw = frame.raw
        if frame.is_float or raw.dtype.itemsize > 2:
            values = frame.values(raw)
            return self._grey(values, self._voi(frame, lambda: values))
        return np.take(self._table(frame), raw)

    def _table(self, frame: Frame) -> Grey:
        """Return the grey of every possible sample; the last ones are remembered.

        The images of a series mostly share theirs.
        """
        kind = frame.raw.dtype
        form = (kind.str, frame.bits_stored, frame.shift, frame.signed)
        luts = self.modality.lut or self.presentation.lut
        kept = self.voi is not None and not isinstance(self.voi, Lookup) and not luts
        key = (*form, self.modality.slope, self.modality.intercept, self.voi,
               self.presentation.inverse, self.padding)  # fmt: skip
        if kept and key in _TABLES:
            _TABLES.move_to_end(key)
            return _TABLES[key]
        size = 1 << 8 * kind.itemsize
        domain = frame.values(np.arange(size, dtype=kind))

        def present() -> NDArray[Any]:
            seen = np.zeros(size, np.bool_)
            seen[frame.raw.reshape(-1)] = True
            return domain[seen]

        table = self._grey(domain, self._voi(frame, present))
        if kept:
            _TABLES[key] = table
            if len(_TABLES) > MAX_TABLES:
                _TABLES.popitem(last=False)
        return table

    def _voi(
        self, frame: Frame, present: Callable[[], NDArray[Any]]
    ) -> Callable[[Floats], Floats]:
        voi = self.voi
        if isinstance(voi, Lookup):
            return lambda x: voi(x) / voi.maximum
        if voi is not None:
            return partial(windowed, voi)
        if frame.bits_stored == 1:
            return lambda x: x
        stored = present()
        if self.padding is not None:
            stored = stored[~self.padding(stored)]
        values = self.modality(stored)
        values = values[np.isfinite(values)]
        if not len(values):
            return np.zeros_like
        low, high = float(values.min()), float(values.max())
        # A flat frame is as dark as its darkest value.
        return lambda x: np.clip((x - low) / ((high - low) or 1.0), 0, 1)

    def _grey(self, stored: NDArray[Any], voi: Callable[[Floats], Floats]) -> Grey:
        values = self.modality(stored)
        if values.dtype.kind == "f" and stored.dtype.kind == "f":
            values = np.nan_to_num(values, nan=-np.inf)
        with np.errstate(over="ignore", invalid="ignore"):
            grey = self.presentation(voi(values))
        eight = np.nan_to_num(np.floor(grey * 255 + 0.5)).astype(np.uint8)
        if self.padding is not None:
            eight[self.padding(stored)] = 0
        return eight


def chain_of(header: Header, frame: Frame, window: Window | None = None) -> Chain:
    """Return the steps that an image declares, with another window if given."""
    modality = modality_of(header, signed=frame.signed)
    signed = modality.is_signed(stored_signed=frame.signed)
    try:
        voi = window or voi_of(header, signed=signed)
    except MalformedObject:
        # Tolerates: a broken VOI LUT; the modality's values are what they are.
        voi = None
    return Chain(
        modality,
        voi,
        presentation_of(header, frame.photometric),
        padding_of(header, frame),
    )
