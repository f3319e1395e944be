"""Audit records of identity: who, from where, did what to which account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from storage.audit import AuditEvent, Outcome
from storage.audit.event import Detail
from storage.kernel.types import Actor


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from.

    Attributes
    ----------
    source : str
        Network address of the client.
    door : str
        ``web``, ``dimse``, ``cli``.
    """

    source: str = ""
    door: str = "web"
    request_id: str = ""


class Trail(Protocol):
    """The audit trail, as far as identity needs it."""

    def record_now(self, event: AuditEvent) -> None:
        """Record a decision or a change; it is durable when this returns."""
        ...


class Recorder:
    """Write what happens to accounts, logins, tokens and tickets."""

    def __init__(self, trail: Trail) -> None:
        self._trail = trail

    def record(
        self,
        actor: Actor,
        action: str,
        origin: Origin,
        *,
        object_kind: str = "",
        object_id: str = "",
        object_tenant: str = "",
        study_uid: str = "",
        patient_id: str = "",
        purpose: str = "",
        detail: Detail | None = None,
    ) -> None:
        """Record what was done.

        Raises
        ------
        DependencyDown
            It could not be recorded.
        """
        self._trail.record_now(
            AuditEvent(
                action=action,
                actor=actor.name,
                tenant=actor.tenant,
                roles=sorted(actor.roles),
                session=actor.session,
                source=origin.source,
                door=origin.door,
                object_kind=object_kind,
                object_id=object_id,
                object_tenant=object_tenant,
                study_uid=study_uid,
                patient_id=patient_id,
                purpose=purpose,
                request_id=origin.request_id,
                detail=detail,
            )
        )

    def refuse(
        self,
        name: str,
        action: str,
        origin: Origin,
        reason: str,
        *,
        object_kind: str = "",
        object_id: str = "",
    ) -> None:
        """Record an attempt of somebody who could not prove who he is."""
        self._trail.record_now(
            AuditEvent(
                action=action,
                actor=name,
                outcome=Outcome.DENY,
                source=origin.source,
                door=origin.door,
                reason=reason,
                object_kind=object_kind,
                object_id=object_id,
                request_id=origin.request_id,
            )
        )
