"""Jobs on hostile bytes, in processes with bounded memory and time.

Whatever reads pixels or compresses them runs as a `Job` in a worker process
(`pacs.imaging.worker`), never in the process that answers. What can go wrong, and what
the caller gets:

* the job refuses its input: the `InvalidInput` that it raised;
* it needs more memory than `decode_bytes`: `TooLarge`;
* the process dies or takes longer than `decode_seconds`, or too many wait:
  `DependencyDown`. That one request fails; the next gets a new process.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from pacs.imaging import worker
from pacs.imaging.encoding import Buffer
from storage.kernel.errors import (
    DependencyDown,
    ImagingError,
    InvalidParameter,
    MalformedObject,
    NotFound,
    TooLarge,
    Unsupported,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import KIB, MIB, Limits

log = logging.getLogger(__name__)

#: A process that nobody needed for so many seconds is ended.
IDLE_SECONDS = 30.0
#: Requests that may wait for a process; more are told to come back.
MAX_WAITING = 64
#: Bytes of the head of an answer.
MAX_HEAD = 256 * KIB
#: Start-up of a process, on top of the time for a job.
START_SECONDS = 20.0
#: Idle processes are looked at this often: who was killed is not left a zombie.
SWEEP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do in a worker process.

    Attributes
    ----------
    handler : str
        ``package.module:function``, a `pacs.imaging.worker.Handler`.
    arguments : mapping
        Plain JSON values.
    payloads : sequence of bytes-like, or callable
        What it works on; at most 65,535. What is large is read by a callable, once a
        process is free: else all who wait for one would hold theirs.
    answer_bytes : int
        A longer body is no answer.
    label : str
        Under what it is counted: one of few names.
    """

    handler: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    payloads: Sequence[Buffer] | Callable[[], Sequence[Buffer]] = ()
    answer_bytes: int = 256 * MIB
    label: str = "job"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a job found out, and the bytes it made."""

    head: dict[str, Any]
    body: bytes


class PoolObserver(Protocol):
    """Who counts what workers do."""

    def decoded(self, codec: str, outcome: str, seconds: float) -> None:
        """Note one job and how it ended: ``"decoded"``, or an error's code.

        `codec` is the label of the job.
        """
        ...


class WorkerPool:
    """Worker processes, started when needed; safe for use by many threads.

    Parameters
    ----------
    limits : Limits
        `decode_seconds` and `decode_bytes` of one job.
    processes : int
        At most so many at a time.
    idle_seconds : float
        After which an unused process is ended.
    max_waiting : int
        Requests beyond it are refused at once.
    observer : PoolObserver, optional
    """

    def __init__(
        self,
        limits: Limits,
        *,
        processes: int = 1,
        idle_seconds: float = IDLE_SECONDS,
        max_waiting: int = MAX_WAITING,
        observer: PoolObserver | None = None,
    ) -> None:
        self._limits = limits
        self._observer = observer
        self._idle_seconds = idle_seconds
        self._max_waiting = max_waiting
        self._turns = _Turns(processes)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._waiting = 0
        self._closed = False
        self._reaper: threading.Timer | None = None

    @property
    def limits(self) -> Limits:
        """What one job may cost."""
        return self._limits

    def run(self, job: Job) -> Answer:
        """Do a job in a worker process and return its answer.

        Raises
        ------
        InvalidInput, NotFound
            As the handler raised it; anything that is not ours becomes
            `MalformedObject`.
        TooLarge
            It needs more memory than `decode_bytes`.
        DependencyDown
            The process died, took too long, or too many wait.
        """
        with self.counted(job.label):
            return self.ask(job)

    def ask(self, asked: Job | Callable[[], Job]) -> Answer:
        """Do a job as `run` does, but do not count it.

        A callable makes the job once a process is free, when what it works on says
        how it is done.
        """
        with self._process() as process:
            job = asked() if callable(asked) else asked
            payloads = job.payloads() if callable(job.payloads) else job.payloads
            outcome, head, body = process.ask(
                job, payloads, self._limits.decode_seconds
            )
            if outcome == worker.NO_MEMORY:
                raise TooLarge("decode_bytes", self._limits.decode_bytes)
            if outcome == worker.REFUSED:
                raise _refusal(head)
        return Answer(head, body)

    @contextmanager
    def counted(self, label: str) -> Iterator[None]:
        """Count what is done inside as one job."""
        started = time.perf_counter()
        outcome = "failed"
        try:
            yield
            outcome = "decoded"
        except ImagingError as error:
            outcome = error.code
            raise
        finally:
            if self._observer is not None:
                seconds = time.perf_counter() - started
                self._observer.decoded(label, outcome, seconds)

    def close(self) -> None:
        """End all processes; nothing can be done afterwards."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            reaper, self._reaper = self._reaper, None
        if reaper is not None:
            reaper.cancel()
        for process in idle:
            process.end()

    def pids(self) -> list[int]:
        """Return the processes that wait for work."""
        with self._lock:
            return [process.pid for process in self._idle]

    def waiting(self) -> int:
        """Return how many requests wait for a process."""
        with self._lock:
            return self._waiting

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        """Lend a process; one that failed is not used again."""
        self._wait()
        process: _Process | None = None
        try:
            process = self._take()
            yield process
        except BaseException:
            if process is not None and process.is_sound:
                self._give_back(process)
            elif process is not None:
                process.end()
            raise
        else:
            self._give_back(process)
        finally:
            self._turns.give_back()

    def _wait(self) -> None:
        with self._lock:
            if self._closed:
                raise DependencyDown("decoders are closed")
            if self._waiting >= self._max_waiting:
                raise DependencyDown("decoders are busy")
            self._waiting += 1
        try:
            if not self._turns.take(self._limits.decode_seconds):
                raise DependencyDown("decoders are busy")
        finally:
            with self._lock:
                self._waiting -= 1

    def _take(self) -> _Process:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return _Process(self._limits.decode_bytes)
            if process.is_alive():
                return process
            process.end()

    def _give_back(self, process: _Process) -> None:
        process.used = time.monotonic()
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                if self._reaper is None:
                    self._reaper = self._start_reaper()
                return
        process.end()

    def _start_reaper(self) -> threading.Timer:
        seconds = min(self._idle_seconds, SWEEP_SECONDS)
        timer = threading.Timer(seconds, self._reap)
        timer.daemon = True
        timer.name = "decoder-reaper"
        timer.start()
        return timer

    def _reap(self) -> None:
        """End what nobody used lately or what died; come again while any are left."""
        before = time.monotonic() - self._idle_seconds
        with self._lock:
            old: list[_Process] = []
            kept: list[_Process] = []
            for process in self._idle:
                spent = process.used <= before or not process.is_alive()
                (old if spent else kept).append(process)
            self._idle = kept
            again = self._idle and not self._closed
            self._reaper = self._start_reaper() if again else None
        for process in old:
            process.end()


class _Turns:
    """A semaphore that serves in the order of arrival.

    `threading.Semaphore` does not: who gives a place back and asks at once for
    another gets it before those who have waited all along.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._lock = threading.Lock()
        self._line: deque[threading.Event] = deque()

    def take(self, seconds: float) -> bool:
        """Wait for a place, at most so long; tell whether it was given."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Event()
            self._line.append(turn)
        try:
            turn.wait(seconds)
        finally:
            with self._lock:
                given = turn.is_set()
                if not given:
                    self._line.remove(turn)
        return given

    def give_back(self) -> None:
        """Hand the place to who has waited longest."""
        with self._lock:
            if self._line:
                # Never free in between: nobody can step in.
                self._line.popleft().set()
            else:
                self._free += 1


#: Errors without more attributes that a worker can have us raise, by code.
_PLAIN: Final[dict[str, type[ImagingError]]] = {
    kind.code: kind for kind in (NotFound, Unsupported, UnsupportedTransferSyntax)
}


def _refusal(head: dict[str, Any]) -> ImagingError:
    """Return the error that a handler raised; nothing in `head` is believed."""
    code = str(head.get("code"))
    text = str(head.get("message"))[: worker.MAX_WORDS]
    text = text.encode("ascii", "replace").decode()
    if code == InvalidParameter.code:
        return InvalidParameter(str(head.get("name"))[:64], text)
    if code == TooLarge.code:
        allowed = head.get("allowed")
        limit = str(head.get("limit"))[:64]
        return TooLarge(limit, allowed if isinstance(allowed, int) else 0)
    if code in _PLAIN:
        return _PLAIN[code](text)
    refusal = MalformedObject(text)
    tag = head.get("tag")
    refusal.tag = tag if isinstance(tag, int) else None
    return refusal


def _environment() -> dict[str, str]:
    """Return ours without the settings: passwords are no business of a worker."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HUYING_")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class _Process:
    """One worker process and the socket to it."""

    def __init__(self, decode_bytes: int) -> None:
        self.used = 0.0
        #: Whether every request so far got a whole answer.
        self.is_sound = True
        self._fresh = True
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = self._start(decode_bytes, theirs)
            except OSError as error:
                self._socket.close()
                raise DependencyDown("no decoder process could be started") from error

    def _start(
        self, decode_bytes: int, theirs: socket.socket
    ) -> subprocess.Popen[bytes]:
        memory = os.memfd_create("jobs")
        try:
            os.ftruncate(memory, worker.SHARED_BYTES)
            self._shared = mmap.mmap(memory, worker.SHARED_BYTES)
            started = (sys.executable, "-P", "-m", worker.__name__)
            return subprocess.Popen(  # noqa: S603
                (*started, str(decode_bytes), str(memory)),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=(memory,),
            )
        finally:
            os.close(memory)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def ask(
        self, job: Job, payloads: Sequence[Buffer], seconds: float
    ) -> tuple[int, dict[str, Any], bytes]:
        """Send a job and return outcome, head and body of the answer.

        Raises
        ------
        DependencyDown
            The process died, took too long, or answered nonsense; end it.
        """
        self.is_sound = False
        alarm = math.ceil(seconds) + 1
        if self._fresh:
            seconds += START_SECONDS
            self._fresh = False
        deadline = time.monotonic() + seconds
        name, arguments = job.handler.encode(), orjson.dumps(dict(job.arguments))
        lengths = [worker.LENGTH.pack(len(payload)) for payload in payloads]
        shared = sum(map(len, payloads)) <= worker.SHARED_BYTES
        head = worker.REQUEST.pack(
            alarm, len(name), len(arguments), len(lengths), shared
        )
        front = b"".join((head, *lengths, name, arguments))
        if shared:
            self._shared.seek(0)
            for payload in payloads:
                self._shared.write(payload)
        try:
            for part in (front,) if shared else (front, *payloads):
                self._socket.settimeout(_left(deadline))
                self._socket.sendall(part)
            outcome, n_head, n_body = worker.ANSWER.unpack(
                self._receive(worker.ANSWER.size, deadline)
            )
            if n_head > MAX_HEAD or n_body > job.answer_bytes:
                raise DependencyDown("the decoder answered nonsense")
            found = orjson.loads(self._receive(n_head, deadline))
            if not isinstance(found, dict):
                raise DependencyDown("the decoder answered nonsense")
            body = bytes(self._receive(n_body, deadline))
        except TimeoutError:
            log.warning("decoder took too long", extra={"decoder": self.pid})
            raise DependencyDown(f"the decoder took over {seconds:g} s") from None
        except orjson.JSONDecodeError:
            raise DependencyDown("the decoder answered nonsense") from None
        except (EOFError, OSError):
            log.warning("decoder died", extra={"decoder": self.pid})
            raise DependencyDown("the decoder died of this code stream") from None
        self.is_sound = True
        return outcome, found, body

    def _receive(self, length: int, deadline: float) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._socket.settimeout(_left(deadline))
            n = self._socket.recv_into(view)
            if not n:
                raise EOFError
            view = view[n:]
        return data

    def end(self) -> None:
        """Kill the process, whatever it does, and wait for it."""
        self._socket.close()
        self._shared.close()
        with suppress(OSError):
            self._popen.kill()
        self._popen.wait()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
