"""The study list of the web page: what it is narrowed to, and its lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection

from pacs.domain.matching import (
    BY_TAG,
    MAX_WORDS,
    Condition,
    NameLike,
    Wildcard,
    parse_key,
    words,
)
from pacs.domain.study import Level
from pacs.repository.search import Row, Selection, page
from pacs.services import cursors
from storage.kernel.errors import InvalidParameter
from storage.kernel.limits import Limits
from storage.kernel.types import Actor


@dataclass(frozen=True, slots=True)
class StudyFilter:
    """What the study list is narrowed to; empty fields do not restrict.

    `text` is searched in names (all groups, pinyin), Patient IDs and Accession
    Numbers: each of its words must begin one.
    """

    text: str = ""
    name: str = ""
    patient_id: str = ""
    accession: str = ""
    date_from: str = ""
    date_to: str = ""
    modality: str = ""


@dataclass(frozen=True, slots=True)
class StudySummary:
    """One line of the study list."""

    tenant: str
    study_instance_uid: str
    patient_name: str
    patient_id: str
    birth_date: str | None
    sex: str
    study_date: str | None
    study_time: str | None
    accession_number: str
    study_description: str
    modalities: tuple[str, ...]
    n_series: int
    n_instances: int
    size_bytes: int
    updated_us: int


@dataclass(frozen=True, slots=True)
class StudyList:
    """A page of the study list; `cursor` is empty on the last one."""

    studies: tuple[StudySummary, ...]
    cursor: str


_SUMMARY_FIELDS = (
    "study.tenant",
    "study.study_instance_uid",
    "study.patient_name",
    "study.patient_id",
    "study.birth_date",
    "study.sex",
    "study.study_date",
    "study.study_time",
    "study.accession_number",
    "study.study_description",
    "study.modalities",
    "study.n_series",
    "study.n_instances",
    "study.size_bytes",
    "study.updated_us",
)


def list_studies(
    connection: Connection,
    actor: Actor,
    wanted: StudyFilter,
    limits: Limits,
    *,
    cursor: str = "",
    limit: int = 50,
) -> StudyList:
    """Return a page of the study list, newest first."""
    selection = Selection(
        Level.STUDY,
        tuple(_filter_conditions(wanted, limits)),
        _SUMMARY_FIELDS,
        free_words=_words_of("text", wanted.text),
    )
    limit = max(1, min(limit, limits.query_limit))
    after = cursors.decode(cursor, selection) if cursor else None
    found = page(connection, actor, selection, limit=limit + 1, after=after)
    more = len(found.rows) > limit
    last = found.place(limit - 1) if more else None
    return StudyList(
        tuple(_summary(row) for row in found.rows[:limit]),
        cursors.encode(last, selection) if last is not None else "",
    )


def _words_of(name: str, text: str) -> tuple[str, ...]:
    found = words(text)
    if len(found) > MAX_WORDS or len(text) > 1024:
        raise InvalidParameter(name, f"more than {MAX_WORDS} words")
    return found


def _filter_conditions(wanted: StudyFilter, limits: Limits) -> Iterator[Condition]:
    """Yield what the fields of the study list's search demand."""
    name = _words_of("name", wanted.name)
    if name:
        yield Condition(BY_TAG[0x00100010], NameLike(name))
    for tag, value in ((0x00100020, wanted.patient_id), (0x00080050, wanted.accession)):
        begins = value.replace("*", "").replace("?", "").strip(" \0")
        # Order matters: parsing bounds it and refuses what no text may hold.
        if begins and parse_key(BY_TAG[tag], begins, limits) is not None:
            yield Condition(BY_TAG[tag], Wildcard(f"{begins}*", begins))
    if wanted.date_from or wanted.date_to:
        span = "-".join(
            day.strip().replace("-", "") for day in (wanted.date_from, wanted.date_to)
        )
        rule = parse_key(BY_TAG[0x00080020], span, limits)
        if rule is not None:
            yield Condition(BY_TAG[0x00080020], rule)
    listed = parse_key(BY_TAG[0x00080061], wanted.modality, limits)
    if listed is not None:
        yield Condition(BY_TAG[0x00080061], listed)


def _summary(row: Row) -> StudySummary:
    named = dict(
        zip((name.partition(".")[2] for name in _SUMMARY_FIELDS), row, strict=True)
    )
    named["modalities"] = tuple(filter(None, named["modalities"].split("\\")))
    return StudySummary(**named)
