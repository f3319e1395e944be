"""An archive behind a real HTTP listener, without the other processes of a node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp as ASGIApplication

from pacs.imaging.codecs import DecoderPool
from pacs.services.deletion import DeletionService
from pacs.services.describe import Rules
from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy
from pacs.services.query import QueryService
from pacs.services.rendering import RenderService
from pacs.services.retrieve import RetrieveService
from pacs.services.thumbnails import ThumbnailService
from pacs.web import (
    delete,
    dependencies,
    rendered,
    retrieve,
    routes,
    search,
    store,
)
from pacs.web.intake import Intake
from pacs.web.problems import problem_response
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.errors import ImagingError, InvalidParameter
from storage.kernel.limits import Limits
from storage.kernel.settings import SyncPolicy
from storage.kernel.types import DEFAULT_TENANT, Actor, Role, TenantId
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter
from tests.support.waiting import wait_until
from tests.support.web import Response as HttpResponse

#: Header by which a test says whose request it is.
TENANT = "x-tenant"


@dataclass
class Archive:
    """Services over one folder."""

    folder: Path
    limits: Limits = field(default_factory=Limits)
    rules: Rules | None = None
    url: str = ""
    #: Of pictures: none, so that each request of a test is worked for.
    cache_bytes: int = 0
    database: Database = field(init=False)
    packs: PackWriter = field(init=False)
    reader: PackReader = field(init=False)
    ingest: IngestService = field(init=False)
    query: QueryService = field(init=False)
    retrieve: RetrieveService = field(init=False)
    decoders: DecoderPool = field(init=False)
    render: RenderService = field(init=False)
    thumbnails: ThumbnailService = field(init=False)

    def __post_init__(self) -> None:
        url = self.url or f"sqlite:///{self.folder / 'index.db'}"
        migrate.upgrade(url)
        self.database = Database(url)
        self.packs = PackWriter(self.folder / "packs", roll_bytes=1 << 30)
        self.reader = PackReader(self.folder / "packs")
        self.decoders = DecoderPool(self.limits)
        self.ingest = IngestService(
            database=self.database,
            packs=self.packs,
            rules=self.rules or Rules(limits=self.limits),
            clock=SystemClock(),
            sync=SyncPolicy.INSTANCE,
            node_id="node-1",
        )
        self.query = QueryService(database=self.database, limits=self.limits)
        self.retrieve = RetrieveService(
            database=self.database,
            reader=self.reader,
            decoders=self.decoders,
            limits=self.limits,
        )
        self.render = RenderService(
            retrieve=self.retrieve, workers=self.decoders, cache_bytes=self.cache_bytes
        )
        self.thumbnails = ThumbnailService(
            database=self.database, retrieve=self.retrieve, render=self.render
        )

    def close(self) -> None:
        self.decoders.close()
        self.packs.close()
        self.reader.close()
        self.database.close()


def actor_of(request: Request) -> Actor:
    """Return the actor a test speaks as."""
    tenant = TenantId(request.headers.get(TENANT, DEFAULT_TENANT))
    return Actor(tenant, "test", roles=frozenset({Role.OPEN}))


class NoPeers:
    """A directory of remote AEs without an entry."""

    def find(self, title: str) -> None:
        return None


def application(
    routers: list[tuple[str, APIRouter]],
    dependencies: Mapping[Callable[..., Any], Callable[..., Any]],
) -> FastAPI:
    """Return an application with the errors of the real one."""
    app = FastAPI(redirect_slashes=False)
    for prefix, router in routers:
        app.include_router(router, prefix=prefix)
    app.dependency_overrides.update(dependencies)

    def answer(_request: Request, error: Exception) -> Response:
        return problem_response(error)

    def malformed(_request: Request, _error: Exception) -> Response:
        return problem_response(InvalidParameter("request", "malformed"))

    app.add_exception_handler(ImagingError, answer)
    app.add_exception_handler(HTTPException, answer)
    app.add_exception_handler(RequestValidationError, malformed)
    return app


@contextmanager
def serving(app: ASGIApplication, **options: Any) -> Iterator[str]:
    """Run `app` on a free port of the loopback address; yield its base URL.

    Parameters
    ----------
    **options
        Of `uvicorn.Config`.
    """
    config = uvicorn.Config(
        app, port=0, log_level="error", ws="none", lifespan="off", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server to start")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


async def _tenant_actor(request: Request) -> Actor:
    return actor_of(request)


def given(value: Any) -> Callable[[], Any]:
    """Return a dependency that gives `value`."""

    async def dependency() -> Any:
        return value

    return dependency


@dataclass
class WebArchive:
    """An archive and the address of its listener."""

    archive: Archive
    url: str

    @property
    def dicomweb(self) -> str:
        return f"{self.url}/dicom-web"


@contextmanager
def web_archive(
    folder: Path,
    *,
    limits: Limits | None = None,
    rules: Rules | None = None,
    body_seconds: float = 20,
) -> Iterator[WebArchive]:
    """Serve DICOMweb over an archive in `folder`."""
    archive = Archive(folder, limits or Limits(), rules)
    policy = AccessPolicy(our_aes={}, peers=NoPeers(), open_access=True)
    deletion = DeletionService(
        database=archive.database,
        packs=archive.packs,
        policy=policy,
        clock=SystemClock(),
        node_id="node-1",
        settle_seconds=60,
        rewrite_seconds=60,
    )
    intake = Intake(archive.ingest, archive.limits, body_seconds=body_seconds)
    app = application(
        [
            *(("/dicom-web", router) for router in routes.DICOMWEB),
            *(("/api/v1", router) for router in routes.REST),
            *(("", router) for router in routes.WADO_URI),
        ],
        {
            dependencies.current_actor: _tenant_actor,
            dependencies.access_policy: given(policy),
            dependencies.base_url: given(dependencies.BaseUrl()),
            search.query_service: given(archive.query),
            store.intake: given(intake),
            retrieve.retrieve_service: given(archive.retrieve),
            rendered.render_service: given(archive.render),
            rendered.thumbnail_service: given(archive.thumbnails),
            delete.deletion_service: given(deletion),
        },
    )
    try:
        with serving(app) as url:
            yield WebArchive(archive, url)
    finally:
        intake.close()
        archive.close()


def multipart(
    parts: Sequence[bytes | tuple[str, bytes]],
    *,
    kind: str = "application/dicom",
    boundary: str = "B0undary",
) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a multipart request.

    Parameters
    ----------
    parts : sequence
        Bodies of type `kind`, or (header lines, body).
    """
    body = b""
    for part in parts:
        headers, data = (
            (f"Content-Type: {kind}", part) if isinstance(part, bytes) else part
        )
        body += f"--{boundary}\r\n{headers}\r\n\r\n".encode() + data + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return body, {
        "Content-Type": f'multipart/related; type="{kind}"; boundary={boundary}'
    }


def split(response: HttpResponse) -> list[tuple[dict[str, str], bytes]]:
    """Return the parts of a multipart answer, split in another way than ours."""
    kind = response.headers["content-type"]
    boundary = kind.partition("boundary=")[2].strip('"').encode()
    first, *parts, last = (b"\r\n" + response.body).split(b"\r\n--" + boundary)
    if first or not last.startswith(b"--"):
        raise ValueError("not a multipart body")
    found = []
    for part in parts:
        lines, _, body = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        pairs = (line.partition(": ")[::2] for line in lines.decode().split("\r\n"))
        found.append(({name.lower(): value for name, value in pairs}, body))
    return found
