"""``make bench``: run the groups, print the tables, keep the figures.

``python -m tests.bench [GROUP...] [--rounds N]``. Data and results lie in ``.bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.groups import GROUPS
from tests.bench.measure import Comparison

ROUNDS = 5


def main() -> int:
    """Run what was asked for; fail when a floor is missed or a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[[], *GROUPS], metavar="GROUP")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    cache = Path(".bench").resolve()
    cache.mkdir(exist_ok=True)
    say(
        f"Huying beside Orthanc, DCMTK: {platform.machine()}, {os.cpu_count()} cores,"
        f" load {os.getloadavg()[0]:.1f}, Python {platform.python_version()},"
        f" {asked.rounds} rounds, everything on loopback."
    )
    done: list[Comparison] = []

    def report(compared: Comparison) -> None:
        done.append(compared)
        for line in compared.lines():
            say(line)

    for name in asked.groups or list(GROUPS):
        started = time.monotonic()
        GROUPS[name](cache, asked.rounds, report)
        say(f"\n[{name}: {time.monotonic() - started:.0f} s]")
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    kept = cache / "results" / f"{stamp}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps([asdict(one) for one in done], indent=1))
    say(f"\nTargets (results in {kept.name}):")
    verdicts = [(one.name, line) for one in done for line in one.verdicts()]
    for name, line in verdicts:
        say(f"  {name}: {line}")
    missed = any("MISSED" in line for _, line in verdicts)
    failed = any(
        s.failed for one in done for all_ in one.samples.values() for s in all_
    )
    return int(missed or failed)


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
