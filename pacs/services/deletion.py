"""Deleting stored objects: out of sight at once, out of every pack by a deadline.

A deletion is row state and a tombstone record; recovery and a rebuild honour both.
Order: the rows go inside a transaction, the tombstones are appended and synced, the
transaction commits with full sync. A crash

* before the tombstones are synced changes nothing;
* between the two leaves tombstones beside rows: the delete was never answered, and
  recovery completes it when it meets them;
* after the commit leaves everything in place.

A tombstone names tenant, SOP Instance UID, digest and time: it buries every record of
that content that was received until then. Ingest sees to it that the same object
stored again counts as received later, whatever the clock does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sqlalchemy import Connection

from pacs.repository import lifecycle
from pacs.repository.lifecycle import Doomed, Target
from pacs.repository.packs import register_pack
from pacs.services.policy import AccessPolicy, Action
from storage import outbox
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import InvalidParameter, LostRace, NotAllowed, NotFound
from storage.kernel.types import Actor, Door
from storage.packs.format import Kind, Record, RecordHeader
from storage.packs.writer import PackWriter

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
#: Tombstones of one append.
TOMBSTONES = 1000
#: UIDs that one event names; the rest is in the table of deletions.
MAX_LISTED = 500
MAX_REASON = 200


class DeletionService:
    """Delete studies, series and instances of the actor's own tenant.

    Parameters
    ----------
    database : Database
    packs : PackWriter
        This process' own; takes the tombstones.
    policy : AccessPolicy
    clock : Clock
    node_id : str
    settle_seconds : float
        After which what remains of a study settles again.
    rewrite_seconds : float
        By when the bytes must be gone from every pack.
    permanent : bool
        False refuses every deletion (`pacs.permanent_delete`).
    """

    def __init__(
        self,
        *,
        database: Database,
        packs: PackWriter,
        policy: AccessPolicy,
        clock: Clock,
        node_id: str,
        settle_seconds: float,
        rewrite_seconds: float,
        permanent: bool = True,
    ) -> None:
        self._database = database
        self._packs = packs
        self._policy = policy
        self._clock = clock
        self._node_id = node_id
        self._settle_us = int(settle_seconds * 1e6)
        self._rewrite_us = int(rewrite_seconds * 1e6)
        self._permanent = permanent

    def delete(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str | None = None,
        instance_uid: str | None = None,
        *,
        reason: str = "",
    ) -> int:
        """Delete what the UIDs name together; return how many instances went.

        They go in one transaction: a reader sees all of them or none.

        Raises
        ------
        NotAllowed
        NotFound
            Nothing of that name in the actor's tenant.
        StorageFull, DependencyDown
            Nothing was deleted.
        """
        self._policy.require(actor, Action.DELETE)
        if not self._permanent:
            raise NotAllowed("deleting is switched off (pacs.permanent_delete)")
        if len(reason) > MAX_REASON:
            raise InvalidParameter("reason", f"more than {MAX_REASON} characters")
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                with self._database.write() as connection:
                    target = lifecycle.lock_target(
                        connection, actor.tenant, study_uid, series_uid, instance_uid
                    )
                    gone = (
                        [] if target is None else lifecycle.doomed(connection, target)
                    )
                    if target is None or not gone:
                        raise NotFound("no such study, series or instance")
                    self._delete(
                        connection, actor, target, gone, series_uid, reason=reason
                    )
            except LostRace:
                if attempt == MAX_ATTEMPTS:
                    raise
            else:
                break
        log.info(
            "deleted",
            extra={
                "event": "deleted",
                "tenant": actor.tenant,
                "actor": actor.name,
                "study": study_uid,
                "instances": len(gone),
            },
        )
        return len(gone)

    def _delete(
        self,
        connection: Connection,
        actor: Actor,
        target: Target,
        gone: Sequence[Doomed],
        series_uid: str | None,
        *,
        reason: str,
    ) -> None:
        # A clock that was set back must not put the end before the beginning.
        now_us = max(self._clock.now_us(), *(one.received_us for one in gone))
        study = target.study
        version = lifecycle.next_version(connection, study)
        lifecycle.record_deletions(
            connection,
            target,
            actor=actor.name,
            reason=reason,
            deleted_us=now_us,
            deadline_us=now_us + self._rewrite_us,
        )
        remaining = lifecycle.remove(
            connection,
            target,
            now_us=now_us,
            settle_due_us=now_us + self._settle_us,
        )
        event = {
            "study": study.uid,
            "instances": [one.sop_instance_uid for one in gone[:MAX_LISTED]],
            "instances_count": len(gone),
            "remaining": remaining,
            "actor": actor.name,
        }
        if not remaining:
            # No settle can follow: this event is the study's last version.
            lifecycle.report_removed(connection, study, version)
            kind, subject = "study.deleted", study.uid
            event["version"] = version
        elif target.instance_uid is not None:
            kind, subject = "instance.deleted", target.instance_uid
            event["series"] = series_uid
        else:
            kind, subject = "series.deleted", str(series_uid)
        outbox.append(connection, study.tenant, kind, subject, event, now_us)
        self._bury(connection, study.tenant, gone, reason, now_us)

    def _bury(
        self,
        connection: Connection,
        tenant: str,
        gone: Sequence[Doomed],
        reason: str,
        deleted_us: int,
    ) -> None:
        """Append the tombstones and make them durable, whatever the policy."""
        for start in range(0, len(gone), TOMBSTONES):
            records = [
                Record(
                    _tombstone(tenant, one, reason, deleted_us),
                    (),
                    bytes(32),
                    Kind.TOMBSTONE,
                )
                for one in gone[start : start + TOMBSTONES]
            ]
            placed = self._packs.append(records)
            self._packs.sync()
            for key in {location.pack_key for location in placed}:
                register_pack(
                    connection,
                    key=key,
                    tenant=tenant,
                    kind="log",
                    node_id=self._node_id,
                    # It holds nothing that was deleted until then (`packs.holding`).
                    now_us=deleted_us + 1,
                )


def _tombstone(tenant: str, one: Doomed, reason: str, deleted_us: int) -> RecordHeader:
    return RecordHeader(
        tenant=tenant,
        door=Door.SYSTEM,
        received_us=deleted_us,
        transfer_syntax_uid=one.transfer_syntax_uid,
        sop_class_uid=one.sop_class_uid,
        sop_instance_uid=one.sop_instance_uid,
        dataset_offset=0,
        origin=reason or "deleted",
        digest=one.digest.hex(),
    )
