"""What a client asks of a picture (PS3.18 8.3.5.1), as values; knows no pixels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from storage.kernel.errors import InvalidParameter

Function = Literal["linear", "linear-exact", "sigmoid"]
FUNCTIONS: Final[dict[str, Function]] = {
    "linear": "linear",
    "linear-exact": "linear-exact",
    "sigmoid": "sigmoid",
}

JPEG, PNG, JP2, GIF = "image/jpeg", "image/png", "image/jp2", "image/gif"
#: Of JPEG when a client does not say.
DEFAULT_QUALITY: Final = 90
#: What text can be burned in.
ANNOTATIONS: Final = frozenset(("patient", "technique"))
#: Colour spaces that an ICC profile can be asked for.
ICC_PROFILES: Final = frozenset(("no", "yes", "srgb", "adobergb", "rommrgb"))

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})"
                     r"(?:[eE][+-]?[0-9]{1,2})?\Z")  # fmt: skip
_WHOLE = re.compile(r"[0-9]{1,9}\Z")


def decimal(name: str, text: str) -> float:
    """Return a decimal number of a query parameter.

    Raises
    ------
    InvalidParameter
        No number, or one that is not finite.
    """
    if not _NUMBER.match(text):
        raise InvalidParameter(name, "not a decimal number")
    number = float(text)
    if not math.isfinite(number):
        raise InvalidParameter(name, "not a finite number")
    return number


def whole(name: str, text: str) -> int:
    """Return a whole number above 0 of a query parameter.

    Raises
    ------
    InvalidParameter
    """
    if not _WHOLE.match(text) or not int(text):
        raise InvalidParameter(name, "not a whole number above 0")
    return int(text)


@dataclass(frozen=True, slots=True)
class Window:
    """A window, in the units that the modality transformation gives.

    Attributes
    ----------
    width : float
        At least 1 for ``linear``, above 0 for the others (PS3.3 C.11.2.1.2, .3).
    """

    center: float
    width: float
    function: Function = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center) and math.isfinite(self.width)):
            raise InvalidParameter("window", "center and width are no numbers")
        if self.width < 1 and self.function == "linear":
            raise InvalidParameter("window", "a linear window is at least 1 wide")
        if self.width <= 0:
            raise InvalidParameter("window", "the width is not above 0")
        if abs(self.center) > 1e12 or self.width > 1e12:
            raise InvalidParameter("window", "beyond what any image holds")

    @classmethod
    def parse(cls, text: str) -> Window:
        """Read ``center,width,function`` (PS3.18 8.3.5.1.4).

        Raises
        ------
        InvalidParameter
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 3:
            raise InvalidParameter("window", "not center,width,function")
        function = FUNCTIONS.get(parts[2].lower())
        if function is None:
            raise InvalidParameter("window", f"function none of {', '.join(FUNCTIONS)}")
        return cls(decimal("window", parts[0]), decimal("window", parts[1]), function)


@dataclass(frozen=True, slots=True)
class Viewport:
    """The size a picture must fit into, and which part of the image it shows.

    Attributes
    ----------
    width, height : int
        Pixels of the picture; the aspect of the image is kept.
    x, y : float
        Pixels of the image left of, and above, the part.
    region_width, region_height : float or None
        Pixels of the part, negative to flip it; None: to the edge.
    """

    width: int
    height: int
    x: float = 0.0
    y: float = 0.0
    region_width: float | None = None
    region_height: float | None = None

    @classmethod
    def parse(cls, text: str, max_pixels: int) -> Viewport:
        """Read ``vw,vh[,sx,sy,sw,sh]`` (PS3.18 8.3.5.1.3); empty parts default.

        Raises
        ------
        InvalidParameter
            Also when the picture would have more than `max_pixels`.
        """
        parts = [part.strip() for part in text.split(",")]
        if not 2 <= len(parts) <= 6:
            raise InvalidParameter("viewport", "not vw,vh or vw,vh,sx,sy,sw,sh")
        width, height = (whole("viewport", part) for part in parts[:2])
        if width * height > max_pixels:
            raise InvalidParameter("viewport", f"more than {max_pixels} pixels")
        region = [decimal("viewport", part) if part else None for part in parts[2:]] + [
            None
        ] * (6 - len(parts))
        x, y, region_width, region_height = region
        if (x or 0) < 0 or (y or 0) < 0 or 0 in {region_width, region_height}:
            raise InvalidParameter("viewport", "the region is outside the image")
        return cls(width, height, x or 0.0, y or 0.0, region_width, region_height)


@dataclass(frozen=True, slots=True)
class Region:
    """The part of an image that WADO-URI asks for, as shares of it (PS3.18 9.1.2.2.5).

    Attributes
    ----------
    left, top, right, bottom : float
        From 0 to 1.
    """

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read ``xmin,ymin,xmax,ymax``.

        Raises
        ------
        InvalidParameter
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 4:
            raise InvalidParameter("region", "not xmin,ymin,xmax,ymax")
        left, top, right, bottom = (decimal("region", part) for part in parts)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise InvalidParameter("region", "not inside the image")
        return cls(left, top, right, bottom)


def quality_of(name: str, text: str) -> int:
    """Return the quality of a JPEG picture, 1 to 100.

    Raises
    ------
    InvalidParameter
    """
    if not _WHOLE.match(text) or not 1 <= int(text) <= 100:
        raise InvalidParameter(name, "not a whole number from 1 to 100")
    return int(text)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How one picture is wanted.

    Attributes
    ----------
    max_width, max_height : int or None
        Of WADO-URI: the picture fits into what is given of them.
    overlays : bool
        Whether graphic overlay planes of the image are burned in.
    max_pixels : int
        Of the picture, whatever else is asked.
    """

    media_type: str = JPEG
    quality: int = DEFAULT_QUALITY
    window: Window | None = None
    viewport: Viewport | None = None
    region: Region | None = None
    max_width: int | None = None
    max_height: int | None = None
    annotations: frozenset[str] = field(default_factory=frozenset)
    icc_profile: str = "no"
    overlays: bool = True
    max_pixels: int = 1 << 25

    def arguments(self) -> dict[str, Any]:
        """Return it as plain JSON values, for a worker process."""
        window, viewport, region = self.window, self.viewport, self.region
        return {
            "media_type": self.media_type,
            "quality": self.quality,
            "window": window and [window.center, window.width, window.function],
            "viewport": viewport
            and [
                viewport.width,
                viewport.height,
                viewport.x,
                viewport.y,
                viewport.region_width,
                viewport.region_height,
            ],
            "region": region and [region.left, region.top, region.right, region.bottom],
            "max_width": self.max_width,
            "max_height": self.max_height,
            "annotations": sorted(self.annotations),
            "icc_profile": self.icc_profile,
            "overlays": self.overlays,
            "max_pixels": self.max_pixels,
        }

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Wanted:
        """Return what `arguments` gave."""
        made = dict(arguments)
        for name, kind in (
            ("window", Window),
            ("viewport", Viewport),
            ("region", Region),
        ):
            made[name] = made[name] and kind(*made[name])
        made["annotations"] = frozenset(made["annotations"])
        return cls(**made)
