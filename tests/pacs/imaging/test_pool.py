"""Jobs in worker processes: what they answer, refuse, and cannot do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pacs.imaging.pool import Job, WorkerPool
from pacs.imaging.worker import SHARED_BYTES
from storage.kernel.errors import (
    DependencyDown,
    ImagingError,
    InvalidParameter,
    MalformedObject,
    NotFound,
    TooLarge,
    Unsupported,
)
from storage.kernel.limits import MIB, Limits
from tests.support.waiting import wait_until

HANDLERS = """
import os, time
from storage.kernel import errors

def joined(arguments, payloads):
    return {"n": len(payloads), **arguments}, b"-".join(payloads)

def refuse(arguments, payloads):
    raise {
        "parameter": errors.InvalidParameter("window", "no width"),
        "large": errors.TooLarge("pixels", 7),
        "malformed": errors.MalformedObject("no LUT", 0x00281201),
        "unsupported": errors.Unsupported("a video"),
        "missing": errors.NotFound("no frame 9"),
        "other": ZeroDivisionError("patient"),
    }[arguments["what"]]

def die(arguments, payloads):
    os._exit(3)

def bloat(arguments, payloads):
    return {}, bytes(1 << 30)

def talk(arguments, payloads):
    return {}, bytes(1000)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = WorkerPool(Limits(decode_bytes=96 * MIB))
    yield made
    made.close()


@pytest.mark.parametrize("size", [0, 3_000_000, SHARED_BYTES, 2 * SHARED_BYTES])
def test_a_job_answers_with_a_head_and_a_body(pool: WorkerPool, size: int) -> None:
    for last in (b"x", b"y"):
        payloads = (b"one", memoryview(b"two"), b"", last * size)

        answer = pool.run(Job("handlers:joined", {"text": "曹操"}, payloads))

        assert answer.head == {"n": 4, "text": "曹操"}
        assert answer.body == b"one-two--" + last * size


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("parameter", InvalidParameter("window", "no width")),
        ("large", TooLarge("pixels", 7)),
        ("malformed", MalformedObject("no LUT", 0x00281201)),
        ("unsupported", Unsupported("a video")),
        ("missing", NotFound("no frame 9")),
        ("other", MalformedObject("ZeroDivisionError: patient")),
    ],
)
def test_a_refusal_is_raised_as_the_handler_raised_it(
    pool: WorkerPool, what: str, expected: ImagingError
) -> None:
    with pytest.raises(type(expected)) as caught:
        pool.run(Job("handlers:refuse", {"what": what}))

    assert str(caught.value) == str(expected)
    assert vars(caught.value) == vars(expected)
    assert len(pool.pids()) == 1  # a process that refuses is as good as before


def test_a_job_that_kills_its_process_costs_itself_only(pool: WorkerPool) -> None:
    with pytest.raises(DependencyDown, match="died"):
        pool.run(Job("handlers:die"))

    assert pool.pids() == []
    assert pool.run(Job("handlers:joined", {}, (b"a", b"b"))).body == b"a-b"


def test_a_job_has_bounded_memory(pool: WorkerPool) -> None:
    with pytest.raises(TooLarge) as caught:
        pool.run(Job("handlers:bloat", answer_bytes=1 << 31))

    assert caught.value.limit == "decode_bytes"


def test_an_answer_longer_than_expected_is_not_read(pool: WorkerPool) -> None:
    with pytest.raises(DependencyDown, match="nonsense"):
        pool.run(Job("handlers:talk", answer_bytes=999))

    assert pool.run(Job("handlers:talk", answer_bytes=1000)).body == bytes(1000)


def test_what_waits_for_a_process_holds_no_payload(pool: WorkerPool) -> None:
    free: list[int] = []

    def payloads() -> tuple[bytes]:
        free.append(len(pool.pids()))
        return (b"read when it is my turn",)

    pool.run(Job("handlers:joined"))
    answer = pool.run(Job("handlers:joined", {}, payloads))

    assert answer.body == b"read when it is my turn"
    # The only process had been taken before the payload was read.
    assert free == [0]

    def gone() -> tuple[bytes]:
        raise NotFound("deleted meanwhile")

    with pytest.raises(NotFound):
        pool.run(Job("handlers:joined", {}, gone))
    assert len(pool.pids()) == 1


def test_a_handler_that_is_not_there_is_an_error_of_the_job(pool: WorkerPool) -> None:
    with pytest.raises(MalformedObject, match="ModuleNotFoundError"):
        pool.run(Job("nowhere:nothing"))


def _is_waiting(pool: WorkerPool, n: int) -> bool:
    return pool.waiting() == n


def test_turns_come_in_the_order_of_arrival(pool: WorkerPool) -> None:
    """Who asks for job after job is served once between others, not before them."""
    order: list[str] = []
    greedy_is_busy, all_wait = threading.Event(), threading.Event()

    def first() -> tuple[()]:
        greedy_is_busy.set()
        all_wait.wait(30)
        return ()

    def noting(name: str) -> Job:
        def payloads() -> tuple[()]:
            order.append(name)
            return ()

        return Job("handlers:joined", {}, payloads)

    def greedy() -> None:
        pool.run(Job("handlers:joined", {}, first))
        for _ in range(5):
            pool.run(noting("greedy"))

    threads = [threading.Thread(target=greedy)]
    threads[0].start()
    greedy_is_busy.wait(30)
    for n, name in enumerate(("a", "b", "c"), start=1):
        threads.append(threading.Thread(target=pool.run, args=(noting(name),)))
        threads[-1].start()
        wait_until(partial(_is_waiting, pool, n), f"{name} to wait")
    all_wait.set()
    for thread in threads:
        thread.join()

    assert order == ["a", "b", "c", *["greedy"] * 5]


def test_who_waits_too_long_leaves_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = WorkerPool(Limits(decode_seconds=0.2))
    busy, go_on = threading.Event(), threading.Event()

    def hold() -> tuple[()]:
        busy.set()
        go_on.wait(30)
        return ()

    holding = threading.Thread(
        target=lambda: pool.run(Job("handlers:joined", {}, hold))
    )
    holding.start()
    busy.wait(30)
    with pytest.raises(DependencyDown, match="busy"):
        pool.run(Job("handlers:joined"))
    go_on.set()
    holding.join()

    # The place went back, not to one who had left.
    assert pool.run(Job("handlers:joined")).body == b""
    pool.close()


def test_a_job_may_be_made_when_it_is_its_turn(pool: WorkerPool) -> None:
    pool.run(Job("handlers:joined"))

    def made() -> Job:
        return Job("handlers:joined", {"idle": len(pool.pids())}, (b"x",))

    assert pool.ask(made).head == {"n": 1, "idle": 0}


def test_an_idle_process_that_is_killed_is_no_zombie_for_long(pool: WorkerPool) -> None:
    pool.run(Job("handlers:joined"))
    (pid,) = pool.pids()
    assert Path(f"/proc/{pid}").exists()

    os.kill(pid, signal.SIGKILL)

    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the zombie to go")
    assert pool.pids() == []
    assert pool.run(Job("handlers:joined", {}, (b"a",))).body == b"a"
