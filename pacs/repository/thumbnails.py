"""The pictures that stand for series and studies: keeping them, finding them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, insert, select

from pacs.repository.tables import Instance, Series, Study, Thumbnail
from storage.kernel.types import Actor

#: What a picture stands for.
SERIES: Final = 1
STUDY: Final = 2


@dataclass(frozen=True, slots=True)
class Made:
    """A picture to keep.

    Attributes
    ----------
    stands_for : int
        Sum of `SERIES` and `STUDY`.
    """

    series_pk: int
    instance_pk: int
    frame_number: int
    stands_for: int
    edition: str
    width: int
    height: int
    picture: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture that is kept, and of what it is.

    Attributes
    ----------
    instance_pk, series_uid, instance_uid, frame_number
        The caller looks the instance up for its actor, and sees that it is this one:
        the same UIDs can be another institution's.
    """

    instance_pk: int
    series_uid: str
    instance_uid: str
    frame_number: int
    width: int
    height: int
    picture: bytes


def revisions(
    connection: Connection, tenant: str, study_uid: str
) -> tuple[int, dict[int, int]] | None:
    """Return row key of a study, and the revision of each of its series."""
    rows = connection.execute(
        select(Study.id, Series.id, Series.revision)
        .join(Series, Series.study_pk == Study.id)
        .where(Study.tenant == tenant, Study.study_instance_uid == study_uid)
    ).all()
    if not rows:
        return None
    return rows[0][0], {series: revision for _, series, revision in rows}


def replace(
    connection: Connection,
    study_pk: int,
    seen: dict[int, int],
    made: Sequence[Made],
) -> None:
    """Keep the pictures of a study instead of those it had.

    Parameters
    ----------
    seen : dict of int to int
        Revision of each series when its picture was made. A picture of a series that
        has moved on is not kept, nor one whose instance is gone.
    """
    connection.execute(delete(Thumbnail).where(Thumbnail.study_pk == study_pk))
    query = select(Series.id, Series.revision).where(Series.study_pk == study_pk)
    now: dict[int, int] = dict(connection.execute(query).all())
    present = set(
        connection.execute(
            select(Instance.id).where(
                Instance.id.in_([one.instance_pk for one in made])
            )
        ).scalars()
    )
    rows = [
        {
            "study_pk": study_pk,
            "series_pk": one.series_pk,
            "instance_pk": one.instance_pk,
            "frame_number": one.frame_number,
            "stands_for": one.stands_for,
            "revision": seen[one.series_pk],
            "edition": one.edition,
            "width": one.width,
            "height": one.height,
            "picture": one.picture,
        }
        for one in made
        if now.get(one.series_pk) == seen.get(one.series_pk)
        and one.instance_pk in present
    ]
    if rows:
        connection.execute(insert(Thumbnail), rows)


def representative(
    connection: Connection,
    actor: Actor,
    study_uid: str,
    series_uid: str | None,
    edition: str,
) -> Kept | None:
    """Return the valid picture that stands for a study or series, if one is kept."""
    level = STUDY if series_uid is None else SERIES
    query = (
        select(
            Thumbnail.instance_pk,
            Series.series_instance_uid,
            Instance.sop_instance_uid,
            Thumbnail.frame_number,
            Thumbnail.width,
            Thumbnail.height,
            Thumbnail.picture,
        )
        .join(Instance, Instance.id == Thumbnail.instance_pk)
        .join(Series, Series.id == Thumbnail.series_pk)
        .join(Study, Study.id == Thumbnail.study_pk)
        .where(
            Study.tenant.in_(actor.tenants),
            Study.study_instance_uid == study_uid,
            Thumbnail.stands_for.bitwise_and(level) == level,
            Thumbnail.revision == Series.revision,
            Thumbnail.edition == edition,
        )
        .order_by(Study.tenant != actor.tenant)
        .limit(1)
    )
    if series_uid is not None:
        query = query.where(Series.series_instance_uid == series_uid)
    found = connection.execute(query).first()
    return None if found is None else Kept(*found)
