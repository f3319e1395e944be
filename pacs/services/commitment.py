"""Storage commitment: promising to keep what we hold, after looking (PS3.4 Annex J).

A request is written in a fully synced transaction before it is answered. A durable job
checks each reference against stored bytes, not against the index alone, and delivers
the result until the requestor has taken it. The result stays and can be asked for.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import orjson
from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from pacs.domain.study import Level, StoredInstance
from pacs.repository.tables import CommitmentRequest
from pacs.services.retrieve import RetrieveService
from storage import outbox
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    Conflict,
    CorruptData,
    NotFound,
    TooLarge,
    Unavailable,
)
from storage.kernel.limits import MIB
from storage.kernel.types import Actor, Role, TenantId
from storage.outbox import Event

#: Name and kinds of the follower; name of the jobs.
FOLLOWER = "commitment"
REQUESTED = "commitment.requested"
KINDS = frozenset({REQUESTED})
JOB = "commitment"

MAX_REFERENCES = 100_000
#: References looked up in one go.
BATCH = 500
CHUNK = 1 * MIB
INSTANCE_UID = 0x00080018

Enqueue = Callable[[str, str, Mapping[str, Any]], bool]


class FailureReason(IntEnum):
    """Failure Reason (0008,1197) of a reference (PS3.3 C.14.1.1)."""

    PROCESSING_FAILURE = 0x0110
    NO_SUCH_INSTANCE = 0x0112
    CLASS_CONFLICT = 0x0119


class TransactionInUse(Conflict):
    """The peer has used this Transaction UID before."""

    code = "conflict.transaction_uid"


@dataclass(frozen=True, slots=True)
class Reference:
    """An instance whose safekeeping is asked for."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a transaction.

    Attributes
    ----------
    called_ae : str
        Our AE title that was asked.
    failed : tuple of (Reference, failure reason)
    delivered : bool
        The requestor has taken it.
    """

    tenant: str
    peer_ae: str
    called_ae: str
    transaction_uid: str
    committed: tuple[Reference, ...]
    failed: tuple[tuple[Reference, int], ...]
    delivered: bool = False


@dataclass(frozen=True, slots=True)
class Transaction:
    """Where a transaction stands; `report` is None until it is checked."""

    transaction_uid: str
    peer_ae: str
    n_references: int
    attempts: int
    report: Report | None


class Delivery(Protocol):
    """Tells a requestor its result."""

    def deliver(self, report: Report) -> None:
        """Return once the peer has taken it.

        Raises
        ------
        DependencyDown
            Try again later.
        """
        ...


class CommitmentService:
    """Take, check and report storage commitment transactions."""

    def __init__(
        self, *, database: Database, retrieve: RetrieveService, clock: Clock
    ) -> None:
        self._database = database
        self._retrieve = retrieve
        self._clock = clock

    def request(
        self,
        actor: Actor,
        *,
        peer_ae: str,
        called_ae: str,
        transaction_uid: str,
        references: Sequence[Reference],
    ) -> int:
        """Write a request down; return its key. It survives a power cut.

        Raises
        ------
        TransactionInUse, TooLarge
        """
        if len(references) > MAX_REFERENCES:
            raise TooLarge("references", MAX_REFERENCES)
        now_us = self._clock.now_us()
        listed = [(one.sop_class_uid, one.sop_instance_uid) for one in references]
        try:
            with self._database.write() as connection:
                pk = connection.execute(
                    insert(CommitmentRequest)
                    .values(
                        tenant=actor.tenant,
                        peer_ae=peer_ae,
                        called_ae=called_ae,
                        transaction_uid=transaction_uid,
                        request=orjson.dumps(listed).decode(),
                        created_us=now_us,
                    )
                    .returning(CommitmentRequest.id)
                ).scalar_one()
                outbox.append(
                    connection,
                    actor.tenant,
                    REQUESTED,
                    transaction_uid,
                    {"id": pk, "peer": peer_ae, "references": len(listed)},
                    now_us,
                )
        except IntegrityError as error:
            raise TransactionInUse("Transaction UID is in use") from error
        return int(pk)

    def follower(self, enqueue: Enqueue) -> Callable[[Event], None]:
        """Return the handler of `KINDS`; it asks for one job per request."""

        def handle(event: Event) -> None:
            pk = int(event.payload["id"])
            enqueue(JOB, str(pk), {"id": pk})

        return handle

    def worker(
        self, delivery: Delivery
    ) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Return the handler of the jobs: check, then deliver; idempotent."""

        def work(payload: Mapping[str, Any]) -> Mapping[str, Any] | None:
            pk = int(payload["id"])
            report = self.check(pk)
            if report is None:
                return None
            if not report.delivered:
                self._count_attempt(pk)
                delivery.deliver(report)
                self.delivered(pk)
            return {"committed": len(report.committed), "failed": len(report.failed)}

        return work

    def check(self, pk: int, *, within_seconds: float = math.inf) -> Report | None:
        """Return the result, found now or before; None when the request is gone.

        Raises
        ------
        Unavailable
            The index or the object store does not answer, or looking takes longer
            than `within_seconds`: nothing is known yet.
        """
        until = time.monotonic() + within_seconds
        with self._database.read() as connection:
            row = connection.execute(
                select(CommitmentRequest).where(CommitmentRequest.id == pk)
            ).first()
        if row is None:
            return None
        if row.result is not None:
            return _report(row, orjson.loads(row.result))
        references = [Reference(*pair) for pair in orjson.loads(row.request)]
        actor = Actor(TenantId(row.tenant), row.peer_ae, roles=frozenset({Role.SYSTEM}))
        failed = list(self._failures(actor, references, until))
        with self._database.write() as connection:
            connection.execute(
                update(CommitmentRequest)
                .where(CommitmentRequest.id == pk)
                .values(result=orjson.dumps(failed).decode(), state="checked")
            )
        return _report(row, failed)

    def _failures(
        self, actor: Actor, references: Sequence[Reference], until: float
    ) -> Iterator[tuple[int, int]]:
        """Yield place and reason of each reference that cannot be committed."""
        for start in range(0, len(references), BATCH):
            batch = references[start : start + BATCH]
            uids = [one.sop_instance_uid for one in batch if one.sop_instance_uid]
            found = {
                stored.sop_instance_uid: stored
                for stored in self._retrieve.select(
                    actor, Level.IMAGE, {INSTANCE_UID: uids}
                )
            }
            for place, one in enumerate(batch, start):
                reason = self._reason(one, found.get(one.sop_instance_uid), until)
                if reason is not None:
                    yield place, reason

    def _reason(
        self, reference: Reference, stored: StoredInstance | None, until: float
    ) -> FailureReason | None:
        if stored is None:
            return FailureReason.NO_SUCH_INSTANCE
        if stored.sop_class_uid != reference.sop_class_uid:
            return FailureReason.CLASS_CONFLICT
        try:
            intact = self._digest(stored, until) == stored.digest
        except NotFound:
            return FailureReason.NO_SUCH_INSTANCE
        except CorruptData:
            intact = False
        return None if intact else FailureReason.PROCESSING_FAILURE

    def _digest(self, stored: StoredInstance, until: float) -> bytes:
        """Return the digest of the data set as it lies in its pack now."""
        digest = hashlib.sha256()
        for offset in range(stored.dataset_offset, stored.object_length, CHUNK):
            if time.monotonic() > until:
                raise Unavailable("checking takes longer than allowed here")
            digest.update(self._retrieve.read_object(stored, offset, CHUNK))
        return digest.digest()

    def _count_attempt(self, pk: int) -> None:
        with self._database.write() as connection:
            connection.execute(
                update(CommitmentRequest)
                .where(CommitmentRequest.id == pk)
                .values(attempts=CommitmentRequest.attempts + 1)
            )

    def delivered(self, pk: int) -> None:
        """Note that the requestor has taken the result."""
        with self._database.write() as connection:
            connection.execute(
                update(CommitmentRequest)
                .where(CommitmentRequest.id == pk)
                .values(state="delivered", delivered_us=self._clock.now_us())
            )

    def find(self, actor: Actor, transaction_uid: str) -> list[Transaction]:
        """Return the transactions with this UID, one per peer at most."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(CommitmentRequest).where(
                    CommitmentRequest.tenant.in_(actor.tenants),
                    CommitmentRequest.transaction_uid == transaction_uid,
                )
            ).all()
        return [
            Transaction(
                row.transaction_uid,
                row.peer_ae,
                len(orjson.loads(row.request)),
                row.attempts,
                None if row.result is None else _report(row, orjson.loads(row.result)),
            )
            for row in rows
        ]

    def waiting(self) -> int:
        """Count the transactions whose result has not been taken."""
        with self._database.read() as connection:
            return int(
                connection.scalar(
                    select(func.count())
                    .select_from(CommitmentRequest)
                    .where(CommitmentRequest.delivered_us.is_(None))
                )
                or 0
            )

    def prune(self, before_us: int) -> int:
        """Forget transactions asked for before that time; return how many.

        Whatever became of them: a result that nobody took in all that time is no
        longer offered either.
        """
        with self._database.write() as connection:
            removed = connection.execute(
                delete(CommitmentRequest).where(
                    CommitmentRequest.created_us < before_us
                )
            )
        return removed.rowcount


def _report(row: Row[Any], failed: Sequence[Sequence[int]]) -> Report:
    references = [Reference(*pair) for pair in orjson.loads(row.request)]
    not_kept = {place for place, _ in failed}
    return Report(
        tenant=row.tenant,
        peer_ae=row.peer_ae,
        called_ae=row.called_ae,
        transaction_uid=row.transaction_uid,
        committed=tuple(
            one for place, one in enumerate(references) if place not in not_kept
        ),
        failed=tuple((references[place], reason) for place, reason in failed),
        delivered=row.delivered_us is not None,
    )
