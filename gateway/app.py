"""The composition root: builds every part from settings; the only wiring.

Each process kind has its function: `run_dimse` and `run_worker` here, `run_web` in
`gateway.face`. They build what they need after forking, so that no connection, thread
or lock crosses.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gateway import metrics, viewing
from gateway.identity import assembly
from gateway.worker import (
    PRUNE_SECONDS,
    Follower,
    Loop,
    Worker,
    standard_loops,
    stop_on_signal,
)
from pacs.dimse.association import Handler
from pacs.dimse.command import CommandField
from pacs.dimse.commit import CommitHandler, ReportSender
from pacs.dimse.counts import AssociationCounts
from pacs.dimse.deliver import Outgoing, PeerSender
from pacs.dimse.dial import Timeouts, client_tls
from pacs.dimse.find import FindHandler
from pacs.dimse.get import GetHandler
from pacs.dimse.move import MoveHandler
from pacs.dimse.server import DimseServer
from pacs.imaging.codecs import DecoderPool
from pacs.services import commitment as commitment_service
from pacs.services import forwarding as forwarding_service
from pacs.services import renditions as rendition_service
from pacs.services import sealing as sealing_service
from pacs.services import settling as settling_service
from pacs.services import thumbnails as thumbnail_service
from pacs.services.commitment import CommitmentService
from pacs.services.deletion import DeletionService
from pacs.services.describe import Rules
from pacs.services.erasure import Erasure
from pacs.services.forwarding import ForwardingService
from pacs.services.ingest import IngestService
from pacs.services.packbook import PackBook
from pacs.services.peers import PeerService
from pacs.services.policy import AccessPolicy
from pacs.services.query import QueryService
from pacs.services.recovery import Recovery
from pacs.services.rendering import RenderService
from pacs.services.renditions import RenditionReader, Renditions
from pacs.services.retirement import Retirement
from pacs.services.retrieve import RetrieveService
from pacs.services.sealing import Sealing
from pacs.services.settling import Settling
from pacs.services.thumbnails import ThumbnailService
from storage import activity
from storage.audit import AuditTrail
from storage.audit.trail import FOLDER as AUDIT
from storage.db.engine import Database
from storage.jobs.runner import JobRunner, Retry
from storage.kernel.clock import SystemClock
from storage.kernel.errors import NotFound, Unavailable
from storage.kernel.settings import Settings, is_loopback
from storage.objects.files import FileObjectStore
from storage.objects.protocol import ObjectStore
from storage.outbox import ChangeFeed, Event
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter

log = logging.getLogger(__name__)

PACKS = "packs"
OBJECTS = "objects"
#: How often the worker looks at queues, lags and free space for `/metrics`.
GAUGE_SECONDS = 10.0
#: Series that are sealed at a time; a queue is looked at twice a second.
SEALING = 4
#: Lower priority of the worker: receiving and answering come first.
WORKER_NICE = 10
#: How often a process looks after the rows of its own packs.
BOOK_SECONDS = 2.0
#: How often the object folder is searched for unfinished files.
SWEEP_SECONDS = 86_400.0
#: How long a peer, or the object store, may be away before a job is given up.
DELIVERY_DAYS = 7


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
    render: RenderService
    thumbnails: ThumbnailService
    deletion: DeletionService
    settling: Settling
    peers: PeerService
    policy: AccessPolicy
    decoders: DecoderPool
    book: PackBook
    views: viewing.Views
    audit: AuditTrail
    identity: assembly.Identity

    def close(self) -> None:
        """Close packs, decoders and connections; reads are audited till the end."""
        self.views.close()
        self.decoders.close()
        self.packs.close()
        try:
            self.book.flush()
        except Unavailable as error:
            log.warning("pack book: %s", error, extra={"event": "packbook.failed"})
        self.reader.close()
        self.audit.close()
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
    book = PackBook(database)
    packs = PackWriter(
        pack_folder(settings),
        roll_bytes=settings.packs.roll_bytes,
        sync=settings.packs.sync,
        min_free_bytes=settings.packs.min_free_bytes,
        on_closed=book.closed,
    )
    objects = open_objects(settings)
    reader = PackReader(pack_folder(settings), objects)
    decoders = DecoderPool(
        settings.limits,
        processes=settings.pacs.decoders,
        observer=metrics.DecoderMetrics(),
    )
    audit = AuditTrail(
        database,
        clock,
        settings.data / AUDIT,
        limits=settings.limits,
        observer=metrics.AuditMetrics(),
    )
    peers = PeerService(
        database=database,
        clock=clock,
        configured=settings.dimse.peers,
        trail=audit,
    )
    policy = AccessPolicy(
        our_aes=our_aes(settings), peers=peers, open_access=settings.open
    )
    retrieve = RetrieveService(
        database=database,
        reader=reader,
        decoders=decoders,
        limits=settings.limits,
        on_corrupt=metrics.CORRUPT_READS.inc,
        renditions=RenditionReader(database, objects),
    )
    render = RenderService(
        retrieve=retrieve,
        workers=decoders,
        cache_bytes=settings.pacs.picture_cache_bytes,
    )
    query = QueryService(database=database, limits=settings.limits, headers=retrieve)
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
        query=query,
        retrieve=retrieve,
        render=render,
        thumbnails=ThumbnailService(
            database=database, retrieve=retrieve, render=render
        ),
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
        book=book,
        views=viewing.open_views(query, retrieve, settings, metrics.DecoderMetrics()),
        audit=audit,
        identity=assembly.assemble(
            database=database,
            clock=clock,
            settings=settings.identity,
            policy=policy,
            trail=audit,
        ),
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
def running_node(settings: Settings) -> Iterator[Node]:
    """Yield the services of a process that runs until it is told to stop."""
    node = open_node(settings)
    stop = threading.Event()
    keeper = threading.Thread(
        target=_keep_book, args=(node, stop), name="packbook", daemon=True
    )
    keeper.start()
    try:
        yield node
    finally:
        stop.set()
        keeper.join()
        node.close()


def _keep_book(node: Node, stop: threading.Event) -> None:
    """Keep the rows of this process' packs in step with its files."""
    while not stop.wait(BOOK_SECONDS):
        try:
            node.book.tick(node.packs, node.reader)
        except Unavailable as error:
            log.warning("pack book: %s", error, extra={"event": "packbook.failed"})
        except Exception:
            log.exception("pack book failed", extra={"event": "packbook.failed"})


def recovery(node: Node) -> Recovery:
    """Return what brings packs of dead processes and the index together."""
    return Recovery(
        database=node.database,
        ingest=node.ingest,
        packs=node.packs,
        node_id=node.settings.node.id,
        deletions=node.deletion,
    )


def prepare(settings: Settings) -> None:
    """Bring packs and index together after whatever ended the last run."""
    node = open_node(settings)
    try:
        recovery(node).run()
        if not settings.open:
            _warn_of_logins(node)
    finally:
        node.close()


def _warn_of_logins(node: Node) -> None:
    """Say what keeps people from logging in, or from doing so safely."""
    http = node.settings.http
    if node.identity.accounts.is_empty():
        log.warning(
            "nobody can log in yet: run `huying init`",
            extra={"event": "identity.empty"},
        )
    if not is_loopback(http.host) and not http.external_url.startswith("https://"):
        log.warning(
            "passwords may cross the network in the clear: put TLS before %s and name"
            " its https address in http.external_url",
            http.host,
            extra={"event": "identity.clear_text"},
        )


def run_dimse(
    settings: Settings,
    listener: socket.socket,
    tls_listener: socket.socket | None,
    counts: AssociationCounts,
    slot: int,
) -> None:
    """Be one DICOM process until SIGTERM."""
    stop = stop_on_signal()
    with running_node(settings) as node:
        limits = settings.limits
        handlers: dict[int, Handler] = {
            CommandField.C_FIND_RQ: FindHandler(node.query, node.policy, limits),
            CommandField.C_GET_RQ: GetHandler(
                node.retrieve, node.policy, limits, settings.dimse.read_seconds
            ),
            CommandField.C_MOVE_RQ: MoveHandler(
                node.retrieve,
                node.policy,
                limits,
                our_aes(settings),
                _outgoing(settings),
            ),
            CommandField.N_ACTION_RQ: CommitHandler(
                commitment(node), node.policy, node.peers, limits
            ),
        }
        server = DimseServer(
            settings=settings.dimse,
            limits=limits,
            policy=node.policy,
            ingest=node.ingest,
            handlers=handlers,
            counts=counts,
            slot=slot,
            observer=metrics.DimseMetrics(),
            trail=node.audit,
        )
        server.serve(listener, tls_listener, stop)


def _outgoing(settings: Settings) -> Outgoing:
    """Return how this node opens associations; TLS as its own listener has it."""
    dimse = settings.dimse
    return Outgoing(Timeouts.for_settings(dimse), client_tls(dimse.tls))


def commitment(node: Node) -> CommitmentService:
    """Return the storage commitment service."""
    return CommitmentService(
        database=node.database, retrieve=node.retrieve, clock=node.clock
    )


def run_worker(settings: Settings, slot: int) -> None:
    """Be the worker until SIGTERM; it gives way to the processes that answer."""
    stop = stop_on_signal()
    os.nice(WORKER_NICE)
    with running_node(settings) as node:
        jobs = JobRunner(settings.jobs_url(), slot=f"{settings.node.id}-{slot + 1}")
        followers, ticks = _background(node, jobs)
        loops = standard_loops(
            database=node.database,
            feed=node.feed,
            clock=node.clock,
            followers=followers,
            ticks=ticks,
            jobs=jobs,
            waits_for=[activity.FOLLOWER],
            event_days=settings.worker.event_days,
            job_days=settings.worker.job_days,
        )
        loops.append(Loop("follow.activity", partial(_count_arrivals, node.feed), 0.5))
        loops.append(
            Loop("prune.commitments", partial(_prune_commitments, node), PRUNE_SECONDS)
        )
        if isinstance(node.objects, FileObjectStore):
            loops.append(Loop("sweep.objects", node.objects.sweep, SWEEP_SECONDS))
        loops.append(
            Loop("gauges", partial(_gauge, node, jobs, followers), GAUGE_SECONDS)
        )
        Worker(loops, jobs, metrics.LoopMetrics()).run(stop)


def _background(
    node: Node, jobs: JobRunner
) -> tuple[list[Follower], dict[str, Callable[[], int]]]:
    """Register the jobs of the worker; return its followers and its ticks."""
    settings = node.settings
    folder, node_id = pack_folder(settings), settings.node.id
    outgoing = _outgoing(settings)
    retirement = Retirement(
        database=node.database,
        packs=node.packs,
        reader=node.reader,
        objects=node.objects,
        clock=node.clock,
        node_id=node_id,
        grace_seconds=settings.packs.seal_grace_seconds,
    )
    erasure = Erasure(
        database=node.database,
        reader=node.reader,
        objects=node.objects,
        retirement=retirement,
        clock=node.clock,
        folder=folder,
        node_id=node_id,
        min_free_bytes=settings.packs.min_free_bytes,
    )
    sealing = Sealing(
        database=node.database,
        reader=node.reader,
        objects=node.objects,
        retirement=retirement,
        clock=node.clock,
        folder=folder,
        node_id=node_id,
        pack_bytes=settings.packs.roll_bytes,
        min_free_bytes=settings.packs.min_free_bytes,
    )
    forwarding = ForwardingService(
        database=node.database,
        retrieve=node.retrieve,
        reader=node.reader,
        peers=node.peers,
        sender=PeerSender(node.retrieve, outgoing, settings.dimse.aet),
        clock=node.clock,
        trail=node.audit,
    )
    committing = commitment(node)
    for_days = Retry(give_up_seconds=DELIVERY_DAYS * 86_400)
    jobs.register(forwarding_service.JOB, forwarding.work, retry=for_days)
    jobs.register(
        commitment_service.JOB,
        committing.worker(ReportSender(node.peers, outgoing)),
        retry=for_days,
    )
    followers = [
        Follower(
            "metadata",
            partial(_prepare_metadata, node.retrieve),
            frozenset({settling_service.SETTLED}),
        ),
        Follower(
            thumbnail_service.FOLLOWER,
            partial(_prepare_thumbnails, node.thumbnails),
            thumbnail_service.KINDS,
        ),
        Follower(
            forwarding_service.FOLLOWER,
            forwarding.follower(jobs.enqueue),
            forwarding_service.KINDS,
        ),
        Follower(
            commitment_service.FOLLOWER,
            committing.follower(jobs.enqueue),
            commitment_service.KINDS,
        ),
    ]
    if settings.packs.seal:
        jobs.register(sealing.job, sealing.seal, concurrency=SEALING, retry=for_days)
        followers.append(
            Follower(
                sealing.job, partial(sealing.follow, jobs=jobs), sealing_service.KINDS
            )
        )
    renditions = Renditions(
        database=node.database,
        objects=node.objects,
        frames=node.retrieve,
        clock=node.clock,
        folder=settings.data,
        threads=settings.pacs.decoders,
    )
    if settings.packs.htj2k:
        jobs.register(rendition_service.JOB, renditions.make, retry=for_days)
        followers.append(
            Follower(
                rendition_service.JOB,
                partial(renditions.follow, jobs=jobs),
                rendition_service.KINDS,
            )
        )
    ticks = {
        # Also where no more are made: what is deleted must not live on in a copy.
        "renditions": renditions.tick,
        "settle": node.settling.tick,
        "recover": recovery(node).tick,
        "retire": retirement.tick,
        "erase": erasure.tick,
    }
    return followers, ticks


def _prepare_metadata(retrieve: RetrieveService, event: Event) -> None:
    """Build what WADO-RS metadata requests of a settled study will ask for.

    A study deleted meanwhile needs none; one whose packs lie on another host, or in
    a store that is away, has it built by the first request that can read them.
    """
    try:
        retrieve.prepare_metadata(str(event.payload["study"]), event.tenant)
    except (NotFound, Unavailable) as error:
        log.info(
            "metadata not prepared: %s",
            error,
            extra={"event": "metadata.later", "study": event.payload["study"]},
        )


def _prepare_thumbnails(thumbnails: ThumbnailService, event: Event) -> None:
    """Make the pictures of a settled study; those that cannot be are made on demand."""
    try:
        thumbnails.follow(event)
    except (NotFound, Unavailable) as error:
        log.info(
            "thumbnails not prepared: %s",
            error,
            extra={"event": "thumbnails.later", "study": event.payload["study"]},
        )


def _count_arrivals(feed: ChangeFeed) -> int:
    return feed.follow_batch(activity.FOLLOWER, activity.count, kinds=activity.KINDS)


def _prune_commitments(node: Node) -> int:
    """Forget transactions as old as forgotten events, whose delivery is over."""
    days = max(node.settings.worker.event_days, DELIVERY_DAYS + 1)
    return commitment(node).prune(node.clock.now_us() - int(days * 86_400e6))


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
