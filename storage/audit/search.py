"""Reading the audit: by actor, patient, study, outcome and time, newest first.

A page ends at its limit, or after `SCAN` records were looked at in vain, so that a
rare answer costs many short requests and none that is long.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson
from sqlalchemy import Select, and_, func, or_, select

from storage.audit.chain import CONTENT
from storage.audit.event import LENGTHS, Outcome, clean
from storage.audit.trail import STREAM
from storage.db.engine import Database
from storage.db.tables import AuditRecord
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Actor

#: Records of one page at most.
MAX_PAGE = 1000
#: Records one page looks at.
SCAN = 2000
#: Tenants that are asked for one by one, each in the order of its index.
MERGED = 8
#: Records of one read transaction of an export.
EXPORT_CHUNK = 2000

_COLUMNS = (
    *(getattr(AuditRecord, name) for name in CONTENT),
    AuditRecord.hash,
    AuditRecord.key_id,
    AuditRecord.mac,
)


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """What is looked for; empty fields match everything.

    Attributes
    ----------
    patient_id : str
        Patient ID of the record, or of one of the `studies` it names.
    studies : sequence of str
        The studies of that patient: most accesses name only these.
    since_us, until_us : int or None
        The first access of a record is not before, and not after.
    """

    actor: str = ""
    patient_id: str = ""
    study_uid: str = ""
    action: str = ""
    outcome: Outcome | None = None
    since_us: int | None = None
    until_us: int | None = None
    studies: Sequence[str] = ()

    def described(self) -> dict[str, str | int]:
        """Return the fields that are set: how a search is audited itself."""
        fields: dict[str, str | int | None] = {
            "actor": self.actor,
            "patient_id": self.patient_id,
            "study_uid": self.study_uid,
            "action": self.action,
            "outcome": self.outcome,
            "since_us": self.since_us,
            "until_us": self.until_us,
        }
        return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Records in descending order of time, and where to go on; None: at the end."""

    records: Sequence[Any]
    next: str | None


class AuditReader:
    """Search and export the records of a chain."""

    def __init__(self, database: Database, stream: str = STREAM) -> None:
        self._database = database
        self._stream = stream

    def search(
        self,
        actor: Actor | None,
        query: AuditQuery,
        limit: int,
        cursor: str | None = None,
    ) -> AuditPage:
        """Return the newest records that match, or those after `cursor`.

        Parameters
        ----------
        actor : Actor or None
            Sees records of accesses by its tenants and to their objects; None is
            the node itself, which sees all.
        limit : int
            Records of the page, at most `MAX_PAGE`.
        cursor : str, optional
            `next` of the page before.

        Raises
        ------
        InvalidParameter
            The cursor is none of ours.
        """
        limit = max(1, min(limit, MAX_PAGE))
        sifts = bool(query.action) or query.outcome is Outcome.ALLOW
        window = SCAN if sifts else limit + 1
        found: list[Any] = []
        seen = 0
        last: Any = None
        with self._database.read() as connection:
            statements = [
                statement.limit(window)
                for statement in self._statements(actor, query, cursor)
            ]
            batches = [connection.execute(one).all() for one in statements]
        for row in _merged(batches):
            if len(found) == limit or seen == window:
                return AuditPage(found, _cursor(last))
            seen, last = seen + 1, row
            if _passes(row, query):
                found.append(row)
        more = any(len(batch) == window for batch in batches)
        return AuditPage(found, _cursor(last) if more else None)

    def export(self, first: int = 1, last: int | None = None) -> Iterator[Any]:
        """Yield all records from `first` to `last`, in the order of the chain."""
        after = first - 1
        while True:
            statement = (
                select(*_COLUMNS)
                .where(AuditRecord.stream == self._stream, AuditRecord.sequence > after)
                .order_by(AuditRecord.sequence)
                .limit(EXPORT_CHUNK)
            )
            if last is not None:
                statement = statement.where(AuditRecord.sequence <= last)
            with self._database.read() as connection:
                rows = connection.execute(statement).all()
            yield from rows
            if len(rows) < EXPORT_CHUNK:
                return
            after = rows[-1].sequence

    def _statements(
        self, actor: Actor | None, query: AuditQuery, cursor: str | None
    ) -> list[Select[Any]]:
        """Return statements whose answers, merged, are the rows to look at."""
        return [
            statement
            for one in _alternatives(query)
            for statement in self._of_tenants(actor, one, cursor)
        ]

    def _of_tenants(
        self, actor: Actor | None, query: AuditQuery, cursor: str | None
    ) -> list[Select[Any]]:
        statement, is_narrow = self._statement(query, cursor)
        if actor is None:
            return [statement]
        tenants = actor.tenants
        columns = (AuditRecord.tenant, AuditRecord.object_tenant)
        if is_narrow or len(tenants) > MERGED:
            theirs = [_unindexed(column).in_(tenants) for column in columns]
            return [statement.where(or_(*theirs))]
        # One by one: each is read from its index in order, without sorting.
        return [
            statement.where(column == tenant)
            for tenant in tenants
            for column in columns
        ]

    def _statement(
        self, query: AuditQuery, cursor: str | None
    ) -> tuple[Select[Any], bool]:
        """Return what is looked for, and whether an index of it is in order."""
        record = AuditRecord
        terms = [_unindexed(record.stream) == self._stream]
        is_narrow = False
        # Order matters: the first that is asked for is the most selective.
        for column, value in (
            (record.study_uid, query.study_uid),
            (record.patient_id, query.patient_id),
            (record.actor, query.actor),
        ):
            if value:
                wanted = clean(value, LENGTHS[column.key])
                terms.append((_unindexed(column) if is_narrow else column) == wanted)
                is_narrow = True
        if query.outcome not in {None, Outcome.ALLOW}:
            terms.append(record.outcome == query.outcome)
            if not is_narrow:
                # Names the index of refusals.
                terms.append(record.outcome != "allow")
                is_narrow = True
        if query.since_us is not None:
            terms.append(record.time_us >= query.since_us)
        if query.until_us is not None:
            terms.append(record.time_us <= query.until_us)
        if cursor is not None:
            terms.append(_before(*_parsed(cursor)))
        statement = (
            select(*_COLUMNS)
            .where(and_(*terms))
            .order_by(record.time_us.desc(), record.sequence.desc())
        )
        return statement, is_narrow


def _unindexed(column: Any) -> Any:
    """Return `column` so that its index is not chosen.

    SQLite knows no statistics here, and would sort what another index has in order.
    """
    return func.coalesce(column, "")


def _alternatives(query: AuditQuery) -> Iterator[AuditQuery]:
    """Yield queries that together find what `query` does, each by one index."""
    yield query
    if query.patient_id:
        for study in query.studies:
            if query.study_uid in {"", study}:
                yield replace(query, patient_id="", study_uid=study)


def _before(time_us: int, sequence: int) -> Any:
    record = AuditRecord
    # The first term lets the index begin there.
    return and_(
        record.time_us <= time_us,
        or_(record.time_us < time_us, record.sequence < sequence),
    )


def _passes(row: Any, query: AuditQuery) -> bool:
    if query.action and row.action != query.action:
        return False
    return query.outcome is None or row.outcome == query.outcome


def _merged(batches: Sequence[Iterable[Any]]) -> Iterator[Any]:
    """Yield rows newest first, each once."""
    before = None
    for row in heapq.merge(*batches, key=_place, reverse=True):
        if row.sequence != before:
            yield row
        before = row.sequence


def _place(row: Any) -> tuple[int, int]:
    return row.time_us, row.sequence


def _cursor(row: Any) -> str:
    return f"{row.time_us}-{row.sequence}"


def _parsed(cursor: str) -> tuple[int, int]:
    time_us, dash, sequence = cursor.partition("-")
    plain = cursor.isascii() and time_us.isdecimal() and sequence.isdecimal()
    if not dash or not plain or len(time_us) > 18 or len(sequence) > 18:
        raise InvalidParameter("cursor", "is not one that a page before gave")
    return int(time_us), int(sequence)


def as_json(row: Any) -> dict[str, Any]:
    """Return a record as people and programs read it."""
    record: dict[str, Any] = {
        "sequence": row.sequence,
        "time": _instant(row.time_us),
        "last": _instant(row.last_us),
        "count": row.count,
    }
    for name in CONTENT[CONTENT.index("tenant") : CONTENT.index("detail")]:
        record[name] = getattr(row, name) or ""
    record["roles"] = row.roles.split(",") if row.roles else []
    record["detail"] = _detail(row.detail)
    for name in ("before", "after", "hash"):
        value = getattr(row, name)
        record[name] = value.hex() if value is not None else None
    return record


def as_line(row: Any) -> bytes:
    """Return a record as one line of JSON, with all that its hash is taken over."""
    values = {name: getattr(row, name) for name in (*CONTENT, "hash", "key_id", "mac")}
    return orjson.dumps(values, default=_hexadecimal, option=orjson.OPT_APPEND_NEWLINE)


def _hexadecimal(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _instant(time_us: int) -> str:
    """Return an instant of RFC 3339, in UTC."""
    try:
        found = datetime.fromtimestamp(time_us // 1_000_000, UTC)
    except (ValueError, OverflowError):
        # No time of this world: the record was changed, or a clock was.
        return str(time_us)
    return f"{found:%Y-%m-%dT%H:%M:%S}.{time_us % 1_000_000:06d}Z"


def _detail(text: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError:
        # Somebody changed it: verification tells; a search still shows it.
        return text
