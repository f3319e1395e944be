"""The rows of packs: which records are alive in them, and when they may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from pacs.repository.tables import Deletion, Instance, Series
from storage.db.tables import Pack
from storage.packs.format import ALIGNMENT, TRAILER_LENGTH, Location
from storage.packs.seal import Wanted

#: Keys in one IN list; see `locate.CHUNK`.
CHUNK = 500


@dataclass(frozen=True, slots=True)
class Live:
    """The record of one indexed instance."""

    instance_pk: int
    tenant: str
    sop_instance_uid: str
    series_pk: int
    pack_pk: int
    location: Location
    dataset_offset: int
    digest: bytes

    def wanted(self) -> Wanted:
        return Wanted(self.location, self.dataset_offset, self.digest)


@dataclass(frozen=True, slots=True)
class PackRow:
    """One pack as the index knows it."""

    pk: int
    key: str
    tenant: str
    kind: str
    place: str
    node_id: str
    state: str
    size_bytes: int
    created_us: int


_LIVE: Any = (
    select(
        Instance.id,
        Instance.tenant,
        Instance.sop_instance_uid,
        Instance.series_pk,
        Instance.pack_pk,
        Pack.key,
        Instance.record_offset,
        Instance.object_offset,
        Instance.object_length,
        Instance.dataset_offset,
        Instance.digest,
    )
    .select_from(Instance)
    .join(Pack, Pack.id == Instance.pack_pk)
)

_PACK = select(
    Pack.id,
    Pack.key,
    Pack.tenant,
    Pack.kind,
    Pack.place,
    Pack.node_id,
    Pack.state,
    Pack.size_bytes,
    Pack.created_us,
)

_HAS_INSTANCES = exists().where(Instance.pack_pk == Pack.id)


def _live(rows: Iterable[Any]) -> list[Live]:
    return [
        Live(pk, tenant, uid, series, pack, Location(key, at, start, length), ds, dig)
        for pk, tenant, uid, series, pack, key, at, start, length, ds, dig in rows
    ]


def register_pack(
    connection: Connection,
    *,
    key: str,
    tenant: str,
    kind: str,
    node_id: str,
    now_us: int,
    place: str = "local",
) -> None:
    """Make the row of a pack that is being written, unless there is one."""
    module = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(
        module.insert(Pack)
        .values(
            key=key,
            tenant=tenant,
            kind=kind,
            place=place,
            node_id=node_id,
            state="open",
            size_bytes=0,
            created_us=now_us,
        )
        .on_conflict_do_nothing(index_elements=["key"])
    )


def find_pack(connection: Connection, key: str) -> PackRow | None:
    row = connection.execute(_PACK.where(Pack.key == key)).first()
    return None if row is None else PackRow(*row)


def close_pack(connection: Connection, key: str, size: int) -> bool:
    """Note that a pack no longer grows; False while it has no row."""
    done = connection.execute(
        update(Pack)
        .where(Pack.key == key, Pack.state == "open")
        .values(state="closed", size_bytes=size, delete_after_us=None)
    )
    return bool(done.rowcount) or find_pack(connection, key) is not None


def unsealed(
    connection: Connection, tenant: str, series_uid: str, node_id: str
) -> list[Live]:
    """Return a series' records in local packs of `node_id`, in presentation order."""
    query = (
        _LIVE.join(Series, Series.id == Instance.series_pk)
        .where(
            Series.tenant == tenant,
            Series.series_instance_uid == series_uid,
            Pack.kind != "sealed",
            Pack.place == "local",
            Pack.node_id == node_id,
        )
        .order_by(Instance.instance_number.nulls_last(), Instance.id)
    )
    return _live(connection.execute(query))


def series_to_seal(
    connection: Connection, tenant: str, study_pk: int, node_id: str
) -> list[str]:
    """Return the series of a study with records in local packs of `node_id`."""
    query = (
        select(Series.series_instance_uid)
        .join(Instance, Instance.series_pk == Series.id)
        .join(Pack, Pack.id == Instance.pack_pk)
        .where(
            Series.tenant == tenant,
            Series.study_pk == study_pk,
            Instance.settled_version.is_not(None),
            Pack.kind != "sealed",
            Pack.place == "local",
            Pack.node_id == node_id,
        )
        .distinct()
    )
    return list(connection.execute(query).scalars())


def live(connection: Connection, pack_pk: int) -> list[Live]:
    """Return the records of a pack that the index refers to, as they lie."""
    query = _LIVE.where(Instance.pack_pk == pack_pk).order_by(Instance.record_offset)
    return _live(connection.execute(query))


def swap(
    connection: Connection,
    key: str,
    moved: Sequence[tuple[Live, Location]],
    *,
    size: int,
    sha256: bytes,
) -> bool:
    """Point instances at their copies in the pack `key`, which is closed by it.

    Returns False, and then the caller rolls back, when one of them has moved or gone
    meanwhile: a pack never comes to hold what was deleted before it did.
    """
    closed = connection.execute(
        update(Pack)
        .where(Pack.key == key, Pack.state == "open")
        .values(state="closed", size_bytes=size, sha256=sha256)
        .returning(Pack.id)
    ).first()
    if closed is None:
        return False
    # Order matters: series before instances, as deletion does.
    series = sorted({one.series_pk for one, _ in moved})
    for start in range(0, len(series), CHUNK):
        connection.execute(
            select(Series.id)
            .where(Series.id.in_(series[start : start + CHUNK]))
            .order_by(Series.id)
            .with_for_update(key_share=True)
        ).all()
    if not moved:
        return True
    ordered = sorted(moved, key=lambda pair: pair[0].instance_pk)
    statement = (
        update(Instance)
        .where(
            Instance.id == bindparam("b_pk"),
            Instance.tenant == bindparam("b_tenant"),
            Instance.sop_instance_uid == bindparam("b_uid"),
            Instance.pack_pk == bindparam("b_pack"),
            Instance.record_offset == bindparam("b_record"),
        )
        .values(
            pack_pk=closed[0],
            record_offset=bindparam("b_to_record"),
            object_offset=bindparam("b_to_object"),
        )
        .execution_options(synchronize_session=False)
    )
    done = connection.execute(
        statement,
        [
            {
                "b_pk": one.instance_pk,
                "b_tenant": one.tenant,
                "b_uid": one.sop_instance_uid,
                "b_pack": one.pack_pk,
                "b_record": one.location.record_offset,
                "b_to_record": to.record_offset,
                "b_to_object": to.object_offset,
            }
            for one, to in ordered
        ],
    )
    return done.rowcount == len(moved)


def note_sealed(
    connection: Connection, tenant: str, series_uid: str, version: int
) -> None:
    connection.execute(
        update(Series)
        .where(
            Series.tenant == tenant,
            Series.series_instance_uid == series_uid,
            Series.sealed_version < version,
        )
        .values(sealed_version=version)
    )


def forget_pack(connection: Connection, key: str) -> bool:
    """Delete the row of a pack that is gone; False while instances refer to it."""
    pk = connection.execute(
        select(Pack.id).where(Pack.key == key).with_for_update()
    ).scalar_one_or_none()
    if pk is None:
        return True
    if connection.scalar(select(exists().where(Instance.pack_pk == pk))):
        return False
    connection.execute(delete(Pack).where(Pack.id == pk))
    return True


def retire(connection: Connection, key: str, delete_after_us: int) -> bool:
    """Let a closed pack without live records go after a while.

    The row is held against inserts that refer to it, so that none can slip in
    between the look and the change.
    """
    pk = connection.execute(
        select(Pack.id).where(Pack.key == key, Pack.state == "closed").with_for_update()
    ).scalar_one_or_none()
    if pk is None or connection.scalar(select(exists().where(Instance.pack_pk == pk))):
        return False
    connection.execute(
        update(Pack)
        .where(Pack.id == pk)
        .values(state="retired", delete_after_us=delete_after_us)
    )
    return True


def revive(connection: Connection, key: str) -> None:
    """Take back a retirement: the pack has live records after all."""
    connection.execute(
        update(Pack)
        .where(Pack.key == key, Pack.state == "retired")
        .values(state="closed", delete_after_us=None)
    )


def empty_packs(
    connection: Connection, node_id: str, after_pk: int, limit: int
) -> tuple[list[PackRow], int]:
    """Look at `limit` closed local packs from `after_pk` on; return the empty ones.

    The number is where to go on; 0 begins again.
    """
    seen = list(
        connection.execute(
            select(Pack.id)
            .where(
                Pack.id > after_pk,
                Pack.state == "closed",
                Pack.place == "local",
                Pack.node_id == node_id,
            )
            .order_by(Pack.id)
            .limit(limit)
        ).scalars()
    )
    if not seen:
        return [], 0
    rows = connection.execute(_PACK.where(Pack.id.in_(seen), ~_HAS_INSTANCES))
    following = seen[-1] if len(seen) == limit else 0
    return [PackRow(*row) for row in rows], following


def to_unlink(
    connection: Connection, node_id: str, now_us: int, limit: int
) -> list[PackRow]:
    """Return retired packs whose time has come and that this node can remove."""
    query = (
        _PACK.where(
            Pack.state == "retired",
            Pack.delete_after_us <= now_us,
            or_(Pack.place == "object", Pack.node_id == node_id),
        )
        .order_by(Pack.delete_after_us)
        .limit(limit)
    )
    return [PackRow(*row) for row in connection.execute(query)]


def abandoned(connection: Connection, before_us: int, limit: int) -> list[PackRow]:
    """Return packs of the object store whose making was never finished."""
    query = (
        _PACK.where(
            Pack.state == "open",
            Pack.place == "object",
            Pack.created_us < before_us,
            ~_HAS_INSTANCES,
        )
        .order_by(Pack.id)
        .limit(limit)
    )
    return [PackRow(*row) for row in connection.execute(query)]


def due_tenants(connection: Connection, now_us: int) -> list[tuple[str, int]]:
    """Return tenants with bytes to erase now, each with its last such deletion.

    Deleted bytes are due at half their time, so that deletions share a rewrite.
    Replaced content is kept until its time is over, unless its pack is rewritten for
    the sake of something else before.
    """
    half = Deletion.deleted_us + (Deletion.deadline_us - Deletion.deleted_us) // 2
    due = case(
        (Deletion.reason == "replaced", Deletion.deadline_us <= now_us),
        else_=half <= now_us,
    )
    query = (
        select(Deletion.tenant, func.max(Deletion.deleted_us))
        .where(Deletion.erased_us.is_(None), due)
        .group_by(Deletion.tenant)
        .order_by(Deletion.tenant)
    )
    return [(str(row[0]), int(row[1])) for row in connection.execute(query)]


def holding(connection: Connection, tenant: str, until_us: int) -> list[PackRow]:
    """Return packs that may hold what `tenant` deleted until then, oldest first.

    A sealed pack holds what deletions name there; a local pack may also hold what was
    sealed out of it, and copies that lost a race.
    """
    named = exists().where(
        Deletion.pack_key == Pack.key,
        Deletion.erased_us.is_(None),
        Deletion.deleted_us <= until_us,
    )
    query = _PACK.where(
        Pack.tenant == tenant,
        Pack.created_us <= until_us,
        or_(Pack.place == "local", Pack.state == "retired", named),
    ).order_by(Pack.created_us, Pack.id)
    return [PackRow(*row) for row in connection.execute(query)]


def is_named(connection: Connection, key: str, until_us: int) -> bool:
    """Tell whether a deletion that waits for erasure names the pack."""
    query = select(
        exists().where(
            Deletion.pack_key == key,
            Deletion.erased_us.is_(None),
            Deletion.deleted_us <= until_us,
        )
    )
    return bool(connection.scalar(query))


def live_bytes(connection: Connection, pack_pk: int) -> int:
    """Return the length of all records of a pack that the index refers to."""
    bare = (
        Instance.object_offset
        - Instance.record_offset
        + Instance.object_length
        + TRAILER_LENGTH
    )
    whole = (bare + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    found = connection.scalar(
        select(func.sum(whole)).where(Instance.pack_pk == pack_pk)
    )
    return int(found or 0)


def ask_to_close(connection: Connection, keys: Sequence[str], now_us: int) -> None:
    """Ask the processes that append to these packs to go on in new ones."""
    connection.execute(
        update(Pack)
        .where(Pack.key.in_(keys), Pack.state == "open")
        .values(delete_after_us=now_us)
    )


def asked_to_close(connection: Connection, keys: Sequence[str]) -> list[str]:
    query = select(Pack.key).where(
        Pack.key.in_(keys), Pack.state == "open", Pack.delete_after_us.is_not(None)
    )
    return list(connection.execute(query).scalars())


def note_erased(
    connection: Connection, tenant: str, before_us: int, now_us: int
) -> int:
    """Note that bytes deleted before `before_us` are gone, where no pack has them."""
    done = connection.execute(
        update(Deletion)
        .where(
            Deletion.tenant == tenant,
            Deletion.erased_us.is_(None),
            Deletion.deleted_us < before_us,
            ~exists().where(Pack.key == Deletion.pack_key),
        )
        .values(erased_us=now_us)
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount)


@dataclass(frozen=True, slots=True)
class Buried:
    """What the index knows of deletions of one content."""

    until_us: int
    erased: bool


def _of_instances(tenant: str, uids: Sequence[str]) -> ColumnElement[bool]:
    return and_(Instance.tenant == tenant, Instance.sop_instance_uid.in_(uids))


def indexed(connection: Connection, tenant: str, uids: Sequence[str]) -> set[str]:
    """Return which of these instances are indexed, wherever their bytes are."""
    found: set[str] = set()
    for start in range(0, len(uids), CHUNK):
        which = _of_instances(tenant, uids[start : start + CHUNK])
        found.update(
            connection.execute(select(Instance.sop_instance_uid).where(which)).scalars()
        )
    return found


def buried(
    connection: Connection, tenant: str, uids: Sequence[str]
) -> dict[tuple[str, bytes], Buried]:
    """Return the deletions of these instances, by UID and digest."""
    found: dict[tuple[str, bytes], Buried] = {}
    for start in range(0, len(uids), CHUNK):
        query = (
            select(
                Deletion.sop_instance_uid,
                Deletion.digest,
                func.max(Deletion.deleted_us),
                func.count(Deletion.erased_us) == func.count(),
            )
            .where(
                Deletion.tenant == tenant,
                Deletion.sop_instance_uid.in_(uids[start : start + CHUNK]),
            )
            .group_by(Deletion.sop_instance_uid, Deletion.digest)
        )
        for uid, digest, until_us, erased in connection.execute(query):
            found[uid, bytes(digest)] = Buried(int(until_us), bool(erased))
    return found
