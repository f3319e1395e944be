"""The body of ``POST /api/v1/viewer/render``: what a picture should show.

Numbers are bounded and finite here; what only the volume can tell (its own bounds, the
work a slab means) is checked where the volume is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from storage.kernel.errors import InvalidParameter
from viewer.sources import PlaneView, ProjectionView

#: Nothing in or around a patient is farther away (mm).
FAR = 100_000.0
#: Of volume renderings: it is made for values of any unit.
PRESET = "surface"
Millimetres = Annotated[FiniteFloat, Field(ge=-FAR, le=FAR)]
Distance = Annotated[FiniteFloat, Field(ge=0.001, le=1000.0)]
Size = Annotated[int, Field(ge=1, le=8192, strict=True)]
Cosine = Annotated[FiniteFloat, Field(ge=-FAR, le=FAR)]
Point = tuple[Millimetres, Millimetres, Millimetres]
Direction = tuple[Cosine, Cosine, Cosine]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Window(_Body):
    """Window of a linear VOI function (PS3.3 C.11.2.1.2.1)."""

    center: FiniteFloat = Field(ge=-1e9, le=1e9)
    width: FiniteFloat = Field(ge=1, le=1e9)


class SlabBody(_Body):
    """Several parallel planes seen as one."""

    thickness: FiniteFloat = Field(gt=0, le=2000, description="mm")
    mode: Literal["mip", "minip", "average"] = "mip"


class PlaneBody(_Body):
    """Where a plane lies: right and down, and a point of it."""

    right: Direction
    down: Direction
    origin: Point | None = Field(None, description="centre of the first pixel, mm")
    through: Point | None = Field(None, description="or a point of the plane, mm")


class RenderBody(_Body):
    """What a picture should show."""

    stack: int = Field(0, ge=0, le=10_000, strict=True)
    kind: Literal["plane", "volume"] = "plane"
    format: Literal["png", "jpeg", "webp", "int16"] = "png"
    quality: int = Field(85, ge=1, le=100, strict=True)
    width: Size | None = None
    height: Size | None = None

    plane: Literal["axial", "coronal", "sagittal"] | PlaneBody | None = None
    position: Millimetres | None = Field(None, description="of a preset plane, mm")
    through: Point | None = Field(None, description="a point of a preset plane, mm")
    spacing: Distance | tuple[Distance, Distance] | None = None
    slab: SlabBody | None = None
    interpolation: Literal["linear", "nearest"] = "linear"
    window: Window | None = None
    invert: bool = Field(default=False, strict=True)

    preset: Annotated[str, Field(pattern=r"^[a-z-]{1,32}$")] | None = Field(
        None, description=f"of a volume rendering; else {PRESET}"
    )
    azimuth: FiniteFloat = Field(0.0, ge=-3600, le=3600, description="degrees")
    elevation: FiniteFloat = Field(0.0, ge=-90, le=90, description="degrees")
    zoom: FiniteFloat = Field(1.0, ge=0.1, le=20)
    step: FiniteFloat = Field(1.0, ge=0.25, le=8)

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        volume = self.kind == "volume"
        of_other = _VOLUME if not volume else _PLANE
        wrong = sorted(of_other & self.model_fields_set)
        if wrong:
            raise ValueError(f"{wrong[0]} does not belong to a {self.kind}")
        if volume and self.format == "int16":
            raise ValueError("a volume rendering has no values: not int16")
        oblique = isinstance(self.plane, PlaneBody)
        if oblique and (self.position is not None or self.through is not None):
            raise ValueError("position and through belong to a preset plane")
        return self

    def view(self) -> PlaneView | ProjectionView:
        """Return what is asked for."""
        if self.kind == "volume":
            return ProjectionView(
                preset=self.preset or PRESET,
                azimuth=self.azimuth,
                elevation=self.elevation,
                zoom=self.zoom,
                rows=self.height or 512,
                columns=self.width or 512,
                step=self.step,
                format=self.format,
                quality=self.quality,
            )
        plane = self.plane or "axial"
        spacing = self.spacing
        if isinstance(spacing, float):
            spacing = (spacing, spacing)
        placed: dict[str, Any] = {
            "preset": plane,
            "position": self.position,
            "through": self.through,
        }
        if isinstance(plane, PlaneBody):
            placed = {
                "right": plane.right,
                "down": plane.down,
                "origin": plane.origin,
                "through": plane.through,
            }
        return PlaneView(
            **placed,
            spacing=spacing,
            rows=self.height,
            columns=self.width,
            thickness=None if self.slab is None else self.slab.thickness,
            projection="mip" if self.slab is None else self.slab.mode,
            interpolation=self.interpolation,
            window=None
            if self.window is None
            else (self.window.center, self.window.width),
            invert=self.invert,
            format=self.format,
            quality=self.quality,
        )


_PLANE = frozenset(
    (
        "plane", "position", "through", "spacing", "slab", "interpolation",
        "window", "invert",
    )
)  # fmt: skip
_VOLUME = frozenset(("preset", "azimuth", "elevation", "zoom", "step"))


def parse(body: Mapping[str, Any]) -> RenderBody:
    """Return a checked body.

    Raises
    ------
    InvalidParameter
        Something is missing, out of range or of the wrong form; it is named.
    """
    try:
        return RenderBody.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"])) or "body"
        raise InvalidParameter(name, str(first["msg"])) from error
