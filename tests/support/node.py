"""A node as its users run it: the command, its processes, real sockets."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, SecretStr

from tests.support import process, web
from tests.support.waiting import wait_until

METRICS_TOKEN = "metrics-for-tests"  # noqa: S105  # of a node on loopback
START_SECONDS = 120.0
#: What tests want unless they say otherwise.
DEFAULTS: Mapping[str, Any] = {
    "open": True,
    "pacs__settle_seconds": 1,
    "packs__min_free_bytes": 0,
    "http__metrics_token": METRICS_TOKEN,
}
_ANNOUNCED = re.compile(
    rb"^huying: web http://127\.0\.0\.1:(\d+)/, DICOM (\S+) 127\.0\.0\.1:(\d+)",
    re.MULTILINE,
)


class RunningNode:
    """``huying serve --open`` on free ports and a folder of its own.

    A restart keeps folder and ports. Standard output and errors go to `log`.
    """

    #: Nodes that have not been stopped: a failing test shows what they wrote.
    alive: ClassVar[list[RunningNode]] = []

    def __init__(self, folder: Path, *, aet: str = "HUYING", **settings: Any) -> None:
        self.data = folder / "data"
        self.log = folder / "node.log"
        self.aet = aet
        self.http_port = 0
        self.dimse_port = 0
        self._environment = environment({**DEFAULTS, **settings})
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0

    @classmethod
    def start(cls, folder: Path, **settings: Any) -> Self:
        """Start a node below `folder`.

        Parameters
        ----------
        **settings
            ``aet``, and any setting with ``__`` for the dot: ``pacs__decoders=2``;
            a part of the tree works too: ``objects=Objects(...)``.
        """
        made = cls(folder, **settings)
        made.restart()
        return made

    @property
    def http(self) -> str:
        """Return the address of the web face, without a slash at its end."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def dicomweb(self) -> str:
        return f"{self.http}/dicom-web"

    @property
    def pid(self) -> int:
        """Return the process id of the supervisor."""
        if self._process is None:
            raise RuntimeError("the node is not running")
        return self._process.pid

    def restart(self, **settings: Any) -> None:
        """Stop the node if it runs; start it on the same folder and ports."""
        self.stop()
        self._environment |= environment(settings)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._started_at = self.log.stat().st_size
        command = [
            str(Path(sys.executable).with_name("huying")), "serve",
            "--data", str(self.data), "--aet", self.aet,
            "--http", f"127.0.0.1:{self.http_port}",
            "--dimse", f"127.0.0.1:{self.dimse_port}",
        ]  # fmt: skip
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=self._environment
            )
        RunningNode.alive.append(self)
        try:
            process.wait_ready(
                self._process,
                self._is_announced,
                name="the node",
                log=self.log,
                seconds=START_SECONDS,
            )
            wait_until(lambda: web.answers(f"{self.http}/readyz"), "/readyz to be 200")
        except BaseException:
            self.stop()
            raise

    def _is_announced(self) -> bool:
        found = _ANNOUNCED.search(self.log_bytes())
        if found is None:
            return False
        self.http_port, self.dimse_port = int(found[1]), int(found[3])
        return True

    def log_bytes(self) -> bytes:
        """Return what the node has written since it was last started."""
        with self.log.open("rb") as stream:
            stream.seek(self._started_at)
            return stream.read()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 60.0,
    ) -> web.Response:
        """Send one request to the web face."""
        return web.request(
            self.http + path, method=method, body=body, headers=headers, timeout=timeout
        )

    def get(self, path: str, **headers: str) -> web.Response:
        """GET `path`; ``accept="..."`` and the like become headers."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("GET", path, headers=named)

    def metrics(self) -> dict[str, float]:
        """Return each sample of ``/metrics`` by name and labels as they stand there."""
        answer = self.get("/metrics", authorization=f"Bearer {METRICS_TOKEN}")
        if answer.status != 200:
            raise AssertionError(f"/metrics: {answer.status} {answer.text}")
        samples = {}
        for line in answer.text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run one of our commands with this node's settings and folder."""
        return subprocess.run(
            [
                str(Path(sys.executable).with_name("huying")),
                *map(str, arguments), "--data", str(self.data),
            ],
            env=self._environment, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip

    def processes(self) -> dict[str, int]:
        """Return the processes below the supervisor: ``huying-dimse-1`` and so on."""
        return process.children(self.pid)

    def kill(self, name: str | None = None) -> None:
        """Send SIGKILL to the supervisor, which ends all, or to one process.

        Returns once the processes are gone; one that is killed alone may have been
        started again by then, under another process id.
        """
        if name is not None:
            victim = self.processes()[name]
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: not process.is_running(victim), f"the end of {name}")
            return
        pids = self.processes().values()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        wait_until(
            lambda: not any(map(process.is_running, pids)), "the processes to be gone"
        )

    def stop(self) -> None:
        """Send SIGTERM to the supervisor and wait; the folder stays."""
        if self._process is not None:
            process.stop(self._process)
            self._process = None
        if self in RunningNode.alive:
            RunningNode.alive.remove(self)


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a node: ours, with no setting but `settings`."""
    made = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HUYING_")
    }
    for name, value in settings.items():
        for path, leaf in _leaves(name, value):
            made[f"HUYING_{path.upper()}"] = leaf
    return made


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        for name, part in value:
            yield from _leaves(f"{path}__{name}", part)
    elif isinstance(value, SecretStr):
        yield path, value.get_secret_value()
    elif value is not None:
        yield path, str(value)
