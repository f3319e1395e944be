"""Searches of the index, always for an actor, one SQL statement per shape.

Rules of `pacs.domain.matching` become a tree of tests; the tree without its values
is the shape of a statement, which SQLAlchemy renders once and the driver prepares
once. Statements name one tenant, so that the (tenant, ...) indexes give both the
rows and their order; several tenants are merged here.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count as numbers_from
from itertools import islice
from operator import itemgetter
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from pacs.domain.matching import Blank, Condition, Nothing
from pacs.domain.study import Level
from pacs.repository import visible
from pacs.repository.search_sql import (
    Lowering,
    Phase,
    Statement,
    Tree,
    compile_statement,
)
from pacs.repository.tables import Instance, Series, Study
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Actor, Scope

#: Rows fetched at a time from a server-side cursor.
BATCH = 500
_CURSORS = numbers_from()

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """Sort columns, all in one direction; the last one is unique.

    `nullable` says that the first may be null: these rows come last, in a
    statement of their own, because PostgreSQL and SQLite disagree about nulls.
    """

    columns: tuple[str, ...]
    descending: bool = False
    nullable: bool = False


NEWEST = Order(("study.study_date", "study.id"), descending=True, nullable=True)
STUDY_ORDERS = {
    "-StudyDate": NEWEST,
    "StudyDate": Order(("study.study_date", "study.id"), nullable=True),
    "PatientName": Order(("study.name_alphabetic", "study.id")),
    "-PatientName": Order(("study.name_alphabetic", "study.id"), descending=True),
    "PatientID": Order(("study.patient_id", "study.id")),
    "-PatientID": Order(("study.patient_id", "study.id"), descending=True),
    "AccessionNumber": Order(("study.accession_number", "study.id")),
    "-AccessionNumber": Order(("study.accession_number", "study.id"), descending=True),
}
_BY_SERIES = Order(("series.number_order", "series.id"))
_BY_INSTANCE = Order(
    ("series.number_order", "series.id", "instance.number_order", "instance.id")
)
#: Orders that can be asked for; of series and instances only within a study.
ORDERS: Mapping[Level, Mapping[str, Order]] = {
    Level.STUDY: STUDY_ORDERS,
    Level.SERIES: {
        "SeriesNumber": _BY_SERIES,
        "-SeriesNumber": replace(_BY_SERIES, descending=True),
    },
    Level.IMAGE: {
        "InstanceNumber": _BY_INSTANCE,
        "-InstanceNumber": replace(_BY_INSTANCE, descending=True),
    },
}
_LATEST = {
    Level.PATIENT: Order(("patient.id",)),
    Level.STUDY: NEWEST,
    Level.SERIES: Order(("series.id",), descending=True),
    Level.IMAGE: Order(("instance.id",), descending=True),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What is searched, and which columns are wanted of each match.

    Attributes
    ----------
    fields : tuple of str
        ``table.column``, or a name in `_COMPUTED`.
    free_words : tuple of str
        Each must begin a word of the name (any group, pinyin), the Patient ID or
        the Accession Number.
    order : Order, optional
        Else the level's own: newest studies first, within a study by number.
    """

    level: Level
    conditions: tuple[Condition, ...]
    fields: tuple[str, ...]
    free_words: tuple[str, ...] = ()
    order: Order | None = None

    @property
    def effective_order(self) -> Order:
        """The order that rows come in."""
        if self.order is not None:
            return self.order
        named = {found.attribute.keyword for found in self.conditions}
        if self.level is Level.SERIES and "StudyInstanceUID" in named:
            return _BY_SERIES
        if self.level is Level.IMAGE and named & {
            "StudyInstanceUID",
            "SeriesInstanceUID",
        }:
            return _BY_INSTANCE
        return _LATEST[self.level]


@dataclass(frozen=True, slots=True)
class After:
    """The place of a row in its order: keyset pagination goes on behind it."""

    phase: int
    values: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A page of rows, and where each of them stands."""

    rows: list[Row]
    places: list[After]

    def place(self, index: int) -> After:
        """Return where row `index` stands."""
        return self.places[index]


def page(
    connection: Connection,
    actor: Actor,
    selection: Selection,
    *,
    limit: int,
    offset: int = 0,
    after: After | None = None,
) -> Found:
    """Return at most `limit` rows, `offset` rows on from `after` (or the start).

    Raises
    ------
    InvalidParameter
        `after` is not a place in this order.
    """
    selection = _told(actor, selection)
    phases, tree, values = _prepare(connection, actor, selection)
    width = len(selection.fields)
    found = Found([], [])
    for phase in phases:
        wanted = limit - len(found.rows)
        if wanted <= 0:
            break
        if after is not None and phase.number < after.phase:
            continue
        start = after if after is not None and phase.number == after.phase else None
        run = _Run(connection, selection, phase, tree, values, start)
        if len(actor.tenants) == 1:
            rows = run.fetch(actor.tenants[0], wanted, offset)
            skipped = offset
            if not rows and offset:
                skipped = run.count(actor.tenants[0], offset)
        else:
            # Bound: each tenant gives one batch at a time, whatever the offset.
            merged = run.merged(actor.tenants, offset + wanted)
            skipped = sum(1 for _ in islice(merged, offset))
            rows = list(islice(merged, wanted))
        offset -= skipped
        found.rows.extend(row[:width] for row in rows)
        found.places.extend(After(phase.number, row[width:]) for row in rows)
    return found


def stream(
    connection: Connection, actor: Actor, selection: Selection
) -> Generator[Row, None, None]:
    """Yield all rows from a server-side cursor, one tenant after the other."""
    selection = _told(actor, selection)
    phases, tree, values = _prepare(connection, actor, selection)
    width = len(selection.fields)
    for tenant in actor.tenants:
        for phase in phases:
            run = _Run(connection, selection, phase, tree, values, None)
            for row in run.iterate(tenant):
                yield row[:width]


def count(
    connection: Connection, actor: Actor, selection: Selection, *, at_most: int
) -> int:
    """Return the number of matches, counting no further than `at_most`."""
    phases, tree, values = _prepare(connection, actor, selection)
    total = 0
    for tenant in actor.tenants:
        for phase in phases:
            if total < at_most:
                run = _Run(connection, selection, phase, tree, values, None)
                total += run.count(tenant, at_most - total)
    return total


def first_instances(
    connection: Connection, actor: Actor, level: Level, pks: Sequence[int]
) -> dict[int, tuple[int, str]]:
    """Return row key and UID of an instance of each study, series or instance."""
    parent = {
        Level.STUDY: Series.study_pk,
        Level.SERIES: Instance.series_pk,
        Level.IMAGE: Instance.id,
    }[level]
    firsts = (
        select(parent.label("parent"), func.min(Instance.id).label("first"))
        .join(Series, Series.id == Instance.series_pk)
        .where(parent.in_(pks), Instance.tenant.in_(actor.tenants), *_of_scope(actor))
        .group_by(parent)
        .subquery()
    )
    found = connection.execute(
        select(firsts.c.parent, Instance.id, Instance.sop_instance_uid).join(
            firsts, firsts.c.first == Instance.id
        )
    )
    return {row[0]: (row[1], row[2]) for row in found}


#: Whoever may know of single studies is not told how many others the patient has.
_WITHIN_STUDY = {
    "of_patient.n_studies": "study.itself",
    "of_patient.n_series": "study.n_series",
    "of_patient.n_instances": "study.n_instances",
}


def _told(actor: Actor, selection: Selection) -> Selection:
    """Return the selection with the columns that `actor` may be told."""
    if actor.scope is None or not actor.scope.studies:
        return selection
    fields = tuple(_WITHIN_STUDY.get(name, name) for name in selection.fields)
    return replace(selection, fields=fields)


def _of_scope(actor: Actor) -> tuple[ColumnElement[bool], ...]:
    """Return the condition on the series of rows, where the actor has a scope."""
    if actor.scope is None:
        return ()
    return (Series.study_pk.in_(select(Study.id).where(visible.studies(actor))),)


@dataclass(slots=True)
class _Run:
    """One phase of a search, ready to run for a tenant."""

    connection: Connection
    selection: Selection
    phase: Phase
    tree: Tree
    values: Sequence[Any]
    after: After | None
    _named: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._named = {f"p{i}": value for i, value in enumerate(self.values)}
        if self.after is not None:
            _check_place(self.phase, self.after)
            self._named |= {f"a{i}": v for i, v in enumerate(self.after.values)}

    def _statement(self, form: str) -> Statement:
        selection = self.selection
        return compile_statement(
            selection.level,
            selection.fields,
            self.phase,
            self.tree,
            descending=selection.effective_order.descending,
            is_after=self.after is not None,
            form=form,
            is_sqlite=_is_sqlite(self.connection),
        )

    def _execute(self, form: str, tenant: str, **more: int) -> Any:
        driver: Any = self.connection.connection.driver_connection
        statement = self._statement(form)
        named = {**statement.constants, **self._named, "tenant": tenant, **more}
        if _is_sqlite(self.connection):
            return driver.execute(
                statement.sql, [named[name] for name in statement.names]
            )
        if form in {"all", "first"}:
            cursor = driver.cursor(name=f"search_{next(_CURSORS)}")
            cursor.itersize = BATCH
            cursor.execute(statement.sql, named)
            return cursor
        return driver.execute(statement.sql, named)

    def fetch(self, tenant: str, limit: int, offset: int) -> list[Row]:
        if offset:
            cursor = self._execute("offset", tenant, limit=limit, offset=offset)
        else:
            cursor = self._execute("page", tenant, limit=limit)
        rows: list[Row] = cursor.fetchall()
        return rows

    def count(self, tenant: str, at_most: int) -> int:
        row = self._execute("count", tenant, limit=at_most).fetchone()
        return int(row[0])

    def iterate(self, tenant: str, limit: int | None = None) -> Iterator[Row]:
        if limit is None:
            cursor = self._execute("all", tenant)
        else:
            cursor = self._execute("first", tenant, limit=limit)
        try:
            while rows := cursor.fetchmany(BATCH):
                yield from rows
        finally:
            cursor.close()

    def merged(self, tenants: Iterable[str], limit: int) -> Iterator[Row]:
        width = len(self.selection.fields)
        return heapq.merge(
            *(self.iterate(tenant, limit) for tenant in tenants),
            key=itemgetter(slice(width, None)),
            reverse=self.selection.effective_order.descending,
        )


def _check_place(phase: Phase, after: After) -> None:
    """Refuse values that are not of the columns' types."""
    fits = len(after.values) == len(phase.key) and all(
        type(value) is int and abs(value) < 2**63
        if name.endswith((".id", ".number_order"))
        else type(value) is str and "\0" not in value
        for name, value in zip(phase.key, after.values, strict=True)
    )
    if not fits:
        raise InvalidParameter("cursor", "is not of this search")


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


def _prepare(
    connection: Connection, actor: Actor, selection: Selection
) -> tuple[tuple[Phase, ...], Tree, list[Any]]:
    """Return the phases of the order, the tree of tests, and its values."""
    rules = [found.rule for found in selection.conditions]
    if any(isinstance(rule, Nothing) for rule in rules):
        return (), (), []
    if actor.scope == Scope():
        return (), (), []
    lowering = Lowering(is_sqlite=_is_sqlite(connection))
    tree = (
        "and",
        *(() if actor.scope is None else (lowering.scope(actor.scope),)),
        *(lowering.condition(found) for found in selection.conditions),
        *(lowering.free_word(word) for word in selection.free_words),
    )
    order = selection.effective_order
    everything = Phase(0, order.columns, order.columns, ("and",))
    if not order.nullable:
        return (everything,), tree, lowering.values
    first = order.columns[0]
    present = Phase(0, order.columns, order.columns, ("notnull", first))
    absent = Phase(1, order.columns, order.columns[1:], ("null", first))
    column = first.partition(".")[2]
    for found in selection.conditions:
        if found.attribute.column == column:
            only = absent if isinstance(found.rule, Blank) else present
            return (only,), tree, lowering.values
    return (present, absent), tree, lowering.values
