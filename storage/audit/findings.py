"""What a verification of a chain says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum

from storage.audit.chain import GENESIS

#: Findings that are listed; all are counted.
LISTED = 100
_MARK_CHARS = 32


class Damage(StrEnum):
    """What is wrong with a chain."""

    ALTERED = "altered"
    MISSING = "missing"
    MISPLACED = "misplaced"
    FORGED = "forged"
    EXTRA = "extra"
    TRUNCATED = "truncated"
    ROLLED_BACK = "rolled_back"
    HEAD = "head"
    ANCHOR = "anchor"
    MEMORY = "memory"
    UNKNOWN = "unknown"
    UNCHECKED = "unchecked"


def mark(*found: object) -> str:
    """Return a digest of what was found: numbers, text, bytes, or nothing."""
    # ASCII: what counts as printable differs between versions of Python.
    return hashlib.sha256(ascii(found).encode()).hexdigest()[:_MARK_CHARS]


@dataclass(frozen=True, slots=True)
class Finding:
    """One damage.

    Attributes
    ----------
    sequence : int
        The first record it concerns.
    mark : str
        Digest of what was found there: whoever accepts this damage accepts no other
        one at the same place.
    """

    sequence: int
    damage: Damage
    detail: str
    mark: str = ""

    @property
    def key(self) -> str:
        """Return what is damaged, and how: the same in every verification."""
        return f"{self.sequence}:{self.damage}:{self.mark}"

    def __str__(self) -> str:
        return f"record {self.sequence}: {self.damage}: {self.detail}"


@dataclass(slots=True)
class Verification:
    """What one verification of a chain found.

    Attributes
    ----------
    records : int
        Records looked at.
    sequence, hash : int, bytes
        The last of them; to be noted elsewhere.
    first : Finding or None
        The one that concerns the earliest record.
    findings : list of Finding
        The first `LISTED` that were met.
    n_findings : int
    accepted : list of Finding
        Those that somebody has accepted since (`storage.audit.accept`); they are not
        among `findings`.
    unchecked : int
        Signed records whose contents cannot be checked, because the record before
        is missing or damaged: each is a finding. Before the first record of a part
        of a chain nothing is missing, so that one is none.
    """

    stream: str
    records: int = 0
    sequence: int = 0
    hash: bytes = GENESIS
    first: Finding | None = None
    findings: list[Finding] = field(default_factory=list)
    n_findings: int = 0
    accepted: list[Finding] = field(default_factory=list)
    unchecked: int = 0

    @property
    def is_clean(self) -> bool:
        return not self.n_findings

    def add(self, sequence: int, damage: Damage, detail: str, *found: object) -> None:
        """Note one damage, and what makes it this one (`mark`)."""
        finding = Finding(sequence, damage, detail, mark(*found))
        self.n_findings += 1
        if len(self.findings) < LISTED:
            self.findings.append(finding)
        if self.first is None or sequence < self.first.sequence:
            self.first = finding

    def leave_out(self, accepted: frozenset[str]) -> None:
        """Move the findings that were accepted where they belong."""
        if not accepted:
            return
        self.accepted = [one for one in self.findings if one.key in accepted]
        self.findings = [one for one in self.findings if one.key not in accepted]
        self.n_findings -= len(self.accepted)
        self.first = min(
            self.findings, key=lambda finding: finding.sequence, default=None
        )
