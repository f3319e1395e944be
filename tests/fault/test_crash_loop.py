"""D01: processes are killed while they store."""

from __future__ import annotations

from pathlib import Path

from tests.fault import crash_loop


def test_d01_what_was_acknowledged_survives_ten_kills(tmp_path: Path) -> None:
    outcome = crash_loop.run(tmp_path, kills=10, seed=20240102)

    assert outcome.faults == [], outcome.line()
    assert outcome.kills.total() == 10
    assert outcome.acknowledged > 0
