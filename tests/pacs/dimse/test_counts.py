"""Associations counted over processes."""

from __future__ import annotations

import os
import signal

from pacs.dimse.server import AssociationCounts
from storage.kernel.settings import Settings


def test_the_limits_hold_over_all_slots() -> None:
    counts = AssociationCounts(slots=2, most=3, most_per_ae=2)

    assert counts.claim(0, "A", monitor=False) is not None
    cell = counts.claim(1, "A", monitor=False)
    assert cell is not None
    assert counts.claim(0, "A", monitor=False) is None
    assert counts.claim(1, "B", monitor=False) is not None
    assert counts.claim(0, "C", monitor=False) is None
    assert counts.claim(0, "C", monitor=True) is not None
    assert counts.claim(0, "D", monitor=True) is None
    counts.release(cell)
    assert counts.open() == 3


def test_for_settings() -> None:
    settings = Settings.model_validate({"dimse": {"max_associations": 2}})

    counts = AssociationCounts.for_settings(settings, 2)

    assert [counts.claim(0, ae, monitor=False) is None for ae in "ABC"] == [
        False,
        False,
        True,
    ]


def test_what_a_killed_process_held_is_forgotten() -> None:
    counts = AssociationCounts(slots=2, most=4, most_per_ae=4)
    counts.claim(0, "A", monitor=False)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        counts.claim(1, "A", monitor=False)
        counts.claim(1, "B", monitor=False)
        counts.set_load(1, 2)
        with counts.locked():
            os.write(writing, b".")
            signal.pause()
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert counts.open() == 3

    counts.reset(1)

    assert counts.open() == 1
    assert not counts.is_busiest(0)
    counts.set_load(0, 1)
    assert counts.is_busiest(0)
    assert not counts.is_busiest(1)
