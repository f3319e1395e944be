"""The composition root: builds every part from settings; the only wiring.

Each process kind has its function here: `run_web`, `run_dimse`, `run_worker`. They
build what they need after forking, so that no connection, thread or lock crosses.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

import pacs.web.dependencies
import viewer.app
from gateway import metrics, pages
from gateway.http import api, application, health
from gateway.worker import Follower, Loop, Worker, standard_loops, stop_on_signal
from pacs.dimse.counts import AssociationCounts
from pacs.imaging.codecs import DecoderPool
from pacs.services.deletion import DeletionService
from pacs.services.describe import Rules
from pacs.services.ingest import IngestService
from pacs.services.peers import PeerService
from pacs.services.policy import AccessPolicy
from pacs.services.query import QueryService
from pacs.services.retrieve import RetrieveService
from pacs.services.settling import Settling
from pacs.web import search, store
from pacs.web.intake import Intake
from storage import activity
from storage.db.engine import Database
from storage.jobs.runner import JobRunner
from storage.kernel.clock import SystemClock
from storage.kernel.errors import DependencyDown
from storage.kernel.settings import Settings
from storage.objects.files import FileObjectStore
from storage.objects.protocol import ObjectStore
from storage.outbox import ChangeFeed
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter
from viewer.activity import ArchiveActivity

log = logging.getLogger(__name__)

PACKS = "packs"
OBJECTS = "objects"
DICOMWEB = "/dicom-web"
#: Requests under way when a web process is told to stop have this long to end.
DRAIN_SECONDS = 15
#: How often the worker looks at queues, lags and free space for `/metrics`.
GAUGE_SECONDS = 10.0


@dataclass(slots=True)
class Node:
    """All services of one process, sharing one database and one pack writer."""

    settings: Settings
    clock: SystemClock
    database: Database
    objects: ObjectStore
    packs: PackWriter
    reader: PackReader
    feed: ChangeFeed
    ingest: IngestService
    query: QueryService
    retrieve: RetrieveService
    deletion: DeletionService
    settling: Settling
    peers: PeerService
    policy: AccessPolicy
    decoders: DecoderPool

    def close(self) -> None:
        """Close packs, decoders and connections; nothing is lost without it."""
        self.decoders.close()
        self.packs.close()
        self.reader.close()
        self.database.close()


def pack_folder(settings: Settings) -> Path:
    """Return where the local packs of this host lie."""
    return settings.data / PACKS


def open_objects(settings: Settings) -> ObjectStore:
    """Return the configured object store."""
    if settings.objects.kind == "s3":
        from storage.objects.s3 import S3ObjectStore

        return S3ObjectStore(settings.objects.s3)
    return FileObjectStore(settings.data / OBJECTS)


def our_aes(settings: Settings) -> dict[str, str]:
    """Return our AE titles and the tenant of each; empty: by calling AE."""
    return {
        settings.dimse.aet: "",
        **{ae.title: ae.tenant for ae in settings.dimse.aes},
    }


def open_node(settings: Settings) -> Node:
    """Build the services of this process; the index must be current."""
    clock = SystemClock()
    database = Database(settings.database_url(), pool_size=settings.database.pool_size)
    packs = PackWriter(
        pack_folder(settings),
        roll_bytes=settings.packs.roll_bytes,
        sync=settings.packs.sync,
        min_free_bytes=settings.packs.min_free_bytes,
    )
    objects = open_objects(settings)
    reader = PackReader(pack_folder(settings), objects)
    decoders = DecoderPool(settings.limits, processes=settings.pacs.decoders)
    peers = PeerService(database=database, clock=clock, configured=settings.dimse.peers)
    policy = AccessPolicy(
        our_aes=our_aes(settings), peers=peers, open_access=settings.open
    )
    retrieve = RetrieveService(
        database=database, reader=reader, decoders=decoders, limits=settings.limits
    )
    return Node(
        settings=settings,
        clock=clock,
        database=database,
        objects=objects,
        packs=packs,
        reader=reader,
        feed=ChangeFeed(database),
        ingest=IngestService(
            database=database,
            packs=packs,
            rules=rules(settings),
            clock=clock,
            sync=settings.packs.sync,
            node_id=settings.node.id,
            observer=metrics.IngestMetrics(),
        ),
        query=QueryService(database=database, limits=settings.limits, headers=retrieve),
        retrieve=retrieve,
        deletion=DeletionService(
            database=database,
            packs=packs,
            policy=policy,
            clock=clock,
            node_id=settings.node.id,
            settle_seconds=settings.pacs.settle_seconds,
            rewrite_seconds=settings.packs.rewrite_seconds,
            permanent=settings.pacs.permanent_delete,
        ),
        settling=Settling(database=database, policy=policy, clock=clock),
        peers=peers,
        policy=policy,
        decoders=decoders,
    )


def rules(settings: Settings) -> Rules:
    """Return what ingest accepts."""
    return Rules(
        limits=settings.limits,
        settle_seconds=settings.pacs.settle_seconds,
        duplicates=settings.pacs.duplicates,
        lenient_uids=settings.pacs.lenient_uids,
        require_patient_id=settings.pacs.require_patient_id,
        replaced_keep_seconds=settings.packs.rewrite_seconds,
    )


@contextmanager
def _opened(settings: Settings) -> Iterator[Node]:
    node = open_node(settings)
    try:
        yield node
    finally:
        node.close()


def prepare(settings: Settings) -> None:
    """Bring packs and index together after whatever ended the last run."""


def run_web(settings: Settings, listener: socket.socket, _slot: int) -> None:
    """Be one web process until SIGTERM."""
    with _opened(settings) as node:
        intake = Intake(
            node.ingest, settings.limits, body_seconds=settings.http.body_seconds
        )
        try:
            config = uvicorn.Config(
                web_application(node, intake),
                http="httptools",
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
    base = settings.http.external_url.rstrip("/")

    def given(value: Any) -> Callable[[], Any]:
        async def dependency() -> Any:
            return value

        return dependency

    async def current_actor() -> Any:
        return node.policy.current_user()

    return application.build(
        routers={
            DICOMWEB: search.router,
            f"{DICOMWEB} ": store.router,
            "": api.router,
            " ": health.router,
            "  ": viewer.app.router,
        },
        dependencies={
            pacs.web.dependencies.current_actor: current_actor,
            pacs.web.dependencies.access_policy: given(node.policy),
            pacs.web.dependencies.base_url: given(base),
            search.query_service: given(node.query),
            store.intake: given(intake),
            api.current_actor: current_actor,
            api.services: given(services),
            health.readiness: given(looking),
            health.metrics_token: given(settings.http.metrics_token.get_secret_value()),
            viewer.app.current_actor: current_actor,
            viewer.app.study_directory: given(directory),
            viewer.app.activity_source: given(counted),
            viewer.app.node_card: given(card),
        },
        version=version,
        open_access=settings.open,
    )


def readiness(node: Node, version: str) -> health.Readiness:
    """Return what ``/readyz`` looks at."""
    required: dict[str, Callable[[], None]] = {
        "index": node.database.ping,
        "packs": partial(_can_write, pack_folder(node.settings)),
        "space": node.packs.check_space,
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


def run_dimse(
    settings: Settings,
    listener: socket.socket,
    tls_listener: socket.socket | None,
    counts: AssociationCounts,
    slot: int,
) -> None:
    """Be one DICOM process until SIGTERM."""
    from pacs.dimse.association import Handler
    from pacs.dimse.command import CommandField
    from pacs.dimse.get import GetHandler
    from pacs.dimse.move import MoveHandler
    from pacs.dimse.server import DimseServer

    stop = stop_on_signal()
    with _opened(settings) as node:
        handlers: dict[int, Handler] = {
            CommandField.C_GET_RQ: GetHandler(
                node.retrieve, node.policy, settings.limits, settings.dimse.read_seconds
            ),
            CommandField.C_MOVE_RQ: MoveHandler(
                node.retrieve, node.policy, settings.limits, our_aes(settings)
            ),
        }
        server = DimseServer(
            settings=settings.dimse,
            limits=settings.limits,
            policy=node.policy,
            ingest=node.ingest,
            handlers=handlers,
            counts=counts,
            slot=slot,
            observer=metrics.DimseMetrics(),
        )
        server.serve(listener, tls_listener, stop)


def run_worker(settings: Settings, slot: int) -> None:
    """Be the worker until SIGTERM."""
    stop = stop_on_signal()
    with _opened(settings) as node:
        jobs = JobRunner(settings.jobs_url(), slot=f"worker-{slot + 1}")
        followers: list[Follower] = []
        loops = standard_loops(
            database=node.database,
            feed=node.feed,
            clock=node.clock,
            followers=followers,
            ticks={"settle": node.settling.tick},
            jobs=jobs,
            event_days=settings.worker.event_days,
            job_days=settings.worker.job_days,
        )
        loops.append(Loop("follow.activity", partial(_count_arrivals, node.feed), 0.5))
        loops.append(
            Loop("gauges", partial(_gauge, node, jobs, followers), GAUGE_SECONDS)
        )
        Worker(loops, jobs, metrics.LoopMetrics()).run(stop)


def _count_arrivals(feed: ChangeFeed) -> int:
    return feed.follow_batch(activity.FOLLOWER, activity.count, kinds=activity.KINDS)


def _gauge(node: Node, jobs: JobRunner, followers: list[Follower]) -> int:
    """Set what `/metrics` shows of the worker; nothing is done, so it returns 0."""
    counts = jobs.status()
    metrics.JOBS.labels("waiting").set(counts.waiting)
    metrics.JOBS.labels("running").set(counts.running)
    metrics.JOBS.labels("failed").set(counts.failed)
    for name in (activity.FOLLOWER, *(one.name for one in followers)):
        metrics.FEED_LAG.labels(name).set(node.feed.lag(name))
    metrics.FREE_BYTES.set(shutil.disk_usage(pack_folder(node.settings)).free)
    return 0
