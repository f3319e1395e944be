"""Masks of segmentations as runs of pixels.

A run is a start and a length in the row-major order of a frame's pixels; runs of one
mask increase and do not touch. Where a segmentation is fractional, each run carries
its value too: equal neighbours are one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.kernel.errors import InvalidParameter, MalformedObject

#: Runs of one mask; what has more is noise, and is cut with a word about it.
MAX_RUNS: Final = 200_000


def pack(asked: Mapping[str, Any], body: bytes | memoryview) -> list[dict[str, Any]]:
    """Return the masks of some frames.

    Parameters
    ----------
    asked : mapping
        ``rows``, ``columns``, ``bits`` (1, 8 or 16), ``first_bit`` (bits of `body`
        before the first frame), ``frames`` (how many), ``kind`` (``binary``,
        ``fractional`` or ``labelmap``), ``background`` (of a label map).
    body : bytes-like
        Native little endian samples, frame after frame.

    Returns
    -------
    list of dict
        For each frame a mapping from segment number (0 where the frame itself says
        which segment it shows) to ``{"runs": …, "values": …, "pixels": …}``.
    """
    rows, columns, bits = asked["rows"], asked["columns"], asked["bits"]
    n_frames, size = asked["frames"], rows * columns
    samples = _samples(body, bits, asked["first_bit"], n_frames * size)
    found = []
    for n in range(n_frames):
        frame = samples[n * size : (n + 1) * size]
        if asked["kind"] == "labelmap":
            found.append(_labels(frame, asked.get("background")))
        elif asked["kind"] == "fractional":
            found.append({"0": _mask(frame, valued=True)})
        else:
            found.append({"0": _mask(frame != 0, valued=False)})
    return found


def _samples(
    body: bytes | memoryview, bits: int, first_bit: int, count: int
) -> NDArray[Any]:
    if bits == 1:
        packed = np.frombuffer(body, np.uint8)
        samples: NDArray[Any] = np.unpackbits(packed, bitorder="little")[first_bit:]
    elif bits in {8, 16}:
        samples = np.frombuffer(body, f"<u{bits // 8}")
    else:
        raise InvalidParameter("bits", f"{bits} bits are no segmentation")
    if samples.size < count:
        raise MalformedObject("a segmentation has fewer pixels than frames")
    return samples[:count]


def _mask(frame: NDArray[Any], *, valued: bool) -> dict[str, Any]:
    """Return the runs of equal values other than 0."""
    edges = np.flatnonzero(frame[1:] != frame[:-1]) + 1
    starts = np.concatenate(([0], edges))
    lengths = np.diff(np.concatenate((starts, [frame.size])))
    values = frame[starts]
    seen = values != 0
    starts, lengths, values = starts[seen], lengths[seen], values[seen]
    found: dict[str, Any] = {"pixels": int(lengths.sum())}
    if len(starts) > MAX_RUNS:
        found["truncated"] = True
        starts, lengths = starts[:MAX_RUNS], lengths[:MAX_RUNS]
        values = values[:MAX_RUNS]
    found["runs"] = np.stack((starts, lengths), 1).reshape(-1).tolist()
    if valued:
        found["values"] = values.astype(int).tolist()
    return found


def _labels(frame: NDArray[Any], background: int | None) -> dict[str, dict[str, Any]]:
    skipped = 0 if background is None else background
    return {
        str(int(label)): _mask(frame == label, valued=False)
        for label in np.unique(frame)
        if label != skipped
    }
