"""When a study is complete: `study.settled`, once for each state it comes to rest in.

An arrival or a deletion gives its study a time at which it settles unless something
else happens before. The event names what came and what went since the last one. It is
written in the transaction that gives the study its version, after every instance it
adds carries that version; a settle that is interrupted goes on where it stopped, under
the same version.
"""

from __future__ import annotations

import logging

from sqlalchemy import Connection

from pacs.repository import lifecycle
from pacs.repository.lifecycle import LockedStudy
from pacs.services.policy import AccessPolicy, Action
from storage import outbox
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import LostRace, NotFound
from storage.kernel.types import Actor

log = logging.getLogger(__name__)

#: Studies one tick settles.
BATCH = 50
#: Instances one transaction marks.
MARKED = 2000
#: Transactions of one settle; bounds a study that grows faster than it is marked.
MAX_ROUNDS = 1000
#: UIDs that one event names; the rest is read with `added` and `removed`.
MAX_LISTED = 500

SETTLED = "study.settled"


class Settling:
    """Settle studies, by time or on request.

    Parameters
    ----------
    database : Database
    policy : AccessPolicy
    clock : Clock
    """

    def __init__(
        self, *, database: Database, policy: AccessPolicy, clock: Clock
    ) -> None:
        self._database = database
        self._policy = policy
        self._clock = clock

    def tick(self) -> int:
        """Settle studies that are due, up to one batch; return how many did."""
        now_us = self._clock.now_us()
        with self._database.read() as connection:
            due = lifecycle.due_studies(connection, now_us, BATCH)
        done = 0
        for study_pk in due:
            try:
                done += self._settle(study_pk, due_by_us=now_us) is not None
            except LostRace:
                # Still due: it is tried again next time.
                log.debug("settling lost a race", extra={"event": "settle.race"})
        return done

    def settle(self, actor: Actor, study_uid: str) -> int:
        """Settle a study of the actor's tenant now; return its version.

        Without news the version stays and no event is written.

        Raises
        ------
        NotAllowed, NotFound
        """
        self._policy.require(actor, Action.SETTLE)
        with self._database.read() as connection:
            study_pk = lifecycle.find_study(connection, actor.tenant, study_uid)
        version = None if study_pk is None else self._settle(study_pk, due_by_us=None)
        if version is None:
            raise NotFound("no such study")
        return version

    def added(
        self,
        actor: Actor,
        study_uid: str,
        version: int,
        *,
        after: str = "",
        limit: int = 1000,
    ) -> list[str]:
        """Return instances that `version` added and that are still here.

        In order of their UIDs: pass the last one as `after` to go on.
        """
        with self._database.read() as connection:
            study_pk = lifecycle.find_study(connection, actor.tenant, study_uid)
            if study_pk is None:
                raise NotFound("no such study")
            return lifecycle.added(connection, study_pk, version, limit, after=after)

    def removed(
        self,
        actor: Actor,
        study_uid: str,
        version: int,
        *,
        after: str = "",
        limit: int = 1000,
    ) -> list[str]:
        """Return instances that `version` removed, in order of their UIDs."""
        with self._database.read() as connection:
            return lifecycle.removed(
                connection, actor.tenant, study_uid, version, limit, after=after
            )

    def _settle(self, study_pk: int, *, due_by_us: int | None) -> int | None:
        """Return the version reached; None when the study is gone or not due."""
        for _ in range(MAX_ROUNDS):
            with self._database.write() as connection:
                study = lifecycle.lock_study(connection, study_pk)
                if study is None or not _is_due(study, due_by_us):
                    return None
                version = lifecycle.next_version(connection, study)
                marked = lifecycle.mark_settled(connection, study_pk, version, MARKED)
                if not lifecycle.has_unsettled(connection, study_pk):
                    return self._report(connection, study, version)
            if not marked:
                raise LostRace("instances of the study are being replaced")
        raise LostRace("the study grows faster than it settles")

    def _report(self, connection: Connection, study: LockedStudy, version: int) -> int:
        """Write the event, unless there is nothing to tell."""
        if lifecycle.has_deletions(connection, study):
            # Receiving processes remember what they have listed (`IndexWriter`).
            lifecycle.relist(connection, study.pk)
        n_removed = lifecycle.report_removed(connection, study, version)
        n_added, n_own = lifecycle.count_added(connection, study.pk, version)
        if not n_added and not n_removed:
            lifecycle.settled(connection, study.pk, study.version)
            return study.version
        lifecycle.settled(connection, study.pk, version)
        payload = {
            "study": study.uid,
            "version": version,
            "added": lifecycle.added(connection, study.pk, version, MAX_LISTED),
            "added_count": n_added,
            "removed": lifecycle.removed(
                connection, study.tenant, study.uid, version, MAX_LISTED
            ),
            "removed_count": n_removed,
            "own": lifecycle.added(connection, study.pk, version, MAX_LISTED, own=True),
            "own_count": n_own,
            "origin": "own" if n_added and n_own == n_added else "external",
            "complete": max(n_added, n_removed) <= MAX_LISTED,
        }
        outbox.append(
            connection,
            study.tenant,
            SETTLED,
            study.uid,
            payload,
            self._clock.now_us(),
        )
        log.info(
            "study settled",
            extra={
                "event": SETTLED,
                "tenant": study.tenant,
                "study": study.uid,
                "version": version,
                "added": n_added,
                "removed": n_removed,
            },
        )
        return version


def _is_due(study: LockedStudy, due_by_us: int | None) -> bool:
    if due_by_us is None:
        return True
    return study.settle_due_us is not None and study.settle_due_us <= due_by_us
