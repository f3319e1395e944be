"""What a doctor is likely to open next: the rules, as data.

Each series other than the present one gets the sum of the weights that apply to it; the
best ones are read ahead. `NEXT` is for series of the study that is open, `PRIOR` for
those of its newest comparable prior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from viewer.sources import SeriesFacts, StudyFacts

#: Series of one request that are read ahead, and the bytes of each.
MAX_SERIES: Final = 4
MAX_BYTES: Final = 512 * 1024 * 1024
#: A series below this is not worth reading ahead.
THRESHOLD: Final = 2.0


@dataclass(frozen=True, slots=True)
class Likely:
    """A series that is worth reading ahead, and what spoke for it."""

    study: str
    series: str
    score: float
    reasons: tuple[str, ...]


Applies = Callable[[SeriesFacts, SeriesFacts], bool]

#: Name of a reason: when it applies to (present series, other series).
REASONS: Final[Mapping[str, Applies]] = {
    "same_modality": lambda now, other: now.modality == other.modality,
    "same_body_part": lambda now, other: (
        bool(now.body_part) and now.body_part.upper() == other.body_part.upper()
    ),
    "same_description": lambda now, other: (
        bool(now.description) and now.description == other.description
    ),
    "next_number": lambda now, other: (
        now.number is not None
        and other.number is not None
        and 0 < other.number - now.number <= 1
    ),
    "later_number": lambda now, other: (
        now.number is not None
        and other.number is not None
        and other.number > now.number
    ),
    "same_plane": lambda now, other: (
        now.volume is not None
        and other.volume is not None
        and _parallel(now.volume.along, other.volume.along)
    ),
    "is_volume": lambda _now, other: other.volume is not None,
    "same_count": lambda now, other: now.n_frames == other.n_frames,
}

NEXT: Final[Mapping[str, float]] = {
    "same_modality": 1.0,
    "same_body_part": 0.5,
    "next_number": 2.0,
    "later_number": 1.0,
    "same_plane": 0.5,
    "is_volume": 0.5,
}
PRIOR: Final[Mapping[str, float]] = {
    "same_modality": 1.0,
    "same_body_part": 1.0,
    "same_description": 2.0,
    "same_plane": 1.0,
    "is_volume": 0.5,
    "same_count": 0.5,
}


def _parallel(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return abs(sum(a * b for a, b in zip(one, other, strict=True))) > 0.9


def ranked(
    study: StudyFacts,
    now: SeriesFacts,
    weights: Mapping[str, float],
    others: Sequence[SeriesFacts] | None = None,
) -> list[Likely]:
    """Return the series worth reading ahead, the likeliest first.

    Parameters
    ----------
    study : StudyFacts
        Whose series are weighed.
    now : SeriesFacts
        The series that is open.
    """
    found = []
    for other in study.series if others is None else others:
        if other.series == now.series or other.kind != "image":
            continue
        if other.size_bytes > MAX_BYTES:
            continue
        reasons = tuple(name for name in weights if REASONS[name](now, other))
        score = sum(weights[name] for name in reasons)
        if score >= THRESHOLD:
            found.append(Likely(study.study, other.series, score, reasons))
    # Stable: equals stay in the order of the study.
    return sorted(found, key=lambda one: -one.score)[:MAX_SERIES]
