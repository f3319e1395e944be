"""What associations do, as audit records: each access, folded by study and peer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from pacs.domain.matching import LEVELS, UNIQUE_KEYS, has_wildcard
from pacs.domain.study import Level, StoredInstance
from pacs.services.permissions import Action
from pacs.services.policy import purposes
from storage.audit import AuditEvent, Outcome
from storage.audit.event import Detail
from storage.kernel.errors import ImagingError, NotAllowed
from storage.kernel.types import Actor

log = logging.getLogger(__name__)

_PATIENT, _STUDY, _SERIES, _IMAGE = (UNIQUE_KEYS[level] for level in LEVELS)
#: Studies of one request that have a record each; the rest is one more.
MAX_STUDIES = 500
#: Characters of a query that are kept.
MAX_QUERY = 1024
#: Refused requests of one association that are recorded; a hostile peer does not fill
#: the audit.
MAX_REFUSED: Final = 100
_NOTHING: Final[Mapping[str, str]] = {}


class Trail(Protocol):
    """The audit trail."""

    def record(self, event: AuditEvent) -> None:
        """Record an access, with others; refuse it where that cannot be."""
        ...

    def record_now(self, event: AuditEvent) -> None:
        """Record a decision; it is durable when this returns."""
        ...


class NoTrail:
    """Records nothing: for servers without a database of accesses."""

    def record(self, event: AuditEvent) -> None:
        pass

    def record_now(self, event: AuditEvent) -> None:
        pass


class Accesses:
    """Records what one association does; in the thread that serves it.

    Parameters
    ----------
    trail : Trail
    actor : Actor
    peer : str
        Network address.
    """

    def __init__(self, trail: Trail, actor: Actor, peer: str) -> None:
        self._trail = trail
        self._actor = actor
        self._peer = peer
        self._n_refused = 0

    def stored(self, study_uid: str) -> None:
        """Record that an instance of a study was stored.

        Raises
        ------
        DependencyDown
            It cannot be recorded, so it must not be acknowledged.
        """
        self._trail.record(self._event(Action.STORE, "study", study_uid=study_uid))

    def searched(self, level: Level, keys: Mapping[int, str]) -> None:
        """Record a search (DependencyDown as `stored`)."""
        asked = "&".join(
            f"{tag:08X}={value}" for tag, value in sorted(keys.items()) if value
        )
        self._trail.record(
            self._event(
                Action.FIND,
                "query",
                detail={"level": level.value, "query": asked[:MAX_QUERY]},
                names=_named({tag: (value,) for tag, value in keys.items()}),
            )
        )

    def retrieved(
        self,
        action: Action,
        keys: Mapping[int, Sequence[str]],
        found: Sequence[StoredInstance],
        destination: str = "",
    ) -> None:
        """Record what is about to leave, or that nothing of that name is there.

        Raises
        ------
        DependencyDown
        """
        more: dict[str, str | int] = {"destination": destination} if destination else {}
        if not found:
            event = self._event(
                action,
                "query",
                outcome=Outcome.DENY,
                reason="nothing found",
                detail=dict(more) or None,
                names=_named(keys),
            )
            self._refuse(event)
            return
        counts = Counter((one.tenant, one.study_instance_uid) for one in found)
        for (tenant, study_uid), n_instances in counts.most_common(MAX_STUDIES):
            own = tenant == self._actor.tenant
            self._trail.record(
                self._event(
                    action,
                    "study",
                    object_tenant="" if own else tenant,
                    study_uid=study_uid,
                    detail={**more, "instances": n_instances},
                )
            )
        if len(counts) > MAX_STUDIES:
            rest = {**more, "studies": len(counts) - MAX_STUDIES}
            self._trail.record(self._event(action, "query", detail=rest))

    def committed(self, transaction_uid: str, n_references: int) -> None:
        """Record a request for storage commitment (DependencyDown as `stored`)."""
        self._trail.record(
            self._event(
                Action.COMMIT,
                "transaction",
                object_id=transaction_uid,
                detail={"instances": n_references},
            )
        )

    def refused(self, action: Action, error: ImagingError) -> None:
        """Record a request that the policy denied; other errors are no decisions."""
        if isinstance(error, NotAllowed):
            self._refuse(
                self._event(action, "query", outcome=Outcome.DENY, reason=str(error))
            )

    def _refuse(self, event: AuditEvent) -> None:
        self._n_refused += 1
        if self._n_refused <= MAX_REFUSED:
            record_refusal(self._trail, event)

    def _event(
        self,
        action: Action,
        object_kind: str,
        *,
        outcome: Outcome = Outcome.ALLOW,
        reason: str = "",
        object_tenant: str = "",
        object_id: str = "",
        study_uid: str = "",
        names: Mapping[str, str] = _NOTHING,
        detail: Detail | None = None,
    ) -> AuditEvent:
        actor = self._actor
        usual = purposes(actor.roles, action)
        return AuditEvent(
            action=action.value,
            actor=actor.name,
            outcome=outcome,
            tenant=actor.tenant,
            roles=sorted(actor.roles),
            source=self._peer,
            door="dimse",
            reason=reason,
            object_kind=object_kind,
            object_tenant=object_tenant,
            object_id=object_id,
            patient_id=names.get("patient_id", ""),
            study_uid=study_uid or names.get("study_uid", ""),
            series_uid=names.get("series_uid", ""),
            instance_uid=names.get("instance_uid", ""),
            purpose=usual[0].value if usual else "",
            detail=detail,
        )


def record_refusal(trail: Trail, event: AuditEvent) -> None:
    """Record what was refused; nothing happens, so it stays so without a record."""
    try:
        trail.record_now(event)
    except ImagingError as error:
        log.warning(
            "refusal not audited: %s",
            error,
            extra={"event": "audit.failed", "peer": event.source},
        )


def rejected(trail: Trail, calling_ae: str, peer: str, reason: str) -> None:
    """Record an association of somebody who is not known here."""
    record_refusal(
        trail,
        AuditEvent(
            action="associate",
            actor=calling_ae,
            outcome=Outcome.DENY,
            source=peer,
            door="dimse",
            reason=reason,
        ),
    )


def _named(keys: Mapping[int, Sequence[str]]) -> dict[str, str]:
    """Return what single values of unique keys name."""
    found = {}
    for tag, name in (
        (_PATIENT, "patient_id"),
        (_STUDY, "study_uid"),
        (_SERIES, "series_uid"),
        (_IMAGE, "instance_uid"),
    ):
        values = keys.get(tag, ())
        if len(values) == 1 and values[0] and not has_wildcard(values[0]):
            found[name] = values[0].strip(" \0")
    return found
