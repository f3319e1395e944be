"""Headers and pictures made from data sets, without a server or a process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from pacs.imaging import syntaxes
from pacs.imaging.dataset import inflate, scan
from pacs.imaging.frames import frame_ranges
from pacs.imaging.part10 import read_file_meta
from pacs.rendering.header import Header, read_header
from pacs.rendering.jobs import render
from pacs.rendering.parameters import PNG, Wanted
from storage.kernel.limits import GIB, Limits

Pixels = NDArray[np.uint8]


def encoded(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Return a data set, which need not be whole, in a native transfer syntax."""
    out = DicomBytesIO()
    out.is_implicit_VR = UID(syntax).is_implicit_VR
    out.is_little_endian = UID(syntax).is_little_endian
    write_dataset(out, ds)
    return out.getvalue()


def header(ds: Dataset, syntax: str = ExplicitVRLittleEndian, index: int = 0) -> Header:
    """Return a data set as rendering reads it."""
    return read_header(encoded(ds, syntax), syntax, index)


def arguments(
    file: bytes, numbers: tuple[int, ...], wanted: Wanted
) -> tuple[dict[str, Any], list[bytearray]]:
    """Return what the job gets that renders frames of a file."""
    meta = read_file_meta(file)
    assert meta is not None
    body, uid = file[meta.dataset_offset :], meta.transfer_syntax_uid
    syntax = syntaxes.get(uid)
    if syntax.deflated:
        body = inflate(body, Limits())
    found = scan(body, 0, len(body), uid, Limits())
    frames = found.text(0x00280008)
    table = frame_ranges(found, int(frames) if frames.isdigit() else 1)
    plain = syntaxes.EXPLICIT_VR_LE
    assert found.pixel is not None
    given = {
        "wanted": wanted.arguments(),
        "indexes": [number - 1 for number in numbers],
        "header_syntax": plain if syntax.encapsulated or syntax.deflated else uid,
        "syntax": plain if syntax.deflated else uid,
        "instance_uid": found.text(0x00080018),
        "pixel_tag": found.pixel.tag,
        "words": body[found.header_end + 4 : found.header_end + 6] == b"OW",
        "key": "",
        "max_bytes": GIB,
    }
    payloads = [bytearray(body[: found.header_end])]
    for number in numbers:
        parts = table.ranges(number)
        if given["words"] and not syntax.little_endian and len(table) == 1:
            parts = [(at, n + n % 2) for at, n in parts]
        payloads.append(bytearray(b"".join(body[at : at + n] for at, n in parts)))
    return given, payloads


def rendered(
    file: bytes | Path,
    wanted: Wanted | None = None,
    *,
    number: int = 1,
    state: Dataset | None = None,
) -> Pixels:
    """Return the picture of one frame, losslessly: grey, or RGB."""
    data = file.read_bytes() if isinstance(file, Path) else file
    given, payloads = arguments(data, (number,), wanted or Wanted(PNG))
    if state is not None:
        given["state_syntax"] = syntaxes.EXPLICIT_VR_LE
        payloads.insert(1, bytearray(encoded(state)))
    _, body = render(given, payloads)
    return np.asarray(Image.open(io.BytesIO(body)))
