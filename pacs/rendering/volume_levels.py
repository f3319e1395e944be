"""Frames at half, a quarter … of their size, for the first look at a series."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: The coarsest level: a 32nd of the rows and columns.
MAX_LEVEL: Final = 5


def reduced_size(rows: int, columns: int, level: int) -> tuple[int, int]:
    """Return rows and columns of a frame at `level`; the last ones may be partial."""
    step = 1 << level
    return -(-rows // step), -(-columns // step)


def reduce(
    data: bytes,
    *,
    rows: int,
    columns: int,
    samples: int,
    dtype: str,
    level: int,
    planar: bool,
    average: bool,
) -> bytes:
    """Return a native frame at `level`, in the same sample form.

    Parameters
    ----------
    average : bool
        Else every 2**level-th pixel is taken: the average of two entries of a palette
        is another colour altogether.
    """
    shape = (samples, rows, columns) if planar else (rows, columns, samples)
    frame: NDArray[Any] = np.frombuffer(data, dtype, rows * columns * samples)
    frame = frame.reshape(shape)
    if not planar:
        frame = np.moveaxis(frame, 2, 0)
    step = 1 << level
    made = _averaged(frame, step) if average else frame[:, ::step, ::step]
    if not planar:
        made = np.moveaxis(made, 0, 2)
    return np.ascontiguousarray(made).tobytes()


def _averaged(frame: NDArray[Any], step: int) -> NDArray[Any]:
    """Return the means of blocks of pixels; at the borders, of what there is."""
    _, rows, columns = frame.shape
    row_starts = np.arange(0, rows, step)
    column_starts = np.arange(0, columns, step)
    sums = np.add.reduceat(frame, row_starts, axis=1, dtype=np.float64)
    sums = np.add.reduceat(sums, column_starts, axis=2)
    heights = np.diff(np.append(row_starts, rows))
    widths = np.diff(np.append(column_starts, columns))
    means = sums / (heights[:, None] * widths[None, :])
    rounded: NDArray[Any] = np.rint(means).astype(frame.dtype)
    return rounded
