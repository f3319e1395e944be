"""Run one job against several servers in turn, and say how they compare."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

from tests.bench.servers import Server, cpu_seconds, pss_mib


@dataclass(frozen=True, slots=True)
class Sample:
    """One run against one server.

    Attributes
    ----------
    seconds : float
        For `n` units of work.
    cpu_seconds : float
        Of the server's processes, its worker left out.
    """

    n: int
    n_bytes: int
    seconds: float
    cpu_seconds: float
    failed: int
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def rate(self) -> float:
        return self.n / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """What `../performance` asks for: ours over theirs, or theirs over ours for CPU."""

    reference: str
    must: float
    aim: float
    ours: str = "huying"
    by_cpu: bool = False


@dataclass(slots=True)
class Comparison:
    """All samples of a job, by server."""

    name: str
    unit: str
    targets: Sequence[Target] = ()
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, target: Target) -> float | None:
        """Return the median of the rounds' ratios, or None without a pair."""
        ours = self.samples.get(target.ours, [])
        theirs = self.samples.get(target.reference, [])
        pairs = list(zip(ours, theirs, strict=False))
        if not pairs:
            return None
        if target.by_cpu:
            return median(
                (b.cpu_seconds / b.n) / max(1e-9, a.cpu_seconds / a.n) for a, b in pairs
            )
        return median(a.rate / b.rate for a, b in pairs if b.rate) if pairs else None

    def lines(self) -> list[str]:
        """Return the table of this job as text."""
        shown = [f"\n{self.name}  [{self.unit}; median, min-max]"]
        shown += [f"  {note}" for note in self.notes]
        for label, samples in self.samples.items():
            rates = [one.rate for one in samples]
            shown.append(
                f"  {label:<24}{median(rates):>10.1f}/s"
                f"  [{min(rates):.1f}-{max(rates):.1f}]"
                f"  {median(s.n_bytes / s.seconds for s in samples) / 1e6:>8.1f} MB/s"
                f"  p50 {median(s.p50_ms for s in samples):>8.2f} ms"
                f"  p99 {median(s.p99_ms for s in samples):>8.2f} ms"
                f"  cpu {median(1e3 * s.cpu_seconds / s.n for s in samples):>8.3f} ms"
                f"  failed {sum(s.failed for s in samples)}"
            )
        shown += [f"    {line}" for line in self.verdicts()]
        return shown

    def verdicts(self) -> list[str]:
        """Return one line per target: the ratio, the floor, the aim."""
        said = []
        for target in self.targets:
            ratio = self.ratio(target)
            if ratio is None:
                continue
            met = (
                "aim"
                if ratio >= target.aim
                else "must"
                if ratio >= target.must
                else "MISSED"
            )
            what = "less CPU than" if target.by_cpu else "x"
            said.append(
                f"{target.ours} {ratio:.2f} {what} {target.reference}"
                f"  (must {target.must:g}, aim {target.aim:g}): {met}"
            )
        return said


def clients(server: Server, wanted: list[dict[str, Any]]) -> Sample:
    """Run clients against `server` in a process of their own."""
    before = cpu_seconds(server.pid)
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.senders"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{server.label}: {done.stderr.strip()[-500:]}")
    spent = cpu_seconds(server.pid) - before
    result = json.loads(done.stdout)
    latencies = result["latencies"]
    middle = latencies[len(latencies) // 2] if latencies else result["seconds"]
    late = latencies[int(len(latencies) * 0.99)] if latencies else result["seconds"]
    return Sample(
        n=result["n"],
        n_bytes=result["n_bytes"],
        seconds=result["seconds"],
        cpu_seconds=spent,
        failed=result["failed"],
        p50_ms=middle * 1e3,
        p99_ms=late * 1e3,
    )


def interleaved(
    comparison: Comparison,
    servers: Sequence[Server],
    run: Callable[[Server, int], Sample],
    *,
    rounds: int,
) -> Comparison:
    """Run a job `rounds` times against each server, in turn."""
    for number in range(rounds):
        # The order turns, so that nobody always comes after the same neighbour.
        for server in (
            *servers[number % len(servers) :],
            *servers[: number % len(servers)],
        ):
            sample = run(server, number)
            comparison.samples.setdefault(server.label, []).append(sample)
    return comparison


class MemoryWatch:
    """Notes the peak memory of a server while it is watched."""

    def __init__(self, pid: int, every_seconds: float = 0.5) -> None:
        self._pid = pid
        self._every = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_mib = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_mib = max(self.peak_mib, pss_mib(self._pid))
            if self._stop.wait(self._every):
                return
