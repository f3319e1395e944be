"""Debian's Orthanc, as a peer that we did not write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support import process, web
from tests.support.ports import free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


class Orthanc:
    """A server on loopback with its own folder; DICOM, REST and DICOMweb.

    Parameters
    ----------
    nodelay : bool
        Without it DCMTK answers in two small packets, and waits for the peer's
        delayed acknowledgement in between.
    **configuration
        Entries of Orthanc's configuration file.
    """

    aet = "ORTHANC"

    def __init__(
        self, folder: Path, *, nodelay: bool = False, **configuration: Any
    ) -> None:
        self.folder = folder
        self._configured = configuration
        self._environment = os.environ | ({"TCP_NODELAY": "1"} if nodelay else {})
        self.http_port = free_port()
        self.dimse_port = free_port()
        self.http = f"http://127.0.0.1:{self.http_port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin")
        if program is None or not PLUGIN.exists():
            raise RuntimeError(
                "Orthanc is not installed: run `make system` as root,"
                " or install the packages orthanc and orthanc-dicomweb"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "orthanc.json"
        config.write_text(json.dumps(self._configuration()), "utf-8")
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [program, str(config)],
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env=self._environment,
            )
        process.wait_ready(
            self._process,
            lambda: web.answers(f"{self.http}/system"),
            name="Orthanc",
            log=log,
        )

    def _configuration(self) -> dict[str, Any]:
        return {
            "Name": "test",
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "StorageCompression": False,
            "Plugins": [str(PLUGIN)],
            "HttpPort": self.http_port,
            "DicomPort": self.dimse_port,
            "DicomAet": self.aet,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
            "UnknownSopClassAccepted": True,
            "OverwriteInstances": True,
            "LimitFindResults": 0,
            "LimitFindInstances": 0,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            **self._configured,
        }

    @property
    def pid(self) -> int:
        """Return the process id."""
        if self._process is None:
            raise RuntimeError("Orthanc is not running")
        return self._process.pid

    def add_modality(self, name: str, aet: str, port: int) -> None:
        """Tell Orthanc where a remote AE is."""
        self.rest(
            "PUT",
            f"/modalities/{name}",
            {"AET": aet, "Host": "127.0.0.1", "Port": port, "AllowTranscoding": False},
        )

    def add_dicomweb_server(self, name: str, url: str) -> None:
        """Tell Orthanc where a DICOMweb service is."""
        self.rest("PUT", f"/dicom-web/servers/{name}", {"Url": url})

    def rest(self, method: str, path: str, value: Any = None) -> Any:
        """Call the REST API with a JSON value or bytes; return the JSON answer.

        Raises
        ------
        AssertionError
            With Orthanc's own words, when it refuses.
        """
        body = value if isinstance(value, bytes) else None
        if body is None and value is not None:
            body = json.dumps(value).encode()
        answer = web.request(self.http + path, method=method, body=body)
        if answer.status >= 300:
            raise AssertionError(f"{method} {path}: {answer.status} {answer.text}")
        return json.loads(answer.body) if answer.body.strip() else None

    def clear(self) -> None:
        """Delete every patient."""
        for patient in self.rest("GET", "/patients"):
            self.rest("DELETE", f"/patients/{patient}")

    def stop(self) -> None:
        if self._process is not None:
            process.stop(self._process)
            self._process = None
