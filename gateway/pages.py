"""What the first page asks of the archive, answered by its services."""

from __future__ import annotations

from dataclasses import fields

from sqlalchemy import func, select

from pacs.repository import visible
from pacs.repository.tables import Study
from pacs.services.query import QueryService, StudyFilter
from storage.db.engine import Database
from storage.kernel.types import Actor
from viewer.activity import Totals
from viewer.app import StudyLine, StudyPage, StudySearch

_FIELDS = tuple(field.name for field in fields(StudyLine))


class StudyDirectory:
    """The query service as `viewer.app.StudyDirectory`."""

    def __init__(self, query: QueryService) -> None:
        self._query = query

    def list_studies(
        self, actor: Actor, wanted: StudySearch, *, cursor: str, limit: int
    ) -> StudyPage:
        """Return the page behind `cursor`."""
        found = self._query.list_studies(
            actor,
            StudyFilter(
                text=wanted.text,
                name=wanted.name,
                patient_id=wanted.patient_id,
                accession=wanted.accession,
                date_from=wanted.date_from,
                date_to=wanted.date_to,
                modality="\\".join(wanted.modalities),
            ),
            cursor=cursor,
            limit=limit,
        )
        lines = tuple(
            StudyLine(**{name: getattr(one, name) for name in _FIELDS})
            for one in found.studies
        )
        return StudyPage(lines, found.cursor)


def sums(database: Database, actor: Actor) -> Totals:
    """Add up all studies of the actor's tenants."""
    with database.read() as connection:
        row = connection.execute(
            select(
                func.count(),
                func.coalesce(func.sum(Study.n_series), 0),
                func.coalesce(func.sum(Study.n_instances), 0),
                func.coalesce(func.sum(Study.size_bytes), 0),
            ).where(visible.studies(actor))
        ).one()
    return Totals(*map(int, row))
