"""The rows of renditions: which frames exist in another encoding, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, exists, func, insert, select, update

from pacs.repository.tables import (
    Deletion,
    Instance,
    InstanceRendition,
    Rendition,
    Series,
)

#: Rows of one statement.
CHUNK = 500


@dataclass(frozen=True, slots=True)
class RenditionRow:
    """One rendition as the index knows it.

    Attributes
    ----------
    n_instances, n_left : int
        Those it was made of, and those of them that are still there.
    """

    pk: int
    key: str
    n_instances: int
    n_left: int
    created_us: int

    def is_broken(self, unfinished_before_us: int) -> bool:
        """Tell whether an instance has gone, or it never got finished."""
        if self.n_instances:
            return self.n_left != self.n_instances
        return self.created_us < unfinished_before_us


_ROWS = select(
    Rendition.id,
    Rendition.key,
    Rendition.n_instances,
    select(func.count())
    .where(InstanceRendition.rendition_pk == Rendition.id)
    .scalar_subquery(),
    Rendition.created_us,
)


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the frames of an instance are in a rendition."""

    key: str
    transfer_syntax_uid: str
    table_bytes: bytes


def begin(
    connection: Connection,
    *,
    key: str,
    tenant: str,
    series_uid: str,
    transfer_syntax_uid: str,
    now_us: int,
) -> int:
    """Note that a rendition is being made; return its row key."""
    result = connection.execute(
        insert(Rendition).returning(Rendition.id),
        {
            "key": key,
            "tenant": tenant,
            "series_instance_uid": series_uid,
            "transfer_syntax_uid": transfer_syntax_uid,
            "n_instances": 0,
            "size_bytes": 0,
            "created_us": now_us,
        },
    )
    return int(result.scalar_one())


def finish(
    connection: Connection,
    pk: int,
    tables: Mapping[int, tuple[bytes, bytes]],
    *,
    size: int,
    sha256: bytes,
) -> bool:
    """Note what a rendition holds; False when an instance has changed meanwhile.

    Parameters
    ----------
    tables : mapping of instance row key to (digest of the instance, frame table)
    """
    keys = list(tables)
    present = 0
    for start in range(0, len(keys), CHUNK):
        rows = connection.execute(
            select(Instance.id, Instance.digest).where(
                Instance.id.in_(keys[start : start + CHUNK])
            )
        )
        # The key of a deleted row may be given out again, to other content.
        present += sum(bytes(digest) == tables[found][0] for found, digest in rows)
    if present < len(keys):
        return False
    connection.execute(
        insert(InstanceRendition),
        [
            {"instance_pk": found, "rendition_pk": pk, "table_bytes": table}
            for found, (_, table) in tables.items()
        ],
    )
    connection.execute(
        update(Rendition)
        .where(Rendition.id == pk)
        .values(n_instances=len(keys), size_bytes=size, sha256=sha256)
    )
    return True


def find(connection: Connection, instance_pk: int) -> Kept | None:
    """Return where the frames of an instance are kept in another encoding."""
    row = connection.execute(
        select(
            Rendition.key, Rendition.transfer_syntax_uid, InstanceRendition.table_bytes
        )
        .join(Rendition, Rendition.id == InstanceRendition.rendition_pk)
        .where(InstanceRendition.instance_pk == instance_pk)
    ).first()
    return None if row is None else Kept(row[0], row[1], bytes(row[2]))


def without(connection: Connection, tenant: str, series_uid: str) -> set[int]:
    """Return the row keys of the instances of a series that have no rendition."""
    return set(
        connection.execute(
            select(Instance.id)
            .join(Series, Series.id == Instance.series_pk)
            .where(
                Series.tenant == tenant,
                Series.series_instance_uid == series_uid,
                ~exists().where(InstanceRendition.instance_pk == Instance.id),
            )
        ).scalars()
    )


def series_of(connection: Connection, tenant: str, study_pk: int) -> list[str]:
    """Return the series of a study with instances that have no rendition."""
    return list(
        connection.execute(
            select(Series.series_instance_uid)
            .join(Instance, Instance.series_pk == Series.id)
            .where(
                Series.tenant == tenant,
                Series.study_pk == study_pk,
                Instance.settled_version.is_not(None),
                ~exists().where(InstanceRendition.instance_pk == Instance.id),
            )
            .distinct()
        ).scalars()
    )


def series_deleted_from(
    connection: Connection, after_pk: int, limit: int
) -> tuple[set[tuple[str, str]], int]:
    """Return (tenant, series) of the deletions behind a row key, and the last key.

    Content that was replaced counts as deleted.
    """
    rows = connection.execute(
        select(Deletion.id, Deletion.tenant, Deletion.series_instance_uid)
        .where(Deletion.id > after_pk)
        .order_by(Deletion.id)
        .limit(limit)
    ).all()
    last = rows[-1][0] if rows else after_pk
    return {(row[1], row[2]) for row in rows}, int(last)


def of_series(
    connection: Connection, tenant: str, series_uid: str
) -> list[RenditionRow]:
    """Return the renditions of a series."""
    query = _ROWS.where(
        Rendition.tenant == tenant, Rendition.series_instance_uid == series_uid
    )
    return [RenditionRow(*row) for row in connection.execute(query)]


def after(connection: Connection, pk: int, limit: int) -> list[RenditionRow]:
    """Return a few renditions behind a row key, in order."""
    query = _ROWS.where(Rendition.id > pk).order_by(Rendition.id).limit(limit)
    return [RenditionRow(*row) for row in connection.execute(query)]


def detach(connection: Connection, pk: int) -> None:
    """Let nobody find frames in a rendition any more."""
    connection.execute(
        delete(InstanceRendition).where(InstanceRendition.rendition_pk == pk)
    )


def forget(connection: Connection, pk: int) -> None:
    """Remove the row of a rendition whose object is gone."""
    connection.execute(delete(Rendition).where(Rendition.id == pk))
