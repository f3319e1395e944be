"""Starts the processes of a node, keeps them running, and ends them together.

The parent takes the lock of the data folder, brings the index up to date, opens the
listening sockets, loads every module once, and forks before any thread exists, so
that the processes share their code's memory. It then only waits for signals. No
process leaves its group, and none survives it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import http.client
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, Protocol

from gateway import logs
from storage.db.engine import FOLDER_MODE
from storage.kernel.errors import Conflict, ImagingError, InvalidParameter
from storage.kernel.limits import MIB
from storage.kernel.settings import Settings

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
SIGNALS = frozenset(
    {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
)

#: How long the lock of a data folder is waited for: the processes of a node that was
#: killed hold it until they are gone.
LOCK_SECONDS = 3.0
#: Between SIGTERM and SIGKILL.
STOP_SECONDS = 25.0
#: Pause before a process that died is started again, doubled each time.
RESTART_SECONDS = (0.1, 15.0)
#: A process that lived this long has recovered from what made it die.
STABLE_SECONDS = 30.0
#: Deaths of one process before the node has ever been ready; then it gives up.
START_ATTEMPTS = 5
READY_SECONDS = 120.0
#: One question to `/readyz`; deaths are noticed in between.
PROBE_SECONDS = 1.0
#: Folders of metrics begin with this, then the process id of the supervisor.
METRICS = "metrics-"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
WEB_BACKLOG = 1024
DIMSE_BACKLOG = 256


class Kind(StrEnum):
    """Kinds of processes, in the order they are started."""

    WORKER = "worker"
    DIMSE = "dimse"
    WEB = "web"


ALL_KINDS = frozenset(Kind)


class Counts(Protocol):
    """Association counts in memory that the DIMSE processes share."""

    def reset(self, slot: int) -> None:
        """Forget what a process that died had open."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """What each process runs. Each call returns after SIGTERM.

    Attributes
    ----------
    prepare : callable
        Runs once before the others, in a process of its own: recovery.
    web : callable
        Gets settings, its listening socket, its slot (0-based).
    dimse : callable
        Gets settings, the listening socket, the TLS socket or None, counts, slot.
    worker : callable
        Gets settings and slot.
    counts : callable
        Makes the shared counts for a number of slots.
    buried : callable
        Gets the process id of each that died.
    """

    prepare: Callable[[Settings], None]
    web: Callable[[Settings, socket.socket, int], None]
    dimse: Callable[[Settings, socket.socket, socket.socket | None, Any, int], None]
    worker: Callable[[Settings, int], None]
    counts: Callable[[Settings, int], Counts]
    buried: Callable[[int], None] = lambda _pid: None


@dataclass(slots=True)
class Sockets:
    """The listening sockets, and the settings with the ports they got."""

    settings: Settings
    web: list[socket.socket] = field(default_factory=list)
    dimse: socket.socket | None = None
    tls: socket.socket | None = None

    def all(self) -> Iterator[socket.socket]:
        yield from self.web
        for one in (self.dimse, self.tls):
            if one is not None:
                yield one


@dataclass(slots=True)
class _Slot:
    """One process that is to run."""

    kind: Kind
    number: int
    pid: int = 0
    started: float = 0.0
    deaths: int = 0
    due: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number + 1}"


def serve(
    settings: Settings,
    *,
    kinds: frozenset[Kind] = ALL_KINDS,
    entry: Callable[[], Entry] | None = None,
    announce: Callable[[str, Settings], None] | None = None,
) -> int:
    """Run the processes of a node until SIGTERM; return the exit status.

    Parameters
    ----------
    kinds : frozenset of Kind
        With all of them this is ``huying serve``: it owns the data folder and
        brings the index up to date. Less is a part of a larger node, which shares
        the folder and expects a current index.
    entry : callable, optional
        Imports and returns what the processes run; called before forking.
    announce : callable, optional
        Gets one line with the addresses, and the settings with the ports in use,
        once the node is ready; the line is printed by default. It must start no
        thread: use `spawn`.

    Raises
    ------
    Conflict
        Another node works in the data folder, or a port is taken.
    """
    # Threads of a numeric library would not survive the fork, and cost memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logs.configure(settings.log)
    _tune_memory()
    with data_lock(settings.data, kinds), _shared_metrics(settings.data):
        sockets = listen(settings, kinds)
        try:
            made = (entry or default_entry)()
            if kinds == ALL_KINDS:
                _in_child("prepare", lambda: _prepare(sockets.settings, made))
            else:
                _in_child("check", lambda: _require_current(sockets.settings))
            return _Supervisor(sockets, kinds, made, announce or _print).run()
        finally:
            for one in sockets.all():
                one.close()


@contextmanager
def _shared_metrics(data: Path) -> Iterator[None]:
    """Give the processes a folder in which prometheus_client adds them up.

    Order matters: it decides at its import whether there is one.
    """
    left = [path for path in data.glob(f"{METRICS}*") if not _in_use(path)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    with TemporaryDirectory(
        prefix=f"{METRICS}{os.getpid()}-", dir=data, ignore_cleanup_errors=True
    ) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        yield


def _in_use(metrics: Path) -> bool:
    """Tell whether the node that made this folder still runs."""
    owner = metrics.name.removeprefix(METRICS).partition("-")[0]
    try:
        os.kill(int(owner), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _tune_memory() -> None:
    """Have the allocator use memory again, in few arenas.

    Threads come and go with associations; each would leave an arena of its own. And
    a buffer of the size of an image would be mapped, cleared and unmapped each time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * MIB)


def default_entry() -> Entry:
    """Load the application."""
    import pypinyin  # noqa: F401  # its tables take half a second and are shared

    from gateway import app, face, metrics
    from pacs.dimse.counts import AssociationCounts

    return Entry(
        prepare=app.prepare,
        web=face.run_web,
        dimse=app.run_dimse,
        worker=app.run_worker,
        counts=AssociationCounts.for_settings,
        buried=metrics.forget_process,
    )


def _prepare(settings: Settings, entry: Entry) -> None:
    from storage.db import migrate

    migrate.upgrade(settings.database_url())
    entry.prepare(settings)


def _require_current(settings: Settings) -> None:
    from storage.db import migrate

    migrate.require_current(settings.database_url())


@contextmanager
def data_lock(folder: Path, kinds: Iterable[Kind] = ALL_KINDS) -> Iterator[None]:
    """Own the data folder while the block runs.

    A whole node owns it alone; parts of one share it, with one worker among them.
    The lock is inherited by the processes and ends with the last of them.

    Raises
    ------
    Conflict
        Another node works there.
    InvalidParameter
        The folder cannot be used.
    """
    kinds = frozenset(kinds)
    wanted = [("node.lock", kinds == ALL_KINDS)]
    if Kind.WORKER in kinds and kinds != ALL_KINDS:
        wanted.append(("worker.lock", True))
    held: list[int] = []
    try:
        for name, alone in wanted:
            held.append(_lock_file(folder, name, alone=alone))
        yield
    finally:
        for fd in held:
            os.close(fd)


def _lock_file(folder: Path, name: str, *, alone: bool) -> int:
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidParameter("data", f"{folder}: {error.strerror}") from error
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            by = f" (process {owner})" if owner else ""
            raise Conflict(
                f"another Huying{by} works in {folder}: stop it, or choose another"
                " folder with --data"
            ) from None
        else:
            if alone:
                os.ftruncate(fd, 0)
                os.pwrite(fd, b"%d\n" % os.getpid(), 0)
            return fd


def listen(settings: Settings, kinds: frozenset[Kind] = ALL_KINDS) -> Sockets:
    """Open the listening sockets; port 0 becomes a free one.

    Every web process has a socket of its own on the shared port, so that the kernel
    spreads connections; the DIMSE processes take turns on one.

    Raises
    ------
    Conflict
        A port is taken.
    InvalidParameter
        An address is not one of this machine's.
    """
    made = Sockets(settings)
    http_, dimse = settings.http, settings.dimse
    try:
        if Kind.WEB in kinds:
            # With SO_REUSEPORT a second node would share the port unnoticed.
            probe = _bound("http", http_.host, http_.port)
            port = probe.getsockname()[1]
            probe.close()
            for _ in range(http_.workers):
                one = _bound("http", http_.host, port, shared=True)
                one.listen(WEB_BACKLOG)
                made.web.append(one)
            http_ = http_.model_copy(update={"port": port})
        if Kind.DIMSE in kinds:
            made.dimse = _bound("dimse", dimse.host, dimse.port)
            made.dimse.listen(DIMSE_BACKLOG)
            port = made.dimse.getsockname()[1]
            tls = dimse.tls
            if tls.port:
                made.tls = _bound("dimse.tls", dimse.host, tls.port)
                made.tls.listen(DIMSE_BACKLOG)
            dimse = dimse.model_copy(update={"port": port})
    except ImagingError:
        for one in made.all():
            one.close()
        raise
    made.settings = settings.model_copy(update={"http": http_, "dimse": dimse})
    return made


def _bound(name: str, host: str, port: int, *, shared: bool = False) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise InvalidParameter(
            f"{name}.host", f"{host} is not an address ({error})"
        ) from error
    family, _, _, _, address = found[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"{name}: port {port} of {host} is in use by another program"
            ) from error
        raise InvalidParameter(name, f"{host}:{port}: {error.strerror}") from error
    return made


class _Supervisor:
    """The parent's loop."""

    def __init__(
        self,
        sockets: Sockets,
        kinds: frozenset[Kind],
        entry: Entry,
        announce: Callable[[str, Settings], None],
    ) -> None:
        settings = sockets.settings
        self._settings = settings
        self._sockets = sockets
        self._entry = entry
        self._announce = announce
        count = {
            Kind.WEB: settings.http.workers,
            Kind.DIMSE: settings.dimse.workers,
            Kind.WORKER: 1,
        }
        self._slots = [
            _Slot(kind, n) for kind in Kind if kind in kinds for n in range(count[kind])
        ]
        self._counts = (
            entry.counts(settings, settings.dimse.workers)
            if Kind.DIMSE in kinds
            else None
        )
        self._ready = False
        self._probe_due = 0.0

    def run(self) -> int:
        """Start everything, then wait for signals."""
        gc.collect()
        gc.freeze()
        if threading.active_count() != 1:
            raise RuntimeError("a thread runs already; processes cannot be forked")
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        started = time.monotonic()
        try:
            while True:
                self._start_due()
                if not self._ready:
                    self._look_for_ready(started)
                received = signal.sigtimedwait(SIGNALS, self._pause())
                number = received.si_signo if received is not None else 0
                if number not in {0, signal.SIGCHLD}:
                    log.info("stopping", extra={"event": "node.stop"})
                    return 0
                if self._reap() and not self._ready and self._gave_up():
                    return 1
        finally:
            self._stop()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _pause(self) -> float:
        """Return how long to wait for a signal."""
        now = time.monotonic()
        waits = [slot.due - now for slot in self._slots if not slot.pid]
        if not self._ready:
            waits.append(self._probe_due - now)
        return max(0.0, min(waits, default=3600.0))

    def _start_due(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if not slot.pid and slot.due <= now:
                slot.started = now
                slot.pid = self._fork(slot)

    def _fork(self, slot: _Slot) -> int:
        return spawn(slot.name, lambda: self._run_slot(slot))

    def _run_slot(self, slot: _Slot) -> None:
        """Be the process of `slot`; close what belongs to the others."""
        mine: set[socket.socket | None] = set()
        if slot.kind is Kind.WEB:
            mine = {self._sockets.web[slot.number]}
        elif slot.kind is Kind.DIMSE:
            mine = {self._sockets.dimse, self._sockets.tls}
        for one in self._sockets.all():
            if one not in mine:
                one.close()
        if slot.kind is Kind.WEB:
            self._entry.web(self._settings, self._sockets.web[slot.number], slot.number)
        elif slot.kind is Kind.WORKER:
            self._entry.worker(self._settings, slot.number)
        elif self._sockets.dimse is not None:
            self._entry.dimse(
                self._settings,
                self._sockets.dimse,
                self._sockets.tls,
                self._counts,
                slot.number,
            )

    def _reap(self) -> list[_Slot]:
        """Note which processes have died, and when they start again."""
        died = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            for slot in self._slots:
                if slot.pid == pid:
                    self._note_death(slot, status)
                    died.append(slot)
        return died

    def _note_death(self, slot: _Slot, status: int) -> None:
        now = time.monotonic()
        pid, slot.pid = slot.pid, 0
        slot.deaths = 1 if now - slot.started > STABLE_SECONDS else slot.deaths + 1
        first, longest = RESTART_SECONDS
        slot.due = now + min(first * 2.0 ** min(slot.deaths - 1, 20), longest)
        if slot.kind is Kind.DIMSE and self._counts is not None:
            self._counts.reset(slot.number)
        self._entry.buried(pid)
        log.error(
            "process died",
            extra={
                "event": "process.died",
                "slot": slot.name,
                "status": os.waitstatus_to_exitcode(status),
                "deaths": slot.deaths,
            },
        )

    def _gave_up(self) -> bool:
        for slot in self._slots:
            if slot.deaths >= START_ATTEMPTS:
                log.error(
                    "process does not start",
                    extra={"event": "node.failed", "slot": slot.name},
                )
                return True
        return False

    def _look_for_ready(self, started: float) -> None:
        """Announce the node once its web face says that it is ready."""
        now = time.monotonic()
        if now < self._probe_due:
            return
        late = now - started > READY_SECONDS
        if not self._sockets.web or is_ready(self._settings) or late:
            self._ready = True
            if late:
                log.warning("not ready", extra={"event": "node.not_ready"})
            self._announce(addresses(self._settings, self._sockets), self._settings)
            sys.stdout.flush()
        self._probe_due = time.monotonic() + 0.1

    def _stop(self) -> None:
        """Pass SIGTERM on, wait, and end what does not end."""
        for slot in self._slots:
            _send(slot.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(slot.pid for slot in self._slots):
            left = deadline - time.monotonic()
            received = (
                signal.sigtimedwait(SIGNALS, min(left, 1.0)) if left > 0 else None
            )
            impatient = received is not None and received.si_signo != signal.SIGCHLD
            if left <= 0 or impatient:
                for slot in self._slots:
                    _send(slot.pid, signal.SIGKILL)
                deadline = time.monotonic() + STOP_SECONDS
            self._forget_dead()

    def _forget_dead(self) -> None:
        for slot in self._slots:
            if slot.pid:
                with suppress(ChildProcessError):
                    pid, _ = os.waitpid(slot.pid, os.WNOHANG)
                    if pid == 0:
                        continue
                slot.pid = 0


def spawn(name: str, work: Callable[[], None]) -> int:
    """Do `work` in a process that ends with this one; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _child(name, parent, work)
    return pid


def _print(line: str, _: Settings) -> None:
    print(line)  # noqa: T201  # the one line of a command


def is_ready(settings: Settings) -> bool:
    """Ask the node's own ``/readyz``."""
    connection = http.client.HTTPConnection(
        local_host(settings.http.host), settings.http.port, timeout=PROBE_SECONDS
    )
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def local_host(host: str) -> str:
    """Return where a listener on `host` is reached from this machine."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def addresses(settings: Settings, sockets: Sockets) -> str:
    """Return the line that says where the node listens."""
    parts = []
    if sockets.web:
        host = local_host(settings.http.host)
        shown = f"[{host}]" if ":" in host else host
        parts.append(f"web http://{shown}:{settings.http.port}/")
    if sockets.dimse is not None:
        at = f"{local_host(settings.dimse.host)}:{settings.dimse.port}"
        parts.append(f"DICOM {settings.dimse.aet} {at}")
    if sockets.tls is not None:
        parts.append(f"DICOM TLS port {settings.dimse.tls.port}")
    parts.append(f"data {settings.data.resolve()}")
    return "huying: " + ", ".join(parts)


def _send(pid: int, number: int) -> None:
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _child(name: str, parent: int, work: Callable[[], None]) -> NoReturn:
    """Become a process of the node; never returns."""
    status = 1
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(PR_SET_NAME, f"huying-{name}".encode()[:15])
        if os.getppid() != parent:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except ImagingError as error:
        log.error(  # noqa: TRY400  # the sentence says it all
            "process failed: %s", error, extra={"event": "process.failed"}
        )
    except BaseException:
        log.exception("process failed", extra={"event": "process.failed"})
    finally:
        with suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _in_child(name: str, work: Callable[[], None]) -> None:
    """Do `work` in a process of its own; its connections and memory end with it.

    Raises
    ------
    Conflict
        With the child's sentence, when it failed.
    """
    reading, writing = os.pipe()

    def report() -> None:
        os.close(reading)
        try:
            work()
        except ImagingError as error:
            os.write(writing, str(error).encode()[:4000])
            raise SystemExit(1) from error

    pid = spawn(name, report)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123  # a descriptor, not a path
        sentence = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(pid, 0)
    if status:
        raise Conflict(sentence or f"{name} failed; see the log")
