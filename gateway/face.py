"""The web face of a node: its routes, what each is given, and its process.

The web half of the composition root; the services are made in `gateway.app`.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

import pacs.web.dependencies
import viewer.app
import viewer.endpoints
from gateway import audit as audit_routes
from gateway import pages, viewing
from gateway.app import Node, commitment, pack_folder, running_node
from gateway.http import access, api, application, health
from gateway.http.client import Clients
from gateway.http.owners import Owners
from gateway.http.protocol import BoundedProtocol
from gateway.http.rules import RuleTable
from gateway.identity import routes as identity_routes
from gateway.identity.pages import login_page
from pacs.web import delete, rendered, retrieve, search, store
from pacs.web.intake import Intake
from pacs.web.routes import DICOMWEB as DICOMWEB_ROUTERS
from pacs.web.routes import REST as REST_ROUTERS
from pacs.web.routes import WADO_URI as WADO_URI_ROUTERS
from storage import activity
from storage.audit.search import AuditReader
from storage.kernel.errors import DependencyDown
from storage.kernel.settings import Settings
from viewer.activity import ArchiveActivity

DICOMWEB = "/dicom-web"
#: Requests under way when a web process is told to stop have this long to end.
DRAIN_SECONDS = 15
#: Connections of one web process; more are answered 503.
MAX_CONNECTIONS = 2000


def run_web(settings: Settings, listener: socket.socket, _slot: int) -> None:
    """Be one web process until SIGTERM."""
    with running_node(settings) as node:
        intake = Intake(
            node.ingest, settings.limits, body_seconds=settings.http.body_seconds
        )
        try:
            config = uvicorn.Config(
                web_application(node, intake),
                http=BoundedProtocol,
                limit_concurrency=MAX_CONNECTIONS,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(settings.http.idle_seconds),
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_Server(config).serve([listener]))
        finally:
            intake.close()


class _Server(uvicorn.Server):
    """Stops on SIGTERM by itself; the process goes on to close what it opened."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.handle_exit, signal.SIGTERM, None)
        yield


def web_application(node: Node, intake: Intake) -> FastAPI:
    """Return the web face of `node`."""
    settings = node.settings
    version = distribution_version("huying")
    looking = readiness(node, version)
    services = api.Services(
        changes=node.feed,
        settling=node.settling,
        peers=node.peers,
        commitments=commitment(node),
        policy=node.policy,
        facts={
            "id": settings.node.id,
            "role": settings.node.role,
            "version": version,
            "aet": settings.dimse.aet,
            "dimse_port": settings.dimse.port,
            "open": settings.open,
            "sync": str(settings.packs.sync),
        },
    )
    directory = pages.StudyDirectory(node.query)
    counted = ArchiveActivity(
        activity.ActivityReader(node.database, node.clock),
        partial(pages.sums, node.database),
    )
    card = viewer.app.NodeCard(settings.dimse.aet, settings.dimse.port, version)
    # An open node lets only requests through whose Host is its own.
    base = pacs.web.dependencies.BaseUrl(
        settings.http.external_url.rstrip("/"), from_host=settings.open
    )
    clients = Clients(settings.http.trusted_proxies, settings.http.external_url)
    cookie = identity_routes.CookieForm(base.configured.startswith("https://"))

    def given(value: Any) -> Callable[[], Any]:
        async def dependency() -> Any:
            return value

        # Looked at for each request while dependencies are replaced; made once.
        dependency.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        return dependency

    async def current_actor() -> Any:
        return access.acting()

    current_actor.__signature__ = inspect.Signature()  # type: ignore[attr-defined]

    return application.build(
        routers=[
            *((DICOMWEB, router) for router in DICOMWEB_ROUTERS),
            *(("", router) for router in WADO_URI_ROUTERS),
            *((api.PREFIX, router) for router in REST_ROUTERS),
            (api.PREFIX, api.router),
            (api.PREFIX, audit_routes.router),
            (identity_routes.PREFIX, identity_routes.router),
            ("", identity_routes.pages),
            ("", health.router),
            ("", viewer.app.router),
            ("", viewer.endpoints.router),
        ],
        dependencies={
            pacs.web.dependencies.current_actor: current_actor,
            pacs.web.dependencies.access_policy: given(node.policy),
            pacs.web.dependencies.base_url: given(base),
            delete.deletion_service: given(node.deletion),
            rendered.render_service: given(node.render),
            rendered.thumbnail_service: given(node.thumbnails),
            retrieve.retrieve_service: given(node.retrieve),
            search.query_service: given(node.query),
            store.intake: given(intake),
            api.current_actor: current_actor,
            api.services: given(services),
            audit_routes.services: given(
                audit_routes.Services(
                    AuditReader(node.database),
                    audit_routes.PatientStudies(node.database),
                    node.policy,
                )
            ),
            identity_routes.services: given(
                identity_routes.Services(
                    logins=node.identity.logins,
                    accounts=node.identity.accounts,
                    tokens=node.identity.tokens,
                    tickets=node.identity.tickets,
                    clients=clients,
                    cookie=cookie,
                    external_url=base.configured,
                    login_page=login_page(200, settings.identity.min_length),
                    policy=node.policy,
                )
            ),
            health.readiness: given(looking),
            health.metrics_token: given(settings.http.metrics_token.get_secret_value()),
            viewer.app.current_actor: current_actor,
            viewer.app.study_directory: given(directory),
            viewer.app.activity_source: given(counted),
            viewer.app.node_card: given(card),
            **viewing.dependencies(node.views, node.policy, current_actor, given),
        },
        version=version,
        open_access=settings.open,
        gate={
            "rules": RuleTable(),
            "policy": node.policy,
            "sessions": node.identity.sessions,
            "logins": node.identity.logins,
            "trail": node.audit,
            "owners": Owners(node.database),
            "clients": clients,
            "cookie": cookie.name,
            "open_access": settings.open,
            "basic": settings.identity.basic,
            "login_page": login_page(401, settings.identity.min_length),
        },
    )


def readiness(node: Node, version: str) -> health.Readiness:
    """Return what ``/readyz`` looks at."""
    required: dict[str, Callable[[], None]] = {
        "index": node.database.ping,
        "packs": partial(_can_write, pack_folder(node.settings)),
        "space": node.packs.check_space,
        "audit": node.audit.check,
    }
    degrading: dict[str, Callable[[], None]] = {"objects": node.objects.health}
    if node.settings.objects.kind == "files":
        # Files of this machine: what is wrong with them is wrong with the node.
        required, degrading = {**required, **degrading}, {}
    return health.Readiness(
        required, degrading, {"version": version, "sync": str(node.settings.packs.sync)}
    )


def _can_write(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"ok")
            probe.flush()
    except OSError as error:
        raise DependencyDown(f"pack storage: {error.strerror}") from error
