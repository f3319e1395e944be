"""What worker processes do for rendering: handlers of `pacs.imaging.pool.Job`."""

from __future__ import annotations

from typing import Any

from PIL import Image

from pacs.rendering.header import Header, read_header
from pacs.rendering.parameters import GIF, Wanted
from pacs.rendering.picture import encode, encode_animation, with_profile
from pacs.rendering.pipeline import Subject, frame_milliseconds, picture_of
from pacs.rendering.pixels import read_frame
from pacs.rendering.softcopy import references
from storage.kernel.errors import TooLarge

Answer = tuple[dict[str, Any], bytes]

#: Pillow's own guard against bombs is for files; nothing here opens one.
Image.MAX_IMAGE_PIXELS = None


def render(arguments: dict[str, Any], payloads: list[bytearray]) -> Answer:
    """Render frames of one object.

    Arguments: `syntax` of the frames, `header_syntax`, `indexes` of the frames from 0,
    `wanted` (`Wanted.arguments`), `instance_uid`, `pixel_tag`, `words`, `key`,
    `max_bytes` of one decoded frame, and `state_syntax` when there is a presentation
    state. Payloads: the header, the presentation state if any, the frames.

    Returns
    -------
    dict, bytes
        `width`, `height`, `warnings`, `frames`; the file.
    """
    wanted = Wanted.from_arguments(arguments["wanted"])
    indexes = arguments["indexes"]
    data, *rest = payloads
    state: Header | None = None
    if arguments.get("state_syntax"):
        state = read_header(rest.pop(0), arguments["state_syntax"])
    pictures: list[Image.Image] = []
    warnings: set[str] = set()
    pixels = 0
    key = bytes.fromhex(arguments["key"])
    header = read_header(data, arguments["header_syntax"], indexes[0], key)
    for index, stored in zip(indexes, rest, strict=True):
        if pictures and header.groups:
            header = read_header(data, arguments["header_syntax"], index, key)
        frame = read_frame(
            header,
            stored,
            arguments["syntax"],
            arguments["max_bytes"],
            pixel_tag=arguments["pixel_tag"],
            words=arguments["words"],
        )
        subject = Subject(header, frame, index, arguments["instance_uid"], state)
        picture, more = picture_of(subject, wanted)
        warnings |= more
        pictures.append(picture)
        pixels += picture.width * picture.height
        # Bound: all frames of an animation together.
        if len(indexes) > 1 and pixels > wanted.max_pixels:
            raise TooLarge("rendered_pixels", wanted.max_pixels)
    head = {
        "width": pictures[0].width,
        "height": pictures[0].height,
        "frames": len(pictures),
    }
    if wanted.media_type == GIF:
        body = encode_animation(pictures, frame_milliseconds(header))
    else:
        picture, profile = with_profile(pictures[0], header, wanted.icc_profile)
        body = encode(picture, wanted.media_type, wanted.quality, profile)
    return {**head, "warnings": sorted(warnings)}, body


def referenced(arguments: dict[str, Any], payloads: list[bytearray]) -> Answer:
    """List the images that a presentation state, or a key object selection, names.

    Returns
    -------
    dict, bytes
        `references`: series UID, instance UID, first frame number or 1.
    """
    from pacs.rendering.document import selected

    state = read_header(payloads[0], arguments["syntax"])
    found = [
        (one.series_uid, one.instance_uid, one.frames[0] if one.frames else 1)
        for one in (*references(state), *selected(state))
    ]
    return {"references": found[:1000]}, b""
