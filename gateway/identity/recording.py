"""Audit records of identity: who, from where, did what to which account."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy import Connection

from storage.audit import AuditEvent, Outcome
from storage.audit.event import Detail
from storage.db.engine import Database
from storage.kernel.errors import DependencyDown, ImagingError
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

    def record_in(
        self, connection: Connection, event: AuditEvent
    ) -> Callable[[], None]:
        """Record a change in the transaction that makes it, as its last statement.

        What is returned is to be called after the commit.
        """
        ...


@dataclass(slots=True)
class Transaction:
    """A transaction that changes something, and records it.

    Attributes
    ----------
    notes : list of callable
        What is left to do once it has committed.
    """

    connection: Connection
    notes: list[Callable[[], None]] = field(default_factory=list)


class Recorder:
    """Write what happens to accounts, logins, tokens and tickets."""

    def __init__(self, trail: Trail, database: Database) -> None:
        self._trail = trail
        self._database = database

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Yield a transaction of a change that `record` tells of at its end."""
        with self._database.write() as connection:
            made = Transaction(connection)
            yield made
        for note in made.notes:
            note()

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
        within: Transaction | None = None,
    ) -> None:
        """Record what was done.

        Parameters
        ----------
        within : Transaction, optional
            That of the change that is recorded: both happen, or neither. Nothing may
            follow in it.

        Raises
        ------
        DependencyDown
            It could not be recorded.
        """
        event = AuditEvent(
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
        if within is None:
            self._trail.record_now(event)
            return
        try:
            within.notes.append(self._trail.record_in(within.connection, event))
        except DependencyDown:
            raise
        except ImagingError as error:
            raise DependencyDown(f"audit: {error}") from error

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
