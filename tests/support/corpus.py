"""The corpus of public images, where it lies beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT.parent / "shared" / "corpus"

#: Skips, by name, what needs the corpus on a machine that has none.
needs_corpus = pytest.mark.skipif(
    not CORPUS.is_dir(), reason=f"no corpus of public images at {CORPUS}"
)


def files(folder: str | None = None) -> list[Path]:
    """Return the files of one folder, or all but the broken ones; [] without corpus."""
    if folder is not None:
        return sorted((CORPUS / folder).rglob("*.dcm"))
    return sorted(
        path
        for path in CORPUS.rglob("*.dcm")
        if path.relative_to(CORPUS).parts[0] != "broken"
    )


def broken() -> list[Path]:
    """Return the files that no archive should take at their word."""
    return files("broken")
