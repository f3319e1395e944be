"""Small pictures: made when a study settles, kept with its rows, made on demand else.

One is kept for each series, and one for the study (a key image, or the middle of the
largest series), so their number is bounded by that of the series; they go with the
instance they show. A study list shows them with one short read each.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pacs.domain.study import StoredInstance
from pacs.rendering.parameters import JPEG, Viewport, Wanted
from pacs.repository import thumbnails as rows
from pacs.services.rendering import Rendered, RenderService
from pacs.services.retrieve import RetrieveService
from pacs.services.settling import SETTLED
from storage.db.engine import Database
from storage.kernel.errors import ImagingError, NotFound
from storage.kernel.types import Actor, Role, TenantId
from storage.outbox import Event

log = logging.getLogger(__name__)

#: Longer side of a thumbnail, pixels, when a client does not say.
DEFAULT_SIZE: Final = 256
QUALITY: Final = 80
#: Changes with how thumbnails are made: kept ones of another edition are not used.
EDITION: Final = f"1-{DEFAULT_SIZE}-{QUALITY}"
#: Series of one study that get a picture; those beyond have theirs made on demand.
MAX_SERIES: Final = 200

#: What the follower listens to.
KINDS: Final = frozenset({SETTLED})
FOLLOWER: Final = "thumbnails"


@dataclass(frozen=True, slots=True)
class Representative:
    """The frame that stands for a study or series.

    Attributes
    ----------
    kept : Rendered or None
        Its picture as `ThumbnailService.wanted` has it, when one is kept.
    """

    instance: StoredInstance
    frame_number: int
    kept: Rendered | None = None


class ThumbnailService:
    """Make, keep and find thumbnails.

    Parameters
    ----------
    database : Database
    retrieve : RetrieveService
    render : RenderService
    """

    def __init__(
        self, *, database: Database, retrieve: RetrieveService, render: RenderService
    ) -> None:
        self._database = database
        self._retrieve = retrieve
        self._render = render

    @staticmethod
    def wanted(width: int = DEFAULT_SIZE, height: int = DEFAULT_SIZE) -> Wanted:
        """Return how a thumbnail is wanted that fits into a size."""
        return Wanted(
            JPEG, quality=QUALITY, viewport=Viewport(width, height), overlays=False
        )

    def representative(
        self, actor: Actor, study_uid: str, series_uid: str | None = None
    ) -> Representative:
        """Return what stands for a study or series.

        Raises
        ------
        NotFound
        Unsupported
            There is no image in it.
        """
        with self._database.read() as connection:
            kept = rows.representative(
                connection, actor, study_uid, series_uid, EDITION
            )
        if kept is not None:
            found: StoredInstance | None
            try:
                found = self._retrieve.instance(
                    actor, study_uid, kept.series_uid, kept.instance_uid
                )
            except NotFound:
                # Deleted just now, or beyond the actor's scope.
                found = None
            if found is not None and found.pk == kept.instance_pk:
                made = Rendered(JPEG, kept.picture, kept.width, kept.height)
                return Representative(found, kept.frame_number, made)
        every = self._retrieve.instances(actor, study_uid, series_uid)
        return Representative(*self._render.representative(actor, every))

    def follow(self, event: Event) -> None:
        """Make the pictures of a settled study; the follower's handler."""
        self.prepare(str(event.payload["study"]), event.tenant)

    def prepare(self, study_uid: str, tenant: str) -> int:
        """Make and keep the pictures of a study; return how many.

        What cannot be rendered has none: whoever asks for it is told why.
        """
        actor = Actor(TenantId(tenant), FOLLOWER, roles=frozenset({Role.SYSTEM}))
        with self._database.read() as connection:
            state = rows.revisions(connection, tenant, study_uid)
        if state is None:
            return 0
        study_pk, seen = state
        try:
            every = self._retrieve.instances(actor, study_uid)
        except NotFound:
            return 0
        made = self._made(actor, every)
        with self._database.write() as connection:
            rows.replace(connection, study_pk, seen, made)
        return len(made)

    def _made(self, actor: Actor, every: Sequence[StoredInstance]) -> list[rows.Made]:
        by_series: dict[int, list[StoredInstance]] = {}
        for instance in every:
            by_series.setdefault(instance.series_pk, []).append(instance)
        chosen: dict[tuple[int, int], tuple[StoredInstance, int]] = {}
        series = list(by_series.values())[:MAX_SERIES]
        groups = [(rows.STUDY, every), *((rows.SERIES, one) for one in series)]
        for level, group in groups:
            try:
                instance, number = self._render.representative(actor, group)
            except ImagingError:
                continue
            key = (instance.pk, number)
            stands_for = chosen[key][1] if key in chosen else 0
            chosen[key] = (instance, stands_for | level)
        made = []
        for (_, number), (instance, stands_for) in chosen.items():
            one = self._one(instance, number, stands_for)
            if one is not None:
                made.append(one)
        return made

    def _one(
        self, instance: StoredInstance, number: int, stands_for: int
    ) -> rows.Made | None:
        wanted = self.wanted()
        try:
            drawn = self._render.picture(instance, [number], wanted)
        except ImagingError as error:
            log.info(
                "no thumbnail: %s",
                error,
                extra={
                    "event": "thumbnail.none",
                    "instance": instance.sop_instance_uid,
                    "code": error.code,
                },
            )
            return None
        return rows.Made(
            instance.series_pk,
            instance.pk,
            number,
            stands_for,
            EDITION,
            drawn.width,
            drawn.height,
            drawn.body,
        )
