"""What operators count: Prometheus histograms and counters of every process.

The processes of a node write into files of one folder, which the supervisor makes;
any web process adds them up when it is asked. Labels are bounded: doors, outcomes,
routes as declared, statuses.
"""

from __future__ import annotations

import os
from functools import cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class _Process:
    """This process' id, asked for once: each count looks at it several times."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self._id = os.getpid()

    def __call__(self) -> int:
        return self._id


if FOLDER_VARIABLE in os.environ:
    values.ValueClass = values.MultiProcessValue(_Process())  # type: ignore[no-untyped-call]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

INGEST_SECONDS = Histogram(
    "huying_ingest_seconds",
    "From a whole data set in hand to its answer.",
    ("door", "outcome"),
    buckets=_SECONDS,
)
INGEST_BYTES = Counter("huying_ingest_bytes", "Data set bytes that arrived.", ("door",))
DIMSE_SECONDS = Histogram(
    "huying_dimse_seconds",
    "From a DIMSE command to its final response.",
    ("command", "status"),
    buckets=_SECONDS,
)
ASSOCIATIONS = Counter(
    "huying_associations", "Associations by how they began.", ("outcome",)
)
ASSOCIATION_SECONDS = Histogram(
    "huying_association_seconds",
    "Length of associations by how they ended.",
    ("outcome",),
    buckets=(*_SECONDS, 60, 300, 1800),
)
ASSOCIATIONS_OPEN = Gauge(
    "huying_associations_open",
    "Associations at this moment.",
    multiprocess_mode="livesum",
)
CORRUPT_READS = Counter(
    "huying_corrupt_reads", "Stored objects that failed their checksum when read."
)
DECODE_SECONDS = Histogram(
    "huying_decode_seconds",
    "Frames decoded by worker processes.",
    ("codec", "outcome"),
    buckets=_SECONDS,
)
AUDIT_SECONDS = Histogram(
    "huying_audit_write_seconds",
    "Transactions of audit records; while they fail, accesses are refused.",
    ("outcome",),
    buckets=_SECONDS,
)
AUDIT_ACCESSES = Counter(
    "huying_audit_accesses", "Accesses that were to be recorded.", ("outcome",)
)
HTTP_SECONDS = Histogram(
    "huying_http_seconds",
    "From the first byte of a request to the last of its answer.",
    ("method", "route", "status"),
    buckets=_SECONDS,
)
LOOP_SECONDS = Histogram(
    "huying_loop_seconds",
    "Rounds of the worker's loops that did something or failed.",
    ("loop", "outcome"),
    buckets=_SECONDS,
)
JOBS = Gauge(
    "huying_jobs",
    "Durable jobs by state.",
    ("state",),
    multiprocess_mode="mostrecent",
)
FEED_LAG = Gauge(
    "huying_follower_lag_events",
    "Events a follower of the change feed has still to see.",
    ("follower",),
    multiprocess_mode="mostrecent",
)
FREE_BYTES = Gauge(
    "huying_free_bytes",
    "Free space where packs are written.",
    multiprocess_mode="mostrecent",
)


def forget_process(pid: int) -> None:
    """Drop the gauges of a process that died; its counters stay."""
    if FOLDER_VARIABLE in os.environ:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def exposition() -> bytes:
    """Return all values of the node in the text format."""
    registry = CollectorRegistry()
    if FOLDER_VARIABLE in os.environ:
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest()


class IngestMetrics:
    """Counts arrivals (`pacs.services.ingest.IngestObserver`)."""

    def __init__(self) -> None:
        self._seconds = cache(INGEST_SECONDS.labels)
        self._bytes = cache(INGEST_BYTES.labels)

    def ingested(
        self, door: str, outcome: str, seconds: float, size_bytes: int
    ) -> None:
        self._seconds(door, outcome).observe(seconds)
        self._bytes(door).inc(size_bytes)


class DecoderMetrics:
    """Counts decoded frames (`pacs.imaging.codecs.DecoderObserver`)."""

    def decoded(self, codec: str, outcome: str, seconds: float) -> None:
        DECODE_SECONDS.labels(codec, outcome).observe(seconds)


class AuditMetrics:
    """Counts what the audit takes (`storage.audit.trail.AuditObserver`)."""

    def written(self, accesses: int, seconds: float, *, failed: bool) -> None:
        outcome = "failed" if failed else "written"
        AUDIT_SECONDS.labels(outcome).observe(seconds)
        AUDIT_ACCESSES.labels(outcome).inc(accesses)


class LoopMetrics:
    """Counts the worker's rounds (`gateway.worker.LoopObserver`)."""

    def looped(self, name: str, seconds: float, *, failed: bool) -> None:
        LOOP_SECONDS.labels(name, "failed" if failed else "done").observe(seconds)


class DimseMetrics:
    """Counts associations and messages (`pacs.dimse.observer.DimseObserver`)."""

    def __init__(self) -> None:
        self._seconds = cache(DIMSE_SECONDS.labels)

    def association_opened(self) -> None:
        ASSOCIATIONS.labels("accepted").inc()
        ASSOCIATIONS_OPEN.inc()

    def association_closed(self, outcome: str, seconds: float) -> None:
        ASSOCIATIONS_OPEN.dec()
        ASSOCIATION_SECONDS.labels(outcome).observe(seconds)

    def association_rejected(self, reason: str) -> None:
        ASSOCIATIONS.labels(reason).inc()

    def message(self, command: str, status: int, seconds: float) -> None:
        self._seconds(command, f"{status:04X}").observe(seconds)
