"""Where stored instances are: selections for retrieval, always for an actor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    select,
)

from pacs.domain.study import StoredInstance
from pacs.repository import visible
from pacs.repository.tables import FrameTableRow, Instance, Series, Study
from storage.db.tables import Pack
from storage.kernel.types import Actor

#: SQLite takes at most 32,766 variables; smaller chunks plan better.
CHUNK = 500

_COLUMNS = (
    Instance.id,
    Instance.series_pk,
    Instance.tenant,
    Study.study_instance_uid,
    Series.series_instance_uid,
    Instance.sop_class_uid,
    Instance.sop_instance_uid,
    Instance.transfer_syntax_uid,
    Series.modality,
    Instance.instance_number,
    Instance.rows,
    Instance.columns,
    Instance.bits_allocated,
    Instance.samples,
    Instance.number_of_frames,
    Instance.digest,
    Pack.key,
    Instance.record_offset,
    Instance.object_offset,
    Instance.object_length,
    Instance.dataset_offset,
    Instance.header_end,
    Instance.pixel_offset,
    Instance.received_us,
)

_JOINED: Select[*tuple[Any, ...]] = (
    select(*_COLUMNS)
    .select_from(Instance)
    .join(Series, Series.id == Instance.series_pk)
    .join(Study, Study.id == Series.study_pk)
    .join(Pack, Pack.id == Instance.pack_pk)
)

#: Presentation order: series number, then instance number, then arrival.
_ORDER = (
    Study.id,
    Series.series_number.nulls_last(),
    Series.id,
    Instance.instance_number.nulls_last(),
    Instance.id,
)


def _stored(row: Row[*tuple[Any, ...]]) -> StoredInstance:
    return StoredInstance(*row)


def _visible(actor: Actor) -> ColumnElement[bool]:
    own = Instance.tenant.in_(actor.tenants)
    return own if actor.scope is None else and_(own, visible.studies(actor))


def instances(
    connection: Connection,
    actor: Actor,
    *,
    study_uid: str | None = None,
    series_uid: str | None = None,
    instance_uid: str | None = None,
) -> list[StoredInstance]:
    """Return what the given UIDs name together, in presentation order."""
    wanted = [_visible(actor)]
    if study_uid is not None:
        wanted.append(Study.study_instance_uid == study_uid)
        wanted.append(Study.tenant.in_(actor.tenants))
    if series_uid is not None:
        wanted.append(Series.series_instance_uid == series_uid)
        wanted.append(Series.tenant.in_(actor.tenants))
    if instance_uid is not None:
        wanted.append(Instance.sop_instance_uid == instance_uid)
    rows = connection.execute(_JOINED.where(and_(*wanted)).order_by(*_ORDER))
    return [_stored(row) for row in rows]


def by_keys(
    connection: Connection,
    actor: Actor,
    *,
    patient_ids: Sequence[str] = (),
    issuers: Sequence[str] = (),
    study_uids: Sequence[str] = (),
    series_uids: Sequence[str] = (),
    instance_uids: Sequence[str] = (),
) -> list[StoredInstance]:
    """Return the instances under unique keys of a C-MOVE or C-GET identifier.

    An empty sequence does not restrict. Only the longest list is chunked.
    """
    lists = [
        (Study.patient_id, list(patient_ids)),
        (Study.issuer, list(issuers)),
        (Study.study_instance_uid, list(study_uids)),
        (Series.series_instance_uid, list(series_uids)),
        (Instance.sop_instance_uid, list(instance_uids)),
    ]
    given = [(column, values) for column, values in lists if values]
    if not given:
        return []
    longest = max(given, key=lambda pair: len(pair[1]))
    others = [
        column.in_(values) for column, values in given if column is not longest[0]
    ]
    found: list[StoredInstance] = []
    for chunk in _chunks(longest[1]):
        query = _JOINED.where(
            _visible(actor),
            Study.tenant.in_(actor.tenants),
            longest[0].in_(chunk),
            *others,
        ).order_by(*_ORDER)
        found += map(_stored, connection.execute(query))
    return found


def again(connection: Connection, instance: StoredInstance) -> StoredInstance | None:
    """Return the present location of an instance, or None when it is gone."""
    # Keys of deleted rows may be given out again, and so may the UID, to other content.
    row = connection.execute(
        _JOINED.where(
            Instance.id == instance.pk,
            Instance.tenant == instance.tenant,
            Instance.sop_instance_uid == instance.sop_instance_uid,
            Instance.digest == instance.digest,
        )
    ).first()
    return None if row is None else _stored(row)


def is_present(connection: Connection, instance: StoredInstance) -> bool:
    """Tell whether the instance is still what its row says.

    The UID is compared too: the key of a deleted row may be given out again. The
    statement goes to the driver as it is: frames are asked for by the thousand.
    """
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    row = connection.exec_driver_sql(
        f"SELECT digest FROM instance WHERE id = {mark} AND sop_instance_uid = {mark}",  # noqa: S608
        (instance.pk, instance.sop_instance_uid),
    ).first()
    return row is not None and bytes(row[0]) == instance.digest


def frame_table(connection: Connection, instance: StoredInstance) -> bytes | None:
    """Return the packed frame table of an encapsulated multi-frame instance."""
    return connection.execute(
        select(FrameTableRow.table_bytes).where(
            FrameTableRow.instance_pk == instance.pk
        )
    ).scalar_one_or_none()


def _chunks(values: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for value in values:
        chunk.append(value)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
