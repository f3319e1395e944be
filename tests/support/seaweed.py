"""SeaweedFS, an S3 service of the test session's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from pydantic import SecretStr

from storage.kernel.settings import S3, Objects
from tests.support import process, web
from tests.support.ports import free_port_with_twin

ACCESS_KEY = "testkey"
SECRET_KEY = "testsecret123"  # noqa: S105  # of a server on loopback that ends soon


@dataclass(slots=True)
class SeaweedFS:
    """A server that can be stopped and started again with what it holds."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.ports['s3']}"

    def objects(self, bucket: str = "") -> Objects:
        """Return settings for a bucket of one test's own; the store makes it."""
        return Objects(
            kind="s3",
            s3=S3(
                endpoint=self.endpoint,
                bucket=bucket or f"t-{uuid4().hex[:16]}",
                access_key=SecretStr(ACCESS_KEY),
                secret_key=SecretStr(SECRET_KEY),
                secure=False,
            ),
        )

    def start(self) -> None:
        weed = Path(sys.executable).with_name("weed")
        if not weed.exists():
            raise RuntimeError("SeaweedFS is not installed: run `make setup`")
        if not self.ports:
            names = ("master", "volume", "filer", "s3")
            while len(set(self.ports.values())) < len(names):
                self.ports = {name: free_port_with_twin() for name in names}
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}), "utf-8")
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        command = [
            str(weed), "server", f"-dir={data}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", "-master.peers=none", "-master.telemetry=false",
            f"-master.port={self.ports['master']}", "-master.volumeSizeLimitMB=64",
            f"-volume.port={self.ports['volume']}", "-volume.max=300",
            f"-filer.port={self.ports['filer']}", "-s3",
            f"-s3.port={self.ports['s3']}", "-s3.port.iceberg=0",
            f"-s3.config={config}",
        ]  # fmt: skip
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self.folder
            )
        health = f"http://{self.endpoint}/healthz"
        process.wait_ready(
            self._process, lambda: web.answers(health), name="SeaweedFS", log=log
        )

    def stop(self) -> None:
        if self._process is not None:
            process.stop(self._process)
            self._process = None


@contextmanager
def running() -> Iterator[SeaweedFS]:
    """Yield a server that ends with the block."""
    made = SeaweedFS(Path(tempfile.mkdtemp(prefix="huying-s3-")))
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(made.folder, ignore_errors=True)
