"""The study list of the page, found by the archive's query service."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from pacs.services.query import QueryService, StudyFilter
from storage.kernel.types import Actor
from viewer.activity import Totals
from viewer.app import StudyLine, StudyPage, StudySearch

_FIELDS = tuple(StudyLine.__dataclass_fields__)
_values = attrgetter(*_FIELDS)


@dataclass(frozen=True, slots=True)
class ArchiveDirectory:
    """Lists and counts studies for the page."""

    query: QueryService

    def list_studies(
        self, actor: Actor, wanted: StudySearch, *, cursor: str, limit: int
    ) -> StudyPage:
        """Return the page behind `cursor`."""
        found = self.query.list_studies(
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
        lines = tuple(StudyLine(*_values(study)) for study in found.studies)
        return StudyPage(lines, found.cursor)

    def totals(self, actor: Actor) -> Totals:
        """Count what the actor may see."""
        found = self.query.totals(actor)
        return Totals(found.studies, found.series, found.instances, found.size_bytes)
