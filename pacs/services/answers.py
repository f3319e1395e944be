"""Rows of a search as DICOM JSON, and which columns that takes (PS3.18 10.6.3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from pacs.domain.fragments import (
    InstanceTemplate,
    merged,
    series_object,
    study_object,
)
from pacs.domain.matching import BY_TAG, UNIQUE_KEYS, level_of
from pacs.domain.study import Level
from pacs.repository.search import Row

_TABLE = {
    Level.PATIENT: "study",
    Level.STUDY: "study",
    Level.SERIES: "series",
    Level.IMAGE: "instance",
}
#: Attributes that are no column of their level's table.
_COMPUTED_FIELDS = {
    0x00080201: "study.timezone_offset",
    0x00201200: "of_patient.n_studies",
    0x00201202: "of_patient.n_series",
    0x00201204: "of_patient.n_instances",
    0x00201206: "study.n_series",
    0x00201208: "study.n_instances",
    0x00201209: "series.n_instances",
}
_PATIENT_FIELDS = {
    0x00100010: "patient.patient_name",
    0x00100020: "patient.patient_id",
    0x00100021: "patient.shown_issuer",
    0x00100030: "patient.birth_date",
    0x00100040: "patient.sex",
    0x00201200: "patient.n_studies",
    0x00201202: "patient.n_series",
    0x00201204: "patient.n_instances",
}
AVAILABILITY = 0x00080056
_PATIENT_COUNTS = (0x00201200, 0x00201202, 0x00201204)
SOP_CLASSES_IN_STUDY = 0x00080062


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A QIDO-RS search (PS3.18 10.6).

    Attributes
    ----------
    keys : mapping of int to str
        Matching keys, lists joined by backslash.
    study_uid, series_uid : str or None
        The target resource's parents; None: all studies, all series.
    include : frozenset of int
        ``includefield``; below the level they are not returned.
    include_all : bool
        ``includefield=all``: everything the index knows (10.6.3.3).
    limit : int or None
        Rows wanted; never more than ``query_limit``.
    cursor : str
        `SearchPage.cursor` of the page before.
    order : str
        A key of `search.ORDERS` of the level.
    total : bool
        Count all matches, at most ``find_results``.
    base_url : str
        What Retrieve URLs begin with, before ``/dicom-web``.
    """

    keys: Mapping[int, str] = field(default_factory=dict)
    study_uid: str | None = None
    series_uid: str | None = None
    include: frozenset[int] = frozenset()
    include_all: bool = False
    fuzzy: bool = False
    limit: int | None = None
    offset: int = 0
    cursor: str = ""
    order: str = ""
    total: bool = False
    base_url: str = ""


def field_of(level: Level, tag: int) -> str:
    """Return the search field of an attribute."""
    if level is Level.PATIENT:
        return _PATIENT_FIELDS[tag]
    computed = _COMPUTED_FIELDS.get(tag)
    if computed is not None:
        return computed
    attribute = BY_TAG[tag]
    return f"{_TABLE[attribute.level]}.{attribute.column}"


class Answer(Protocol):
    """How rows of one level become JSON."""

    @property
    def fields(self) -> tuple[str, ...]: ...

    def render(self, rows: Iterable[Row]) -> list[str]: ...


KEY_FIELDS = {
    Level.STUDY: "study.id",
    Level.SERIES: "series.id",
    Level.IMAGE: "instance.id",
}
_STUDY_FIELDS = (
    "study.json",
    "study.study_instance_uid",
    "study.modalities",
    "study.n_series",
    "study.n_instances",
)
_SERIES_FIELDS = (
    "series.json",
    "study.study_instance_uid",
    "series.series_instance_uid",
    "series.n_instances",
)
_INSTANCE_FIELDS = (
    "instance.sop_class_uid",
    "instance.sop_instance_uid",
    "instance.transfer_syntax_uid",
    "instance.instance_number",
    "instance.samples",
    "instance.number_of_frames",
    "instance.rows",
    "instance.columns",
    "instance.bits_allocated",
)


class _Studies:
    """Rows of studies; counters of the patient only when they are asked for."""

    def __init__(self, request: SearchRequest) -> None:
        self._base = _escaped_base(request.base_url)
        asked = request.include | request.keys.keys()
        self._more = tuple(
            tag
            for tag in (SOP_CLASSES_IN_STUDY, *_PATIENT_COUNTS)
            if request.include_all or tag in asked
        )

    @property
    def fields(self) -> tuple[str, ...]:
        return (*_STUDY_FIELDS, *(field_of(Level.STUDY, tag) for tag in self._more))

    def render(self, rows: Iterable[Row]) -> list[str]:
        rendered = []
        for fragment, uid, modalities, n_series, n_instances, *more in rows:
            row = study_object(
                fragment,
                retrieve_base=self._base,
                study_instance_uid=uid,
                modalities=modalities,
                n_series=n_series,
                n_instances=n_instances,
            )
            if more:
                row = merged(row, dict(map(_attribute, self._more, more)))
            rendered.append(row)
        return rendered


class _SeriesOf:
    """Rows of series, with study attributes when all series are searched."""

    def __init__(self, request: SearchRequest) -> None:
        self._request = request
        self._base = _escaped_base(request.base_url)
        self._with_study = request.study_uid is None or _wants(request, Level.STUDY)

    @property
    def fields(self) -> tuple[str, ...]:
        return (*_SERIES_FIELDS, *(_STUDY_FIELDS if self._with_study else ()))

    def render(self, rows: Iterable[Row]) -> list[str]:
        rendered = []
        for fragment, study_uid, series_uid, n_instances, *study in rows:
            row = series_object(
                fragment,
                retrieve_base=self._base,
                study_instance_uid=study_uid,
                series_instance_uid=series_uid,
                n_instances=n_instances,
            )
            if study:
                above = _study_attributes(study)
                row = merged(row, above)
            rendered.append(row)
        return rendered


class _Instances:
    """Rows of instances; what a series' instances share is made once."""

    def __init__(self, request: SearchRequest) -> None:
        self._base = _escaped_base(request.base_url)
        self._with_study = request.study_uid is None or _wants(request, Level.STUDY)
        self._with_series = request.series_uid is None or _wants(request, Level.SERIES)

    @property
    def fields(self) -> tuple[str, ...]:
        above = (
            *(_SERIES_FIELDS if self._with_series else _SERIES_FIELDS[1:3]),
            *(_STUDY_FIELDS if self._with_study else ()),
        )
        return (*_INSTANCE_FIELDS, *above)

    def render(self, rows: Iterable[Row]) -> list[str]:
        own = len(_INSTANCE_FIELDS)
        rendered: list[str] = []
        for above, group in itertools.groupby(rows, key=lambda row: row[own:]):
            template = self._template(above)
            for row in group:
                values = zip(_INSTANCE_NAMES, row[:own], strict=True)
                rendered.append(template.fill(**dict(values)))
        return rendered

    def _template(self, above: Row) -> InstanceTemplate:
        attributes: dict[str, Any] = {}
        if self._with_series:
            fragment, study_uid, series_uid, n_instances, *study = above
            attributes = orjson.loads(f"{{{fragment}}}")
            attributes["00201209"] = {"vr": "IS", "Value": [n_instances]}
        else:
            study_uid, series_uid, *study = above
        if study:
            attributes = {**_study_attributes(study), **attributes}
        return InstanceTemplate.of(
            retrieve_base=self._base,
            study_instance_uid=study_uid,
            series_instance_uid=series_uid,
            above=attributes,
        )


_INSTANCE_NAMES = tuple(name.partition(".")[2] for name in _INSTANCE_FIELDS)
ANSWERS: Mapping[Level, Callable[[SearchRequest], Answer]] = {
    Level.STUDY: _Studies,
    Level.SERIES: _SeriesOf,
    Level.IMAGE: _Instances,
}


def _wants(request: SearchRequest, level: Level) -> bool:
    """Tell whether attributes of an upper level are asked for.

    Keys of parents that the path names are not.
    """
    asked = (request.include | request.keys.keys()) - set(UNIQUE_KEYS.values())
    of_level = {Level.PATIENT, Level.STUDY} if level is Level.STUDY else {level}
    return any(level_of(tag) in of_level for tag in asked)


def _study_attributes(study: Sequence[Any]) -> dict[str, Any]:
    """Return a study's attributes, its address left out."""
    fragment, uid, modalities, n_series, n_instances = study
    rendered = study_object(
        fragment,
        retrieve_base="",
        study_instance_uid=uid,
        modalities=modalities,
        n_series=n_series,
        n_instances=n_instances,
    )
    attributes: dict[str, Any] = orjson.loads(rendered)
    del attributes["00081190"]
    return attributes


def _attribute(tag: int, value: str | int) -> tuple[str, dict[str, Any]]:
    values = value.split("\\") if isinstance(value, str) else [int(value)]
    return f"{tag:08X}", {"vr": BY_TAG[tag].vr, "Value": values}


def _escaped_base(base_url: str) -> str:
    """Return the base of Retrieve URLs, ready to stand in a JSON string."""
    return orjson.dumps(f"{base_url}/dicom-web").decode()[1:-1]
