"""Durable jobs: work that survives restarts, is retried, and happens once for its key.

The only module that imports dbos. One process launches it: the worker. Everybody else
writes an event, and a follower in the worker makes a job of it.

A job is one call of a handler: at least once, so handlers are idempotent. An attempt
that fails for a reason that may pass (`Unavailable`, or anything unforeseen) ends and
leaves a later attempt behind it, so that a destination that is down for days holds no
thread. A handler that refuses its input (any other `ImagingError`) is not asked again.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from storage.db.engine import Database, make_private, parse_url
from storage.kernel.errors import (
    Conflict,
    DependencyDown,
    ImagingError,
    InvalidParameter,
    NotFound,
    Unavailable,
)

log = logging.getLogger(__name__)

Payload = Mapping[str, Any]
Handler = Callable[[Payload], Payload | None]

APPLICATION = "huying"
#: Changes when the order of steps in `_job` changes: running jobs of another version
#: would not be resumed rightly.
VERSION = "1"
SCHEMA = "huying_jobs"
WORKFLOW = "huying.job"
#: A job that was interrupted this often (it may be what kills us) is given up.
MAX_INTERRUPTIONS = 10
POLL_SECONDS = 0.5
#: Finished jobs removed in one go.
PRUNE_BATCH = 500
#: Jobs that `status` counts of one state.
MAX_COUNTED = 10_000

_WAITING = ("ENQUEUED", "DELAYED")
_RUNNING = ("PENDING",)
_FAILED = ("ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED")
_DONE = ("SUCCESS",)


@dataclass(frozen=True, slots=True)
class Retry:
    """When a failed attempt is followed by another.

    Attributes
    ----------
    first_seconds, longest_seconds : float
        The pause doubles from the first to the longest.
    give_up_seconds : float
        After this time since the first attempt the job has failed.
    """

    first_seconds: float = 1.0
    longest_seconds: float = 600.0
    give_up_seconds: float = 86_400.0

    def pause(self, attempt: int) -> float:
        """Return the pause after `attempt` (1-based), with a quarter of jitter."""
        grown = self.first_seconds * 2.0 ** min(attempt - 1, 30)
        return min(grown, self.longest_seconds) * random.uniform(0.75, 1.25)  # noqa: S311


@dataclass(frozen=True, slots=True)
class JobCounts:
    """How many jobs there are; each at most `MAX_COUNTED`."""

    waiting: int
    running: int
    failed: int


@dataclass(frozen=True, slots=True)
class JobState:
    """One job.

    `state` is ``waiting`` (also between attempts), ``running``, ``done`` or ``failed``.
    """

    state: str
    attempt: int
    result: Payload | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Kind:
    handler: Handler
    concurrency: int
    retry: Retry


class JobFailed(Exception):
    """Ends a job for good; its message is kept with the job."""


class JobRunner:
    """The jobs of one worker.

    Parameters
    ----------
    url : str
        SQLAlchemy URL: an SQLite file of its own, or the PostgreSQL database of the
        index, where the jobs live in a schema of their own.
    slot : str
        Stable name of this worker (``worker-1``): at start its own interrupted jobs
        are resumed.
    """

    def __init__(self, url: str, *, slot: str = "worker-1") -> None:
        self._url = parse_url(url)
        self._slot = slot
        self._kinds: dict[str, _Kind] = {}
        self._running = False

    def register(
        self,
        name: str,
        handler: Handler,
        *,
        concurrency: int = 2,
        retry: Retry | None = None,
    ) -> None:
        """Say who does the jobs called `name`; before `start`.

        Parameters
        ----------
        handler : callable
            Gets the payload (JSON values), returns JSON values or None.
        concurrency : int
            Jobs of this name that run at a time in this worker.
        """
        if self._running:
            raise Conflict("jobs are registered before the runner starts")
        self._kinds[name] = _Kind(handler, concurrency, retry or Retry())

    def start(self) -> None:
        """Launch: resume what was interrupted, then work off the queues.

        Raises
        ------
        DependencyDown
            The database does not answer; starting again can help.
        """
        from dbos import DBOS

        sqlite = self._url.get_backend_name() == "sqlite"
        if sqlite:
            _use_wal(Path(self._url.database or ""))
        else:
            _ask(self._url)
        _quiet()
        try:
            self._launch()
        except OperationalError as error:
            DBOS.destroy(destroy_registry=True)
            raise DependencyDown("database does not answer") from error
        self._running = True

    def _launch(self) -> None:
        from dbos import DBOS, DBOSConfig

        sqlite = self._url.get_backend_name() == "sqlite"
        url = self._url if sqlite else self._url.set(drivername="postgresql")
        config: DBOSConfig = {
            "name": APPLICATION,
            "system_database_url": url.render_as_string(hide_password=False),
            "dbos_system_schema": SCHEMA,
            "application_version": VERSION,
            "executor_id": self._slot,
            "enable_otlp": False,
            # Polling works behind every pooler, and nothing here waits for messages.
            "use_listen_notify": False,
            "log_level": "WARNING",
            "sys_db_pool_size": 5,
        }
        DBOS(config=config)

        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MAX_INTERRUPTIONS)
        def job(
            name: str, key: str, payload: dict[str, Any], attempt: int, first: float
        ) -> dict[str, Any]:
            return self._job(name, key, payload, attempt, first)

        # Queues are known to all workers of a database; jobs are for those that know
        # how: what lies on one host is sealed by the worker of that host.
        DBOS.listen_queues(list(self._kinds))
        DBOS.launch()
        for name, kind in self._kinds.items():
            DBOS.register_queue(
                name,
                worker_concurrency=kind.concurrency,
                polling_interval_sec=POLL_SECONDS,
                on_conflict="always_update",
            )

    def stop(self, *, grace_seconds: int = 10) -> None:
        """Let running jobs finish for a while; the rest resumes at the next start."""
        if not self._running:
            return
        from dbos import DBOS

        self._running = False
        DBOS.destroy(
            destroy_registry=True, workflow_completion_timeout_sec=grace_seconds
        )

    def enqueue(self, name: str, key: str, payload: Payload) -> bool:
        """Ask for one job; return False when `name` and `key` were asked for before.

        When this returns, the job is durable. `key` names the work itself, e.g.
        ``subject:version``.
        """
        if name not in self._kinds:
            raise InvalidParameter("name", f"no such job: {name}")
        return self._enqueue(name, key, dict(payload), 1, time.time(), 0)

    def state(self, name: str, key: str) -> JobState:
        """Return where the job is.

        Raises
        ------
        NotFound
            It was never asked for, or has been pruned.
        """
        attempts = self._attempts(name, key)
        if not attempts:
            raise NotFound("no such job")
        last = max(attempts, key=lambda one: _attempt_of(one.workflow_id))
        number = _attempt_of(last.workflow_id)
        if last.status in _WAITING:
            return JobState("waiting", number)
        if last.status in _RUNNING:
            return JobState("running", number)
        if last.status not in _DONE:
            return JobState("failed", number, error=str(last.error or last.status))
        outcome = last.output
        if outcome["state"] == "retry":
            # The attempt that follows is being written.
            return JobState("waiting", number, error=outcome["error"])
        return JobState("done", number, outcome["result"])

    def status(self) -> JobCounts:
        """Count the jobs."""
        return JobCounts(
            waiting=self._count(_WAITING),
            running=self._count(_RUNNING),
            failed=self._count(_FAILED),
        )

    def prune(self, keep: timedelta) -> int:
        """Forget jobs that ended longer ago than `keep`; return how many.

        A pruned key can be asked for again.
        """
        from dbos import DBOS

        before = (datetime.now(UTC) - keep).isoformat()
        removed = 0
        while True:
            ended = DBOS.list_workflows(
                status=[*_DONE, *_FAILED],
                completed_before=before,
                name=WORKFLOW,
                limit=PRUNE_BATCH,
                load_input=False,
                load_output=False,
            )
            if not ended:
                return removed
            DBOS.delete_workflows([one.workflow_id for one in ended])
            removed += len(ended)

    def _job(
        self, name: str, key: str, payload: dict[str, Any], attempt: int, first: float
    ) -> dict[str, Any]:
        """Do one attempt, and leave the next behind when it may help."""
        from dbos import DBOS

        outcome: dict[str, Any] = DBOS.run_step(
            {"name": name}, self._attempt, name, payload, attempt, first
        )
        if outcome["state"] == "retry":
            self._enqueue(name, key, payload, attempt + 1, first, outcome["pause"])
        if outcome["state"] == "failed":
            raise JobFailed(outcome["error"])
        return outcome

    def _attempt(
        self, name: str, payload: dict[str, Any], attempt: int, first: float
    ) -> dict[str, Any]:
        """Call the handler; the outcome is recorded before anything follows it."""
        kind = self._kinds.get(name)
        if kind is None:
            return {"state": "failed", "error": f"no handler for {name}"}
        try:
            result = kind.handler(payload)
        except Unavailable as error:
            failure = str(error)
        except ImagingError as error:
            log.warning(
                "job refused",
                extra={"event": "job.refused", "job": name, "code": error.code},
            )
            return {"state": "failed", "error": str(error)}
        except Exception as error:
            failure = type(error).__name__
            log.exception("job failed", extra={"event": "job.failed", "job": name})
        else:
            return {"state": "done", "result": dict(result) if result else None}
        pause = kind.retry.pause(attempt)
        if time.time() + pause - first > kind.retry.give_up_seconds:
            log.error(
                "job given up",
                extra={"event": "job.given_up", "job": name, "attempt": attempt},
            )
            return {"state": "failed", "error": failure}
        log.warning(
            "job waits: %s",
            failure,
            extra={
                "event": "job.waits",
                "job": name,
                "attempt": attempt,
                "seconds": round(pause, 1),
            },
        )
        return {"state": "retry", "error": failure, "pause": pause}

    def _enqueue(
        self,
        name: str,
        key: str,
        payload: dict[str, Any],
        attempt: int,
        first: float,
        pause: float,
    ) -> bool:
        from dbos import DBOS, EnqueueOptions, WorkflowSerializationFormat, error

        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": name,
            "workflow_id": _workflow_id(name, key, attempt),
            "workflow_id_reuse_policy": "reject" if attempt == 1 else "return-existing",
            "app_version": VERSION,
            # Plain JSON: what is stored is never unpickled.
            "serialization_type": WorkflowSerializationFormat.PORTABLE,
        }
        if pause:
            options["delay_seconds"] = pause
        try:
            DBOS.enqueue_workflow_with_options(
                options, name, key, payload, attempt, first
            )
        except error.DBOSWorkflowIDInUseError:
            return False
        return True

    def _attempts(self, name: str, key: str) -> Sequence[Any]:
        from dbos import DBOS

        first = _workflow_id(name, key, 1)
        return [
            *DBOS.list_workflows(workflow_ids=[first]),
            *DBOS.list_workflows(workflow_id_prefix=f"{first}#"),
        ]

    def _count(self, states: Sequence[str]) -> int:
        from dbos import DBOS

        found = DBOS.list_workflows(
            status=list(states),
            limit=MAX_COUNTED,
            load_input=False,
            load_output=False,
        )
        return len(found)


def _workflow_id(name: str, key: str, attempt: int) -> str:
    return f"{name}:{key}" if attempt == 1 else f"{name}:{key}#{attempt}"


def _attempt_of(workflow_id: str) -> int:
    _, mark, number = workflow_id.rpartition("#")
    return int(number) if mark and number.isdigit() else 1


def _quiet() -> None:
    """Send the library's log to ours, without the failures we raise ourselves."""
    logger = logging.getLogger("dbos")
    logger.setLevel(logging.WARNING)
    if not logger.handlers:
        # With a handler present it adds none of its own.
        logger.addHandler(logging.NullHandler())
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[0] is JobFailed)


def _ask(url: URL) -> None:
    """Raise DependencyDown unless the database answers.

    A launch that fails would say so in a traceback, and leave threads behind.
    """
    with closing(Database(url.render_as_string(hide_password=False))) as database:
        database.ping()


def _use_wal(path: Path) -> None:
    """Set the journal mode, which stays with the file; dbos does not."""
    make_private(path)
    connection = sqlite3.connect(path, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()
