"""The index rows of arriving instances, written in one short transaction.

This is the hot path of the archive: plain SQL on the driver's connection, parents
resolved once and remembered, counters added once per group. Nothing here decides
about DICOM; it refuses only what contradicts rows that exist.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import orjson
import psycopg
from sqlalchemy import Connection

from pacs.repository.arrivals import InstanceRow, ParentKey, Written
from storage.kernel.errors import IdentityMismatch, LostRace
from storage.packs.format import Location

#: Series remembered by one process; each costs about half a kilobyte.
CACHED_SERIES = 20_000

PATIENT_ID_TAG = 0x00100020
SERIES_UID_TAG = 0x0020000E
INSTANCE_UID_TAG = 0x00080018


@dataclass(slots=True)
class _Known:
    """A series whose rows exist, with what its study already lists."""

    patient_pk: int
    study_pk: int
    series_pk: int
    listed: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _KnownStudy:
    """A study whose row exists, of a series that has none."""

    patient_pk: int
    study_pk: int


class _Made(NamedTuple):
    """What a row's parents took: a new series, and which rows count it already."""

    series: bool
    series_counts: bool
    study_counts: bool


_NOTHING_MADE = _Made(series=False, series_counts=False, study_counts=False)


class _Cursor(Protocol):
    rowcount: int

    def fetchone(self) -> Any: ...
    def fetchall(self) -> Any: ...
    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> Any: ...


class StaleIndex(Exception):
    """Rows changed since they were looked up; look again and repeat."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the index knows of a SOP Instance UID.

    Attributes
    ----------
    digest : bytes
        Empty without a row.
    until_us : int
        When the row was received, or the last one before it deleted.
    """

    digest: bytes
    until_us: int


@dataclass(slots=True)
class _Added:
    """What one group adds to a series or study."""

    key: ParentKey
    study_pk: int
    instances: int = 0
    size_bytes: int = 0
    series: int = 0


class IndexWriter:
    """Write instance rows, their parents, counters and events.

    One per process; not thread-safe: the group leader calls it.

    Parameters
    ----------
    node_id : str
        Owner of local packs.
    is_sqlite : bool
        Decides the driver's parameter style.
    """

    def __init__(self, *, node_id: str, is_sqlite: bool) -> None:
        self._node_id = node_id
        self._is_sqlite = is_sqlite
        self._series: dict[ParentKey, _Known] = {}
        self._packs: dict[str, int] = {}
        #: Studies that `check_parents` has not found for the rows at hand.
        self._absent: set[tuple[str, str]] = set()

    def forget(self) -> None:
        """Drop what is remembered about parents and packs."""
        self._series.clear()
        self._packs.clear()
        self._absent.clear()

    def held(
        self, connection: Connection, keys: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], Held]:
        """Return what is known of each (tenant, SOP Instance UID), if anything."""
        run = self._runner(connection)
        found = {}
        for tenant, uid in keys:
            digest, received_us, deleted_us = run(
                "SELECT digest, received_us, (SELECT max(deleted_us) FROM deletion"
                " WHERE tenant=? AND sop_instance_uid=?)"
                " FROM (SELECT 1) AS asked LEFT JOIN instance"
                " ON tenant=? AND sop_instance_uid=?",
                (tenant, uid, tenant, uid),
            ).fetchone()
            if digest is not None or deleted_us is not None:
                until_us = max(received_us or 0, deleted_us or 0)
                found[tenant, uid] = Held(bytes(digest or b""), until_us)
        return found

    def is_deleted(self, connection: Connection, row: InstanceRow) -> bool:
        """Tell whether the content of `row` was deleted after it was received."""
        found = self._runner(connection)(
            "SELECT 1 FROM deletion WHERE tenant=? AND sop_instance_uid=?"
            " AND digest=? AND deleted_us>=?",
            (row.key.tenant, row.sop_instance_uid, row.digest, row.received_us),
        )
        return found.fetchone() is not None

    def check_parents(self, connection: Connection, row: InstanceRow) -> None:
        """Refuse a row that would merge two patients or move a series.

        Raises
        ------
        IdentityMismatch
            The study is known under another patient (PS3.3 C.7), or the series
            under another study.
        """
        if row.key not in self._series:
            found = self._find_parents(self._runner(connection), row.key)
            if found is None:
                self._absent.add((row.key.tenant, row.key.study_instance_uid))

    def add(
        self, connection: Connection, rows: Sequence[InstanceRow], *, settle_due_us: int
    ) -> None:
        """Write `rows` in the caller's transaction; set `written` of each.

        Raises
        ------
        StaleIndex
            A remembered parent is gone or a UID was taken meanwhile: roll back,
            `forget`, look the rows up again and repeat.
        """
        try:
            self._add(connection, rows, settle_due_us)
        except (sqlite3.IntegrityError, psycopg.IntegrityError) as error:
            raise StaleIndex from error
        finally:
            self._absent.clear()

    def _runner(
        self, connection: Connection
    ) -> Callable[[str, Sequence[Any]], _Cursor]:
        """Return the driver's execute, which costs a tenth of the toolkit's."""
        execute = connection.connection.driver_connection.execute  # type: ignore[union-attr]
        if self._is_sqlite:
            return execute  # type: ignore[no-any-return]
        return lambda sql, values: execute(sql.replace("?", "%s"), values)

    def _add(
        self, connection: Connection, rows: Sequence[InstanceRow], settle_due_us: int
    ) -> None:
        run = self._runner(connection)
        series_added: dict[int, _Added] = {}
        study_added: dict[int, _Added] = {}
        latest_us = 0
        # Order matters: two processes that touch the same studies lock them in
        # the same order, so that PostgreSQL never sees a deadlock.
        for row in sorted(rows, key=lambda r: r.key.study_instance_uid):
            try:
                if row.written is Written.REFUSED:
                    continue
                known, made = self._resolve(run, row, settle_due_us)
                fresh = self._insert_instance(run, row, known.series_pk)
            except IdentityMismatch as error:
                row.written, row.error = Written.REFUSED, error
                continue
            if fresh is None:
                continue
            latest_us = max(latest_us, row.received_us)
            # Rows that were made with this instance count it already.
            if not made.series_counts:
                added = series_added.setdefault(
                    known.series_pk, _Added(row.key, known.study_pk)
                )
                added.instances += fresh
                added.size_bytes += row.object_length
            if not made.study_counts:
                added = study_added.setdefault(
                    known.study_pk, _Added(row.key, known.study_pk)
                )
                added.instances += fresh
                added.size_bytes += row.object_length
                added.series += made.series
                self._list_in_study(run, row, known)
        # The UIDs guard against remembered keys that another process has deleted
        # and the database has given to other rows.
        for pk in sorted(series_added):
            added = series_added[pk]
            done = run(
                "UPDATE series SET n_instances=n_instances+?, size_bytes=size_bytes+?,"
                " revision=revision+1, updated_us=? WHERE id=? AND study_pk=?"
                " AND tenant=? AND series_instance_uid=?",
                (
                    added.instances,
                    added.size_bytes,
                    latest_us,
                    pk,
                    added.study_pk,
                    added.key.tenant,
                    added.key.series_instance_uid,
                ),
            )
            if done.rowcount != 1:
                raise StaleIndex
        for pk in sorted(study_added):
            added = study_added[pk]
            done = run(
                "UPDATE study SET n_series=n_series+?, n_instances=n_instances+?,"
                " size_bytes=size_bytes+?, settle_due_us=?, updated_us=? WHERE id=?"
                " AND tenant=? AND study_instance_uid=?",
                (
                    added.series,
                    added.instances,
                    added.size_bytes,
                    settle_due_us,
                    latest_us,
                    pk,
                    added.key.tenant,
                    added.key.study_instance_uid,
                ),
            )
            if done.rowcount != 1:
                raise StaleIndex
        self._refuse_buried(connection, run, rows)
        self._append_events(connection, rows)

    def _refuse_buried(
        self,
        connection: Connection,
        run: Callable[..., _Cursor],
        rows: Sequence[InstanceRow],
    ) -> None:
        """Make sure that no deletion buries what is added: one look per study.

        The same content may have been stored by somebody else and deleted between
        the look for duplicates and now. Its tombstone covers all that was received
        until then: recovery would take this record for deleted, too. Order matters:
        the study's row is locked by now, so that no deletion is on its way.
        """
        since: dict[tuple[str, str], int] = {}
        for row in rows:
            if row.written in _PRESENT:
                key = (row.key.tenant, row.key.study_instance_uid)
                since[key] = min(row.received_us, since.get(key, row.received_us))
        for key, received_us in since.items():
            found = run(
                "SELECT 1 FROM deletion WHERE tenant=? AND study_instance_uid=?"
                " AND deleted_us>=? LIMIT 1",
                (*key, received_us),
            ).fetchone()
            if found is not None and any(
                row.written in _PRESENT and self.is_deleted(connection, row)
                for row in rows
            ):
                raise StaleIndex

    def _insert_instance(
        self, run: Callable[..., _Cursor], row: InstanceRow, series_pk: int
    ) -> int | None:
        """Insert or replace; return how many instances that adds, None for nothing."""
        location = row.location
        if row.written is Written.DUPLICATE:
            return None
        if location is None:
            # It was a duplicate when its bytes were dropped; what it duplicated has
            # been deleted since.
            row.written = Written.REFUSED
            row.error = LostRace("index: the instance was deleted meanwhile")
            return None
        pack_pk = self._pack_pk(run, row, location)
        if row.replace:
            self._retire_replaced(run, row, series_pk)
        inserted = run(
            "INSERT INTO instance (tenant, series_pk, sop_instance_uid, sop_class_uid,"
            " transfer_syntax_uid, instance_number, rows, columns, bits_allocated,"
            " samples, number_of_frames, digest, pack_pk, record_offset,"
            " object_offset, object_length, dataset_offset, header_end, pixel_offset,"
            " flags, received_us)"
            " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
            " ON CONFLICT (tenant, sop_instance_uid) DO NOTHING RETURNING id",
            (
                row.key.tenant,
                series_pk,
                row.sop_instance_uid,
                row.sop_class_uid,
                row.transfer_syntax_uid,
                row.instance_number,
                row.rows,
                row.columns,
                row.bits_allocated,
                row.samples,
                row.number_of_frames,
                row.digest,
                pack_pk,
                location.record_offset,
                location.object_offset,
                location.object_length,
                row.dataset_offset,
                row.header_end,
                row.pixel_offset,
                row.flags,
                row.received_us,
            ),
        ).fetchone()
        if inserted is None:
            raise StaleIndex
        if row.frame_table is not None:
            run(
                "INSERT INTO frame_table (instance_pk, table_bytes) VALUES (?,?)",
                (inserted[0], row.frame_table),
            )
        row.written = Written.REPLACED if row.replace else Written.ADDED
        return 0 if row.replace else 1

    @staticmethod
    def _retire_replaced(
        run: Callable[..., _Cursor], row: InstanceRow, series_pk: int
    ) -> None:
        """Take the row of the content that `row` replaces out of the index.

        Its bytes stay recoverable until the deadline of the deletion row.
        """
        held = run(
            "SELECT instance.id, instance.series_pk, instance.digest, pack.key,"
            " instance.record_offset, instance.object_length, instance.settled_version"
            " FROM instance JOIN pack ON pack.id=instance.pack_pk"
            " WHERE instance.tenant=? AND instance.sop_instance_uid=?",
            (row.key.tenant, row.sop_instance_uid),
        ).fetchone()
        if held is None:
            raise StaleIndex
        if held[1] != series_pk:
            raise IdentityMismatch(
                "the instance is stored in another series", SERIES_UID_TAG
            )
        run(
            "INSERT INTO deletion (tenant, study_instance_uid, series_instance_uid,"
            " sop_instance_uid, digest, pack_key, record_offset, actor, reason,"
            " deleted_us, deadline_us, reported_version)"
            " VALUES (?,?,?,?,?,?,?,?,'replaced',?,?,0)",
            (
                row.key.tenant,
                row.key.study_instance_uid,
                row.key.series_instance_uid,
                row.sop_instance_uid,
                bytes(held[2]),
                held[3],
                held[4],
                row.origin,
                row.received_us,
                row.received_us + row.replaced_keep_us,
            ),
        )
        run("DELETE FROM frame_table WHERE instance_pk=?", (held[0],))
        run("DELETE FROM instance WHERE id=?", (held[0],))
        run(
            "UPDATE series SET size_bytes=size_bytes-? WHERE id=?",
            (held[5], series_pk),
        )
        run(
            "UPDATE study SET size_bytes=size_bytes-?"
            " WHERE id=(SELECT study_pk FROM series WHERE id=?)",
            (held[5], series_pk),
        )
        row.kept_digest = bytes(held[2])

    def _pack_pk(
        self, run: Callable[..., _Cursor], row: InstanceRow, location: Location
    ) -> int:
        key = location.pack_key
        pk = self._packs.get(key)
        if pk is None:
            run(
                "INSERT INTO pack (key, tenant, kind, place, node_id, state,"
                " size_bytes, created_us) VALUES (?,?,?,'local',?,?,0,?)"
                " ON CONFLICT (key) DO NOTHING",
                (
                    key,
                    row.key.tenant,
                    row.pack_kind,
                    self._node_id,
                    "open" if row.pack_kind == "log" else "closed",
                    row.received_us,
                ),
            )
            pk = run("SELECT id FROM pack WHERE key=?", (key,)).fetchone()[0]
            if row.pack_kind == "log":
                self._packs = {**self._packs, key: pk}
        return pk

    def _resolve(
        self, run: Callable[..., _Cursor], row: InstanceRow, settle_due_us: int
    ) -> tuple[_Known, _Made]:
        """Return the parents' keys, and what was made now."""
        known = self._series.get(row.key)
        made = _NOTHING_MADE
        if known is not None:
            return known, made
        study = (row.key.tenant, row.key.study_instance_uid)
        if study in self._absent:
            # Not there a moment ago; whoever was faster is found by the insert.
            self._absent.discard(study)
            found = None
        else:
            found = self._find_parents(run, row.key)
        if isinstance(found, _Known):
            known = found
        else:
            known, made = self._make_parents(run, row, found, settle_due_us)
        if len(self._series) >= CACHED_SERIES:
            self._series.clear()
        self._series[row.key] = known
        return known, made

    def _find_parents(
        self, run: Callable[..., _Cursor], key: ParentKey
    ) -> _Known | _KnownStudy | None:
        """Return the series with its parents, else its study, else None."""
        # One statement, one snapshot: what another process commits between two of
        # them would look like a contradiction.
        rows = run(
            "SELECT series.id, study.id, study.patient_pk, study.patient_id,"
            " study.issuer, study.study_instance_uid"
            " FROM series JOIN study ON study.id=series.study_pk"
            " WHERE series.tenant=? AND series.series_instance_uid=?"
            " UNION ALL SELECT NULL, id, patient_pk, patient_id, issuer,"
            " study_instance_uid FROM study WHERE tenant=? AND study_instance_uid=?",
            (
                key.tenant,
                key.series_instance_uid,
                key.tenant,
                key.study_instance_uid,
            ),
        ).fetchall()
        if not rows:
            return None
        found = next((row for row in rows if row[0] is not None), rows[0])
        series_pk, study_pk, patient_pk, patient_id, issuer, study_uid = found
        if study_uid != key.study_instance_uid:
            raise IdentityMismatch(
                "the series is stored under another study", SERIES_UID_TAG
            )
        if (patient_id, issuer) != (key.patient_id, key.issuer):
            raise IdentityMismatch(
                "the study is stored under another patient", PATIENT_ID_TAG
            )
        if series_pk is None:
            return _KnownStudy(patient_pk, study_pk)
        return _Known(patient_pk, study_pk, series_pk)

    def _make_parents(
        self,
        run: Callable[..., _Cursor],
        row: InstanceRow,
        study: _KnownStudy | None,
        settle_due_us: int,
    ) -> tuple[_Known, _Made]:
        """Insert what is missing. Two processes may try at once: the first wins.

        New rows count the instance at once, when it is certain to be inserted: the
        study's and series' own statements are most of what a study of one image
        costs.
        """
        values = row.parents()
        counts = (
            row.location is not None
            and row.written is not Written.DUPLICATE
            and not row.replace
        )
        counted: dict[str, Any] = {}
        if counts:
            counted = {
                "n_instances": 1,
                "size_bytes": row.object_length,
                "updated_us": row.received_us,
            }
        made_study = False
        if study is None:
            patient_pk, _ = self._insert_or_find(
                run, "patient", values.patient, ("tenant", "issuer", "patient_id")
            )
            listed = {"modalities": row.modality, "sop_classes": row.sop_class_uid}
            study_pk, made_study = self._insert_or_find(
                run,
                "study",
                {
                    **values.study,
                    **counted,
                    **(listed if counts else {}),
                    "n_series": int(counts),
                    "settle_due_us": settle_due_us,
                    "patient_pk": patient_pk,
                },
                ("tenant", "study_instance_uid"),
            )
            study = _KnownStudy(patient_pk, study_pk)
        series_pk, made_series = self._insert_or_find(
            run,
            "series",
            {
                **values.series,
                **counted,
                "revision": int(counts),
                "study_pk": study.study_pk,
            },
            ("tenant", "series_instance_uid"),
        )
        known = _Known(study.patient_pk, study.study_pk, series_pk)
        if counts and made_study:
            known.listed.add((row.modality, row.sop_class_uid))
        if not (made_series and made_study):
            # Another process may have made the study or series between the look
            # and the insert, under another patient or study.
            self._find_parents(run, row.key)
        return known, _Made(made_series, counts and made_series, counts and made_study)

    @staticmethod
    def _insert_or_find(
        run: Callable[..., _Cursor],
        table: str,
        values: dict[str, Any],
        unique: tuple[str, ...],
    ) -> tuple[int, bool]:
        """Return the key of the row with these unique values, and if it is new."""
        insert, find = _statements(table, tuple(values), unique)
        row = run(insert, tuple(values.values())).fetchone()
        if row is not None:
            return int(row[0]), True
        row = run(find, tuple(values[name] for name in unique)).fetchone()
        return int(row[0]), False

    def _list_in_study(
        self, run: Callable[..., _Cursor], row: InstanceRow, known: _Known
    ) -> None:
        """Keep Modalities in Study and SOP Classes in Study (PS3.4 C.3.4)."""
        entry = (row.modality, row.sop_class_uid)
        if entry in known.listed:
            return
        held = run(
            "SELECT modalities, sop_classes FROM study WHERE id=?", (known.study_pk,)
        ).fetchone()
        if held is None:
            raise StaleIndex
        modalities = _with(held[0], row.modality)
        classes = _with(held[1], row.sop_class_uid)
        if (modalities, classes) != (held[0], held[1]):
            run(
                "UPDATE study SET modalities=?, sop_classes=? WHERE id=?",
                (modalities, classes, known.study_pk),
            )
        known.listed.add(entry)

    def _append_events(
        self, connection: Connection, rows: Sequence[InstanceRow]
    ) -> None:
        sql = (
            "INSERT INTO outbox_event (tenant, kind, subject, payload, created_us)"
            " VALUES (?,?,?,?,?)"
        )
        events = [_event(row) for row in rows if row.written is not None]
        raw: Any = connection.connection.driver_connection
        cursor = raw.cursor()
        cursor.executemany(sql if self._is_sqlite else sql.replace("?", "%s"), events)
        cursor.close()


@lru_cache(maxsize=32)
def _statements(
    table: str, columns: tuple[str, ...], unique: tuple[str, ...]
) -> tuple[str, str]:
    """Return the statements that insert a row or find the one that is there."""
    # Table and column names are ours, from the models; values are bound.
    names, marks = ", ".join(columns), ",".join("?" * len(columns))
    where = " AND ".join(f"{name}=?" for name in unique)
    insert = (
        f"INSERT INTO {table} ({names}) VALUES ({marks})"  # noqa: S608
        f" ON CONFLICT ({', '.join(unique)}) DO NOTHING RETURNING id"
    )
    return insert, f"SELECT id FROM {table} WHERE {where}"  # noqa: S608


_PRESENT = frozenset((Written.ADDED, Written.REPLACED))

_EVENTS = {
    Written.ADDED: "instance.stored",
    Written.REPLACED: "instance.replaced",
    Written.DUPLICATE: "instance.duplicate",
    Written.REFUSED: "instance.refused",
}


def _event(row: InstanceRow) -> tuple[str, str, str, str, int]:
    """Return the outbox row of one written instance."""
    written = row.written or Written.REFUSED
    if written is Written.DUPLICATE and row.kept_digest not in (b"", row.digest):
        written = Written.REFUSED
    body = {
        "study": row.key.study_instance_uid,
        "series": row.key.series_instance_uid,
        "instance": row.sop_instance_uid,
        "class": row.sop_class_uid,
        "origin": row.origin,
        "digest": row.digest.hex(),
        "bytes": row.object_length,
    }
    if row.kept_digest and row.kept_digest != row.digest:
        body["kept_digest"] = row.kept_digest.hex()
    return (
        row.key.tenant,
        _EVENTS[written],
        row.sop_instance_uid,
        orjson.dumps(body).decode(),
        row.received_us,
    )


def _with(listed: str, value: str) -> str:
    """Add `value` to a backslash-joined sorted set; empty values are not listed."""
    values = set(listed.split("\\")) if listed else set()
    if value:
        values.add(value)
    return "\\".join(sorted(values))
