"""The query parameters of rendered and thumbnail resources (PS3.18 8.3.5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pacs.rendering.parameters import (
    ANNOTATIONS,
    ICC_PROFILES,
    JPEG,
    Viewport,
    Wanted,
    Window,
    quality_of,
    whole,
)
from pacs.services.thumbnails import DEFAULT_SIZE
from storage.kernel.errors import InvalidParameter


def wanted_of(
    query: Mapping[str, str], media_type: str, max_pixels: int
) -> tuple[Wanted, list[str]]:
    """Return what the rendering parameters of a request ask for, and warnings.

    Parameters that do not apply to the media type are ignored, as are those with
    other names (PS3.18 8.3.5.1).

    Raises
    ------
    InvalidParameter
    """
    wanted = Wanted(media_type, max_pixels=max_pixels)
    warnings: list[str] = []
    window, viewport = query.get("window"), query.get("viewport")
    if window is not None:
        wanted = replace(wanted, window=Window.parse(window))
    if viewport is not None:
        wanted = replace(wanted, viewport=Viewport.parse(viewport, max_pixels))
    quality = query.get("quality")
    if quality is not None and media_type == JPEG:
        wanted = replace(wanted, quality=quality_of("quality", quality))
    annotation = query.get("annotation")
    if annotation:
        asked = {part.strip().lower() for part in annotation.split(",")} - {""}
        if asked - ANNOTATIONS:
            known = " and ".join(sorted(ANNOTATIONS))
            warnings.append(
                f"The annotation parameter knows {known} only; others are ignored."
            )
        wanted = replace(wanted, annotations=frozenset(asked & ANNOTATIONS))
    profile = query.get("iccprofile")
    if profile is not None:
        if profile not in ICC_PROFILES:
            known = ", ".join(sorted(ICC_PROFILES))
            raise InvalidParameter("iccprofile", f"none of {known}")
        wanted = replace(wanted, icc_profile=profile)
    return wanted, warnings


def thumbnail_size(query: Mapping[str, str], max_pixels: int) -> tuple[int, int]:
    """Return the size that a thumbnail must fit into; of its parameters only that.

    Raises
    ------
    InvalidParameter
    """
    text = query.get("viewport")
    if text is None:
        return DEFAULT_SIZE, DEFAULT_SIZE
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2:
        raise InvalidParameter("viewport", "not vw,vh")
    width, height = (whole("viewport", part) for part in parts)
    if width * height > max_pixels:
        raise InvalidParameter("viewport", f"more than {max_pixels} pixels")
    return width, height
