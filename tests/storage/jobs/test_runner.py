"""Durable jobs: once for a key, retried, resumed after SIGKILL."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from storage.jobs import runner as runner_module
from storage.jobs.runner import JobRunner, Payload, Retry
from storage.kernel.errors import (
    Conflict,
    DependencyDown,
    InvalidParameter,
    NotFound,
    Unavailable,
)
from tests.support.ports import free_port

ROOT = Path(__file__).parents[3]
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
QUICK = Retry(first_seconds=0.05, longest_seconds=0.1, give_up_seconds=30)


@pytest.fixture(autouse=True)
def _polls_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "POLL_SECONDS", 0.05)


@pytest.fixture
def start(database_url: str) -> Iterator[Callable[[dict[str, object]], JobRunner]]:
    runners: list[JobRunner] = []

    def make(handlers: dict[str, object]) -> JobRunner:
        runner = JobRunner(database_url)
        for name, handler in handlers.items():
            runner.register(name, handler, retry=QUICK)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            # dbos' own use of its dependencies is not ours to mend.
            warnings.simplefilter("ignore", DeprecationWarning)
            runner.start()
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.stop(grace_seconds=0)


def ended(runner: JobRunner, name: str, key: str) -> object:
    deadline = time.monotonic() + 20
    while (state := runner.state(name, key)).state not in {"done", "failed"}:
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    return state


def test_a_job_runs_once_for_its_key(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    calls: list[Payload] = []

    def double(payload: Payload) -> Payload:
        calls.append(payload)
        return {"twice": payload["n"] * 2}

    runner = start({"double": double})

    assert runner.enqueue("double", "a", {"n": 21}) is True
    assert runner.enqueue("double", "a", {"n": 99}) is False
    state = ended(runner, "double", "a")

    assert (state.state, state.result) == ("done", {"twice": 42})  # type: ignore[attr-defined]
    assert runner.enqueue("double", "a", {"n": 99}) is False
    assert calls == [{"n": 21}]


def test_a_job_is_tried_again_while_something_is_unavailable(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    calls: list[float] = []

    def flaky(_: Payload) -> None:
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise Unavailable("the store is down")
        if len(calls) == 2:
            raise RuntimeError("something unforeseen")

    runner = start({"flaky": flaky})
    runner.enqueue("flaky", "a", {})

    state = ended(runner, "flaky", "a")

    assert (state.state, state.attempt, len(calls)) == ("done", 3, 3)  # type: ignore[attr-defined]


@on_sqlite
def test_a_job_that_refuses_its_input_fails_at_once(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    calls: list[Payload] = []

    def refuse(payload: Payload) -> None:
        calls.append(payload)
        raise InvalidParameter("n", "is wrong")

    runner = start({"refuse": refuse})
    runner.enqueue("refuse", "a", {})

    state = ended(runner, "refuse", "a")

    assert (state.state, state.error) == ("failed", "n: is wrong")  # type: ignore[attr-defined]
    assert len(calls) == 1
    assert runner.status().failed == 1


@on_sqlite
def test_a_job_is_given_up_in_time(
    start: Callable[[dict[str, object]], JobRunner], database_url: str
) -> None:
    def down(_: Payload) -> None:
        raise Unavailable("down")

    runner = JobRunner(database_url)
    runner.register("down", down, retry=Retry(0.01, 0.02, 0.0))
    runner.start()
    try:
        runner.enqueue("down", "a", {})
        assert ended(runner, "down", "a").state == "failed"  # type: ignore[attr-defined]
    finally:
        runner.stop(grace_seconds=0)


@on_sqlite
def test_a_job_that_waits_for_its_next_attempt_holds_nobody_up(
    database_url: str,
) -> None:
    def handle(payload: Payload) -> None:
        if payload["down"]:
            raise Unavailable("down")

    runner = JobRunner(database_url)
    runner.register("send", handle, concurrency=1, retry=Retry(60, 60, 3600))
    runner.start()
    try:
        runner.enqueue("send", "down", {"down": True})
        runner.enqueue("send", "up", {"down": False})
        assert ended(runner, "send", "up").state == "done"  # type: ignore[attr-defined]
        state = runner.state("send", "down")
        assert (state.state, state.attempt) == ("waiting", 2)
    finally:
        runner.stop(grace_seconds=0)


@on_sqlite
def test_no_more_jobs_run_at_a_time_than_allowed(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    lock = threading.Lock()
    at_once: list[int] = [0, 0]

    def work(_: Payload) -> None:
        with lock:
            at_once[0] += 1
            at_once[1] = max(at_once)
        time.sleep(0.05)
        with lock:
            at_once[0] -= 1

    runner = start({"work": work})
    for n in range(6):
        runner.enqueue("work", f"{n}", {})
    for n in range(6):
        ended(runner, "work", f"{n}")

    assert at_once[1] == 2


@on_sqlite
def test_finished_jobs_are_forgotten_after_a_while(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    runner = start({"ok": lambda _: None})
    runner.enqueue("ok", "a", {})
    ended(runner, "ok", "a")

    assert runner.prune(timedelta(hours=1)) == 0
    assert runner.prune(timedelta(0)) == 1
    with pytest.raises(NotFound):
        runner.state("ok", "a")


@on_sqlite
def test_a_database_that_is_away_is_said_so_and_can_come_back(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    away = JobRunner(f"postgresql://nobody@127.0.0.1:{free_port()}/nothing")

    for _ in range(2):
        with pytest.raises(DependencyDown):
            away.start()
    away.stop()

    runner = start({"ok": lambda _: None})
    runner.enqueue("ok", "a", {})
    assert ended(runner, "ok", "a").state == "done"  # type: ignore[attr-defined]


@on_sqlite
def test_a_launch_that_fails_can_be_repeated(
    start: Callable[[dict[str, object]], JobRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server went away after it was asked.
    monkeypatch.setattr(runner_module, "_ask", lambda _url: None)
    with pytest.raises(DependencyDown):
        JobRunner(f"postgresql://nobody@127.0.0.1:{free_port()}/nothing").start()

    runner = start({"ok": lambda _: None})
    runner.enqueue("ok", "a", {})
    assert ended(runner, "ok", "a").state == "done"  # type: ignore[attr-defined]


@on_sqlite
def test_an_unknown_job_is_refused(
    start: Callable[[dict[str, object]], JobRunner],
) -> None:
    runner = start({"ok": lambda _: None})

    with pytest.raises(InvalidParameter):
        runner.enqueue("other", "a", {})
    with pytest.raises(Conflict):
        runner.register("late", lambda _: None)


PROGRAM = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from storage.jobs import runner as module
    from storage.jobs.runner import JobRunner
    module.POLL_SECONDS = 0.05

    url, notes = sys.argv[1], Path(sys.argv[2])

    def work(payload):
        with notes.open("a") as file:
            file.write("begin\\n")
        if len(notes.read_text().splitlines()) == 1:
            time.sleep(60)
        return {"ended": True}

    runner = JobRunner(url)
    runner.register("work", work)
    runner.start()
    runner.enqueue("work", "a", {})
    while runner.state("work", "a").state != "done":
        time.sleep(0.05)
    print(runner.state("work", "a").result, flush=True)
    runner.stop(grace_seconds=0)
    """
)


def test_d06_a_job_killed_in_the_middle_is_resumed(
    database_url: str, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    command = [sys.executable, "-c", PROGRAM, database_url, str(notes)]
    first = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 30
    while not notes.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()

    second = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )

    assert second.stdout.strip() == "{'ended': True}"
    assert notes.read_text().splitlines() == ["begin", "begin"]
