"""The index rows of a study that settles, shrinks or goes.

Every writer that touches several levels of one study locks them in the order of
ingest (series, then study, then patient), so that PostgreSQL seldom has to resolve a
deadlock; settling only takes the study and leaves alone what others hold.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from pacs.domain.study import FLAG_OWN
from pacs.repository.tables import Deletion, Instance, Patient, Series, Study
from storage.db.tables import Pack
from storage.kernel.errors import LostRace

#: Keys in one IN list; see `locate.CHUNK`.
CHUNK = 500


@dataclass(frozen=True, slots=True)
class LockedStudy:
    """A study whose row this transaction holds."""

    pk: int
    tenant: str
    uid: str
    version: int
    settle_due_us: int | None


@dataclass(frozen=True, slots=True)
class Listed:
    """Some UIDs, and how many there are in all."""

    uids: list[str]
    count: int


def due_studies(connection: Connection, now_us: int, limit: int) -> list[int]:
    """Return studies whose pause is over, longest waiting first."""
    query = (
        select(Study.id)
        .where(Study.settle_due_us <= now_us)
        .order_by(Study.settle_due_us)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())


def find_study(connection: Connection, tenant: str, study_uid: str) -> int | None:
    return connection.execute(
        select(Study.id).where(
            Study.tenant == tenant, Study.study_instance_uid == study_uid
        )
    ).scalar_one_or_none()


def lock_study(
    connection: Connection, study_pk: int, *, to_delete: bool = False
) -> LockedStudy | None:
    """Take the study's row for this transaction; None when it is gone.

    Series may still be added to it unless it is locked `to_delete`.
    """
    row = connection.execute(
        select(
            Study.id,
            Study.tenant,
            Study.study_instance_uid,
            Study.version,
            Study.settle_due_us,
        )
        .where(Study.id == study_pk)
        .with_for_update(key_share=not to_delete)
    ).first()
    return None if row is None else LockedStudy(*row)


def next_version(connection: Connection, study: LockedStudy) -> int:
    """Return the version the next settle reports.

    A study that was deleted and stored again goes on where the old one ended.
    """
    if study.version:
        return study.version + 1
    reported = connection.scalar(
        select(func.max(Deletion.reported_version)).where(
            Deletion.tenant == study.tenant, Deletion.study_instance_uid == study.uid
        )
    )
    return int(reported or 0) + 1


def _in_study(study_pk: int) -> ColumnElement[bool]:
    return Instance.series_pk.in_(select(Series.id).where(Series.study_pk == study_pk))


def mark_settled(
    connection: Connection, study_pk: int, version: int, limit: int
) -> int:
    """Give up to `limit` unreported instances their version; return how many.

    Rows that another transaction is about to replace are skipped.
    """
    chosen = (
        select(Instance.id)
        .where(_in_study(study_pk), Instance.settled_version.is_(None))
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    )
    done = connection.execute(
        update(Instance)
        .where(Instance.id.in_(chosen))
        .values(settled_version=version)
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount)


def has_unsettled(connection: Connection, study_pk: int) -> bool:
    query = select(
        exists().where(_in_study(study_pk), Instance.settled_version.is_(None))
    )
    return bool(connection.scalar(query))


def report_removed(connection: Connection, study: LockedStudy, version: int) -> int:
    """Give removals that no settle has named their version; return how many."""
    done = connection.execute(
        update(Deletion)
        .where(
            Deletion.tenant == study.tenant,
            Deletion.study_instance_uid == study.uid,
            Deletion.reported_version.is_(None),
        )
        .values(reported_version=version)
    )
    return int(done.rowcount)


def added(
    connection: Connection,
    study_pk: int,
    version: int,
    limit: int,
    *,
    after: str = "",
    own: bool = False,
) -> list[str]:
    """Return instances that `version` added, by UID, after `after`."""
    query = (
        select(Instance.sop_instance_uid)
        .where(
            _in_study(study_pk),
            Instance.settled_version == version,
            Instance.sop_instance_uid > after,
        )
        .order_by(Instance.sop_instance_uid)
        .limit(limit)
    )
    if own:
        query = query.where(Instance.flags.bitwise_and(FLAG_OWN) != 0)
    return list(connection.execute(query).scalars())


def count_added(connection: Connection, study_pk: int, version: int) -> tuple[int, int]:
    """Return how many instances `version` added, and how many of them we made."""
    own = case((Instance.flags.bitwise_and(FLAG_OWN) != 0, 1), else_=0)
    row = connection.execute(
        select(func.count(), func.coalesce(func.sum(own), 0)).where(
            _in_study(study_pk), Instance.settled_version == version
        )
    ).one()
    return int(row[0]), int(row[1])


def removed(
    connection: Connection,
    tenant: str,
    study_uid: str,
    version: int,
    limit: int,
    *,
    after: str = "",
) -> list[str]:
    """Return instances that `version` removed, by UID, after `after`."""
    query = (
        select(Deletion.sop_instance_uid)
        .where(
            Deletion.tenant == tenant,
            Deletion.study_instance_uid == study_uid,
            Deletion.reported_version == version,
            Deletion.sop_instance_uid > after,
        )
        .distinct()
        .order_by(Deletion.sop_instance_uid)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())


def has_deletions(connection: Connection, study: LockedStudy) -> bool:
    query = select(
        exists().where(
            Deletion.tenant == study.tenant, Deletion.study_instance_uid == study.uid
        )
    )
    return bool(connection.scalar(query))


def settled(connection: Connection, study_pk: int, version: int) -> None:
    """Note that the study has settled as `version`."""
    connection.execute(
        update(Study)
        .where(Study.id == study_pk)
        .values(version=version, settle_due_us=None)
    )


def relist(connection: Connection, study_pk: int) -> None:
    """Set Modalities and SOP Classes in Study to what the study holds now."""
    modalities = connection.execute(
        select(Series.modality).where(Series.study_pk == study_pk).distinct()
    ).scalars()
    classes = connection.execute(
        select(Instance.sop_class_uid).where(_in_study(study_pk)).distinct()
    ).scalars()
    connection.execute(
        update(Study)
        .where(Study.id == study_pk)
        .values(
            modalities="\\".join(sorted(filter(None, modalities))),
            sop_classes="\\".join(sorted(filter(None, classes))),
        )
    )


@dataclass(frozen=True, slots=True)
class Target:
    """What a deletion takes away, all of it locked.

    `series_pks` are the series that lose instances.
    """

    study: LockedStudy
    series_pks: tuple[int, ...]
    instance_uid: str | None

    def covers(self) -> ColumnElement[bool]:
        """Select the instances that go."""
        wanted = Instance.series_pk.in_(self.series_pks)
        if self.instance_uid is None:
            return wanted
        return and_(wanted, Instance.sop_instance_uid == self.instance_uid)


@dataclass(frozen=True, slots=True)
class Doomed:
    """One instance that goes, as its tombstone names it."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    digest: bytes
    received_us: int


def lock_target(
    connection: Connection,
    tenant: str,
    study_uid: str,
    series_uid: str | None,
    instance_uid: str | None,
) -> Target | None:
    """Lock what the UIDs name together in `tenant`; None when that is nothing.

    Raises
    ------
    LostRace
        The study grew a series meanwhile.
    """
    study_pk = find_study(connection, tenant, study_uid)
    if study_pk is None:
        return None
    wanted = select(Series.id).where(Series.study_pk == study_pk)
    if series_uid is not None:
        wanted = wanted.where(Series.series_instance_uid == series_uid)
    if instance_uid is not None:
        wanted = wanted.join(Instance, Instance.series_pk == Series.id).where(
            Instance.sop_instance_uid == instance_uid
        )
    series_pks = tuple(sorted(connection.execute(wanted).scalars()))
    # Order matters: series before study, as ingest does.
    for start in range(0, len(series_pks), CHUNK):
        connection.execute(
            select(Series.id)
            .where(Series.id.in_(series_pks[start : start + CHUNK]))
            .order_by(Series.id)
            .with_for_update()
        ).all()
    study = lock_study(connection, study_pk, to_delete=True)
    if study is None or not series_pks:
        return None
    if tuple(sorted(connection.execute(wanted).scalars())) != series_pks:
        raise LostRace("the study changed while it was being deleted")
    return Target(study, series_pks, instance_uid)


def doomed(connection: Connection, target: Target) -> list[Doomed]:
    query = select(
        Instance.sop_instance_uid,
        Instance.sop_class_uid,
        Instance.transfer_syntax_uid,
        Instance.digest,
        Instance.received_us,
    ).where(target.covers())
    return [Doomed(*row) for row in connection.execute(query)]


def record_deletions(
    connection: Connection,
    target: Target,
    *,
    actor: str,
    reason: str,
    deleted_us: int,
    deadline_us: int,
) -> None:
    """Write the row state of what goes; `reported_version` 0 was never reported."""
    study = target.study
    unreported = or_(
        Instance.settled_version.is_(None), Instance.settled_version > study.version
    )
    source = (
        select(
            Instance.tenant,
            literal(study.uid),
            Series.series_instance_uid,
            Instance.sop_instance_uid,
            Instance.digest,
            Pack.key,
            Instance.record_offset,
            literal(actor),
            literal(reason),
            literal(deleted_us, Deletion.deleted_us.type),
            literal(deadline_us, Deletion.deadline_us.type),
            case((unreported, 0)),
        )
        .select_from(Instance)
        .join(Series, Series.id == Instance.series_pk)
        .join(Pack, Pack.id == Instance.pack_pk)
        .where(target.covers())
    )
    connection.execute(
        insert(Deletion).from_select(
            [
                "tenant",
                "study_instance_uid",
                "series_instance_uid",
                "sop_instance_uid",
                "digest",
                "pack_key",
                "record_offset",
                "actor",
                "reason",
                "deleted_us",
                "deadline_us",
                "reported_version",
            ],
            source,
        )
    )


def remove(
    connection: Connection, target: Target, *, now_us: int, settle_due_us: int
) -> int:
    """Delete the instances and what they leave empty; count the rest anew.

    Returns
    -------
    int
        Instances that remain in the study.
    """
    study_pk = target.study.pk
    connection.execute(delete(Instance).where(target.covers()))
    for series_pk in target.series_pks:
        _recount_series(connection, series_pk, now_us)
    count, size = _sums(connection, _in_study(study_pk))
    if not count:
        connection.execute(delete(Series).where(Series.study_pk == study_pk))
        _remove_study(connection, study_pk)
        return 0
    n_series = connection.scalar(
        select(func.count()).select_from(Series).where(Series.study_pk == study_pk)
    )
    connection.execute(
        update(Study)
        .where(Study.id == study_pk)
        .values(
            n_series=n_series,
            n_instances=count,
            size_bytes=size,
            settle_due_us=settle_due_us,
            updated_us=now_us,
        )
    )
    relist(connection, study_pk)
    return count


def _sums(connection: Connection, which: ColumnElement[bool]) -> tuple[int, int]:
    row = connection.execute(
        select(func.count(), func.coalesce(func.sum(Instance.object_length), 0)).where(
            which
        )
    ).one()
    return int(row[0]), int(row[1])


def _recount_series(connection: Connection, series_pk: int, now_us: int) -> None:
    count, size = _sums(connection, Instance.series_pk == series_pk)
    if not count:
        connection.execute(delete(Series).where(Series.id == series_pk))
        return
    connection.execute(
        update(Series)
        .where(Series.id == series_pk)
        .values(
            n_instances=count,
            size_bytes=size,
            revision=Series.revision + 1,
            updated_us=now_us,
        )
    )


def _remove_study(connection: Connection, study_pk: int) -> None:
    patient_pk = connection.scalar(select(Study.patient_pk).where(Study.id == study_pk))
    connection.execute(delete(Study).where(Study.id == study_pk))
    # Order matters: only once the row is held does the next statement see the
    # studies of transactions that have just ended.
    connection.execute(
        select(Patient.id).where(Patient.id == patient_pk).with_for_update()
    ).first()
    connection.execute(
        delete(Patient).where(
            Patient.id == patient_pk,
            ~exists().where(Study.patient_pk == Patient.id),
        )
    )
