"""Servers that a test starts, and what the kernel says about processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.waiting import wait_until

STOP_SECONDS = 30.0


def is_running(pid: int) -> bool:
    """Tell whether a process exists and has not ended."""
    return _stat(pid) is not None


def children(parent: int) -> dict[str, int]:
    """Return name and id of the processes that `parent` started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            about = _stat(int(entry.name))
            if about is not None and about[1] == parent:
                found[about[0]] = int(entry.name)
    return found


def _stat(pid: int) -> tuple[str, int] | None:
    """Return name and parent of a process that runs."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = text[text.index("(") + 1 :].rpartition(")")
    state, parent = rest.split()[:2]
    return None if state in "ZX" else (name, int(parent))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, and end it when it does not."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    if process.poll() is None:
        process.kill()
    process.wait(STOP_SECONDS)


def wait_ready(
    process: subprocess.Popen[bytes],
    ready: Callable[[], bool],
    *,
    name: str,
    log: Path,
    seconds: float = 60.0,
) -> None:
    """Return once `ready`; when it does not come, raise with the end of the log."""

    def ready_or_dead() -> bool:
        return process.poll() is not None or ready()

    try:
        wait_until(ready_or_dead, f"{name} to be ready", seconds=seconds)
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode}")
    except (TimeoutError, RuntimeError) as error:
        stop(process)
        raise RuntimeError(f"{error}; its log ends:\n{tail(log)}") from error


def tail(log: Path, size: int = 8000) -> str:
    """Return the end of a log."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - size))
        return stream.read().decode("utf-8", "replace")
