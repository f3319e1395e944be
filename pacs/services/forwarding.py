"""Sending every settled study of a tenant on to the peers that want it.

A follower of `study.settled` makes one durable job of each study, version and peer. A
job sends what settled since the last one that ended well, and keeps note of each
instance, so that an attempt after a failure goes on where the last one stopped.

An object does not go back to the peer it came from: its record still knows the calling
AE. Around a longer ring it comes back as a duplicate, which settles nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import orjson
from sqlalchemy import Connection, select, update
from sqlalchemy.dialects import postgresql, sqlite

from pacs.domain.study import StoredInstance
from pacs.repository.tables import Forwarding, Instance, Series, Study
from pacs.services.policy import KnownPeer
from pacs.services.retrieve import RetrieveService
from storage.audit import AuditEvent, Outcome
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import DependencyDown, ImagingError, NotFound
from storage.kernel.types import Actor, Purpose, Role, TenantId
from storage.outbox import Event
from storage.packs.format import PREFIX_LENGTH, decode_header
from storage.packs.reader import PackGone, PackReader

log = logging.getLogger(__name__)

#: Name and kinds of the follower; name of the jobs.
FOLLOWER = "forward"
KINDS = frozenset({"study.settled"})
JOB = "forward"
#: How often progress is written while a study is sent.
NOTE_SECONDS = 1.0
#: Refusals whose reasons are logged for one study.
MAX_LOGGED = 20

Enqueue = Callable[[str, str, Mapping[str, Any]], bool]


class Fate(StrEnum):
    """What became of one instance at the peer."""

    STORED = "stored"
    NOTED = "noted"
    RETRY = "retry"
    REFUSED = "refused"


class ForwardPeers(Protocol):
    """The directory of remote AEs."""

    def find(self, title: str) -> KnownPeer | None:
        """Return the peer with this AE title, or None."""
        ...

    def list(self) -> list[KnownPeer]:
        """Return every peer."""
        ...


class Sender(Protocol):
    """Sends instances to a peer."""

    def send(
        self,
        peer: KnownPeer,
        instances: Sequence[StoredInstance],
        done: Callable[[StoredInstance, Fate, str], None],
    ) -> None:
        """Send in order; call `done` as each instance is dealt with.

        Raises
        ------
        DependencyDown
            The peer failed; what is not done is tried again later.
        """
        ...


class Trail(Protocol):
    """The audit trail."""

    def record_now(self, event: AuditEvent) -> None:
        """Record something; it is durable when this returns."""
        ...


@dataclass(slots=True)
class _Progress:
    """What one attempt did; `reason`: the first of what is tried again, `refusal`:
    of what is not.
    """

    counts: dict[Fate, int] = field(default_factory=lambda: dict.fromkeys(Fate, 0))
    dealt_with: list[int] = field(default_factory=list)
    noted_at: float = field(default_factory=time.monotonic)
    reason: str = ""
    refusal: str = ""


class ForwardingService:
    """Forward settled studies.

    Parameters
    ----------
    reader : PackReader
        Reads the headers of records, for the loop guard.
    trail : Trail, optional
        Where each attempt is recorded: before anything leaves, and how it ended.
    """

    def __init__(
        self,
        *,
        database: Database,
        retrieve: RetrieveService,
        reader: PackReader,
        peers: ForwardPeers,
        sender: Sender,
        clock: Clock,
        trail: Trail | None = None,
    ) -> None:
        self._trail = trail
        self._database = database
        self._retrieve = retrieve
        self._reader = reader
        self._peers = peers
        self._sender = sender
        self._clock = clock

    def follower(self, enqueue: Enqueue) -> Callable[[Event], None]:
        """Return the handler of `KINDS`; it asks for one job per peer."""

        def handle(event: Event) -> None:
            for peer in self._peers.list():
                if not peer.forward or peer.tenant not in {"", event.tenant}:
                    continue
                study, version = event.payload["study"], event.payload["version"]
                enqueue(
                    JOB,
                    f"{event.tenant}:{study}:{version}:{peer.title}",
                    {
                        "tenant": event.tenant,
                        "study": study,
                        "version": version,
                        "peer": peer.title,
                    },
                )

        return handle

    def work(self, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do one job: idempotent, and quick when there is nothing left to send.

        Raises
        ------
        DependencyDown
            The peer is not there, or is short of something, or what is to leave
            cannot be recorded: try again later.
        """
        peer = self._peers.find(payload["peer"])
        if peer is None or not peer.forward:
            return {"skipped": "the peer is no longer forwarded to"}
        actor = Actor(
            TenantId(payload["tenant"]), "forwarding", roles=frozenset({Role.SYSTEM})
        )
        try:
            held = self._retrieve.instances(actor, payload["study"])
        except NotFound:
            return {"skipped": "the study is gone"}
        version = int(payload["version"])
        with self._database.read() as connection:
            study_pk = _study_pk(connection, actor.tenant, payload["study"])
            wanted = _unsent(connection, peer.title, study_pk, version)
        chosen = [one for one in held if one.pk in wanted]
        fresh = [one for one in chosen if not self._came_from(one, peer.title)]
        progress = _Progress()
        with self._recorded(actor, payload["study"], peer, len(fresh), progress):
            self._send(peer, study_pk, fresh, progress)
        counts = progress.counts
        if counts[Fate.RETRY]:
            raise DependencyDown(
                f"{peer.title} could not take {counts[Fate.RETRY]} of {len(fresh)}"
                f" instances yet: {progress.reason}"
            )
        self._finish(peer.title, study_pk, version)
        return {
            "sent": counts[Fate.STORED] + counts[Fate.NOTED],
            "noted": counts[Fate.NOTED],
            "refused": counts[Fate.REFUSED],
            "kept_back": len(chosen) - len(fresh),
        }

    def _send(
        self,
        peer: KnownPeer,
        study_pk: int,
        instances: Sequence[StoredInstance],
        progress: _Progress,
    ) -> None:
        def done(instance: StoredInstance, fate: Fate, reason: str) -> None:
            progress.counts[fate] += 1
            if fate is Fate.RETRY:
                progress.reason = progress.reason or reason
                return
            progress.dealt_with.append(instance.pk)
            if fate is Fate.REFUSED:
                progress.refusal = progress.refusal or reason
            if fate is Fate.REFUSED and progress.counts[fate] <= MAX_LOGGED:
                log.warning(
                    "forwarded instance refused: %s",
                    reason,
                    extra={
                        "event": "forward.refused",
                        "peer": peer.title,
                        "instance": instance.sop_instance_uid,
                    },
                )
            if time.monotonic() - progress.noted_at > NOTE_SECONDS:
                self._note(peer.title, study_pk, progress)

        if not instances:
            return
        try:
            self._sender.send(peer, instances, done)
        finally:
            self._note(peer.title, study_pk, progress)

    @contextmanager
    def _recorded(
        self,
        actor: Actor,
        study_uid: str,
        peer: KnownPeer,
        n_instances: int,
        progress: _Progress,
    ) -> Iterator[None]:
        """Record what is about to leave, and after the attempt what has left."""
        if self._trail is None or not n_instances:
            yield
            return
        where = {"destination": peer.title, "address": f"{peer.host}:{peer.port}"}
        begun = AuditEvent(
            action="forward",
            actor=actor.name,
            tenant=actor.tenant,
            roles=sorted(actor.roles),
            door="worker",
            object_kind="study",
            study_uid=study_uid,
            purpose=Purpose.OPERATION.value,
            detail={**where, "instances": n_instances},
        )
        self._trail.record_now(begun)
        failure = "interrupted"
        try:
            yield
            failure = progress.reason or progress.refusal
        except ImagingError as error:
            failure = str(error)
            raise
        finally:
            counts = progress.counts
            sent = counts[Fate.STORED] + counts[Fate.NOTED]
            refused = counts[Fate.REFUSED]
            ended = replace(
                begun,
                action="forward.end",
                outcome=Outcome.ERROR if failure else Outcome.ALLOW,
                reason=failure,
                detail={
                    **where,
                    "sent": sent,
                    "refused": refused,
                    "left": n_instances - sent - refused,
                },
            )
            self._trail.record_now(ended)

    def _came_from(self, instance: StoredInstance, title: str) -> bool:
        """Tell whether the peer itself sent us the object."""
        length = instance.object_offset - instance.record_offset
        try:
            raw = self._reader.read(instance.pack_key, instance.record_offset, length)
        except PackGone:
            # Moved meanwhile: sending a duplicate is harmless, losing one is not.
            return False
        header = decode_header(raw[:PREFIX_LENGTH], raw[PREFIX_LENGTH:])
        return header is not None and header.calling_ae.strip() == title

    def _note(self, title: str, study_pk: int, progress: _Progress) -> None:
        """Remember what was dealt with; need not reach the disk at once, since
        sending it again is cheap.
        """
        if not progress.dealt_with:
            return
        with self._database.ingest() as connection:
            row = _row(connection, title, study_pk)
            sent = [*orjson.loads(row.sent), *progress.dealt_with] if row else []
            values = {
                "sent": orjson.dumps(sent or progress.dealt_with).decode(),
                "updated_us": self._clock.now_us(),
            }
            self._upsert(connection, title, study_pk, values)
        progress.dealt_with.clear()
        progress.noted_at = time.monotonic()

    def _finish(self, title: str, study_pk: int, version: int) -> None:
        """Everything up to `version` is dealt with: its instances need no list."""
        with self._database.write() as connection:
            row = _row(connection, title, study_pk)
            if row is not None and row.version >= version:
                return
            values = {
                "version": version,
                "sent": "[]",
                "updated_us": self._clock.now_us(),
            }
            self._upsert(connection, title, study_pk, values)

    def _upsert(
        self,
        connection: Connection,
        title: str,
        study_pk: int,
        values: Mapping[str, Any],
    ) -> None:
        done = connection.execute(
            update(Forwarding)
            .where(Forwarding.peer == title, Forwarding.study_pk == study_pk)
            .values(**values)
        )
        if done.rowcount:
            return
        module = sqlite if self._database.is_sqlite else postgresql
        statement = module.insert(Forwarding).values(
            peer=title, study_pk=study_pk, **{"version": 0, "sent": "[]", **values}
        )
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["peer", "study_pk"], set_=dict(values)
            )
        )


def _study_pk(connection: Connection, tenant: str, study_uid: str) -> int:
    return int(
        connection.execute(
            select(Study.id).where(
                Study.tenant == tenant, Study.study_instance_uid == study_uid
            )
        ).scalar_one()
    )


def _row(connection: Connection, title: str, study_pk: int) -> Any:
    return connection.execute(
        select(Forwarding.version, Forwarding.sent).where(
            Forwarding.peer == title, Forwarding.study_pk == study_pk
        )
    ).first()


def _unsent(
    connection: Connection, title: str, study_pk: int, version: int
) -> frozenset[int]:
    """Return the instances settled up to `version` that were not dealt with."""
    row = _row(connection, title, study_pk)
    floor = row.version if row is not None else 0
    found = connection.scalars(
        select(Instance.id)
        .join(Series, Series.id == Instance.series_pk)
        .where(
            Series.study_pk == study_pk,
            Instance.settled_version > floor,
            Instance.settled_version <= version,
        )
    )
    sent = orjson.loads(row.sent) if row is not None else ()
    return frozenset(found).difference(sent)
