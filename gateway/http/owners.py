"""To whom belongs what a request was answered with, for the record of it.

A reader of several institutions names no institution when it asks for a study; the
auditor of the one that owns it has to find the access nevertheless. Some routes name
a series or an instance only: the record names the study too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import literal, select

from pacs.repository import visible
from pacs.repository.tables import Instance, Series, Study
from storage.audit import AuditEvent
from storage.db.engine import Database
from storage.kernel.types import Actor

#: Places of one object that have a record each: the same UID in several tenants.
MAX_PLACES: Final = 50


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is."""

    tenant: str
    study_uid: str
    series_uid: str


class Owners:
    """Look up where objects are, as far as an actor may know.

    Parameters
    ----------
    database : Database
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def places(self, actor: Actor, names: Mapping[str, str]) -> list[Place]:
        """Return where an object is.

        Parameters
        ----------
        names : mapping
            UIDs of the ``study``, ``series`` and ``instance``, as far as they are
            known; at least one.
        """
        study, series = names.get("study"), names.get("series")
        if study is not None and series is None:
            query = select(Study.tenant, Study.study_instance_uid, literal(""))
        else:
            query = select(
                Study.tenant, Study.study_instance_uid, Series.series_instance_uid
            ).join(Series, Series.study_pk == Study.id)
            if series is not None:
                query = query.where(
                    Series.tenant.in_(actor.tenants),
                    Series.series_instance_uid == series,
                )
            else:
                query = query.join(Instance, Instance.series_pk == Series.id).where(
                    Instance.tenant.in_(actor.tenants),
                    Instance.sop_instance_uid == names["instance"],
                )
        query = query.where(Study.tenant.in_(actor.tenants))
        if study is not None:
            query = query.where(Study.study_instance_uid == study)
        if actor.scope is not None:
            query = query.where(visible.studies(actor))
        with self._database.read() as connection:
            rows = connection.execute(query.distinct().limit(MAX_PLACES))
            return [Place(*row) for row in rows]

    def complete(
        self, event: AuditEvent, actor: Actor, names: Mapping[str, str]
    ) -> list[AuditEvent]:
        """Return the records of an access that was answered: one for each tenant.

        A search reaches every tenant that the actor may read.
        """
        if not names.keys() & {"study", "series", "instance"}:
            foreign = sorted({*actor.readable} - {actor.tenant})
            return [event, *(replace(event, object_tenant=one) for one in foreign)]
        found = [
            replace(
                event,
                object_tenant="" if one.tenant == actor.tenant else one.tenant,
                study_uid=one.study_uid,
                series_uid=one.series_uid or event.series_uid,
            )
            for one in self.places(actor, names)
        ]
        # Nothing: it was deleted meanwhile, or is an empty answer.
        return found or [event]
