"""What one overlay answer may hold, and how stored values are read into it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pacs.domain.attributes import Attributes, numbers, reference
from storage.kernel.errors import ImagingError
from storage.kernel.limits import Limits

#: Decimals of coordinates: a hundredth of a pixel, a thousandth of a millimetre.
DECIMALS: Final = 3
#: Values by reference that one object may have read.
MAX_REFERENCES: Final = 256

#: Returns the bytes of a value that the attributes give by reference.
Resolve = Callable[[str], bytes]


@dataclass(slots=True)
class Budget:
    """What is left of the limits of one answer.

    Attributes
    ----------
    truncated : bool
        Something did not fit and was left out.
    """

    points: int
    masks: int
    runs: int
    truncated: bool = False
    problems: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, limits: Limits) -> Budget:
        return cls(limits.overlay_points, limits.overlay_masks, limits.overlay_runs)

    def take_points(self, n: int) -> bool:
        """Take room for `n` points; False, and marked, when there is none."""
        if n > self.points:
            self.truncated = True
            return False
        self.points -= n
        return True

    def take_mask(self, n_runs: int) -> bool:
        """Take room for a mask."""
        if not self.masks or n_runs > self.runs:
            self.truncated = True
            return False
        self.masks -= 1
        self.runs -= n_runs
        return True

    def problem(self, instance: str, reason: str) -> None:
        """Note what could not be shown."""
        if len(self.problems) < 100:
            self.problems.append({"instance": instance, "reason": reason})


@dataclass(slots=True)
class Reader:
    """Reads numbers of one object, also those that are given by reference."""

    instance: str
    resolve: Resolve
    left: int = MAX_REFERENCES

    def coordinates(
        self, attributes: Attributes, tag: str, size: int, vr: str = "FL"
    ) -> list[list[float]] | None:
        """Return points of `size` coordinates each; None without, or if they are bad.

        Parameters
        ----------
        vr : {"FL", "DS"}
            Of the attribute: long values may be UN (PS3.5 6.2.2).
        """
        found: Sequence[float] | None = numbers(attributes, tag)
        if found is None:
            path = reference(attributes, tag)
            if not path or not self.left:
                return None
            self.left -= 1
            try:
                raw = self.resolve(path)
            except ImagingError:
                return None
            found = _parsed(raw, vr)
        if not found or len(found) % size:
            return None
        rounded = [round(value, DECIMALS) for value in found]
        return [rounded[n : n + size] for n in range(0, len(rounded), size)]


def _parsed(raw: bytes, vr: str) -> list[float] | None:
    try:
        if vr == "FL":
            found = list(struct.unpack(f"<{len(raw) // 4}f", raw))
        else:
            text = raw.decode("ascii").strip(" \0")
            found = [float(part) for part in text.split("\\")]
    except (ValueError, struct.error):
        return None
    return found if all(map(math.isfinite, found)) else None


def described(**members: Any) -> dict[str, Any]:
    """Return what is neither None nor empty."""
    return {
        name: value
        for name, value in members.items()
        if value is not None and value not in ("", [], {})
    }
