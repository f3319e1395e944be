"""The page over a real index, served on a port of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from PIL import Image

from gateway import pages
from pacs.services.policy import AccessPolicy
from pacs.services.query import QueryService
from pacs.web import dependencies, search
from storage import activity, outbox
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.limits import Limits
from storage.kernel.types import Actor, Role, TenantId
from storage.outbox import ChangeFeed, NewEvent, Relay
from tests.support.dicomweb import NoPeers, application, serving
from tests.support.populated import Made, populate
from viewer import app as page
from viewer.activity import ArchiveActivity

ACTOR = Actor(TenantId("default"), "test", roles=frozenset({Role.OPEN}))
MINUTE_US = 60_000_000


@dataclass(frozen=True, slots=True)
class Site:
    """A served page and the index behind it."""

    url: str
    database: Database

    def arrive(self, *minutes_ago: tuple[int, int]) -> None:
        """Let images arrive: (how many, how many minutes ago)."""
        now_us = SystemClock().now_us()
        for count, minutes in minutes_ago:
            events = [
                NewEvent("default", "instance.stored", f"{n}", {"bytes": 524_288})
                for n in range(count)
            ]
            with self.database.write() as connection:
                outbox.append_many(connection, events, now_us - minutes * MINUTE_US)
        while Relay(self.database).tick():
            pass
        feed = ChangeFeed(self.database)
        while feed.follow_batch(activity.FOLLOWER, activity.count):
            pass


#: What a node with identity and objects answers; here is an index alone.
beside = APIRouter()


@beside.get("/api/v1/me")
def read_me() -> dict[str, object]:
    return {"kind": "open", "name": "open", "may": ["find", "measure"]}


@beside.get("/dicom-web/studies/{study}/thumbnail")
def read_thumbnail(study: str) -> Response:
    """Return a picture as wide as the UID is long."""
    made = io.BytesIO()
    Image.new("L", (len(study), 8), 128).save(made, "JPEG")
    return Response(made.getvalue(), media_type="image/jpeg")


def _over(database: Database) -> FastAPI:
    policy = AccessPolicy(our_aes={}, peers=NoPeers(), open_access=True)
    query = QueryService(database=database, limits=Limits())
    directory = pages.StudyDirectory(query)
    source = ArchiveActivity(
        activity.ActivityReader(database, SystemClock()), partial(pages.sums, database)
    )
    return application(
        [("", page.router), ("/dicom-web", search.router), ("", beside)],
        {
            page.current_actor: lambda: ACTOR,
            page.study_directory: lambda: directory,
            page.activity_source: lambda: source,
            page.node_card: lambda: page.NodeCard("HUYING", 11112, "0.1.0"),
            dependencies.current_actor: lambda: ACTOR,
            dependencies.access_policy: lambda: policy,
            dependencies.base_url: dependencies.BaseUrl,
            search.query_service: lambda: query,
        },
    )


@contextmanager
def served(folder: Path, studies: Sequence[Made] = ()) -> Iterator[Site]:
    """Serve the page over an index that holds `studies`."""
    url = f"sqlite:///{folder / 'index.db'}"
    migrate.upgrade(url)
    database = Database(url)
    if studies:
        populate(database, list(studies))
    try:
        with serving(_over(database)) as address:
            yield Site(address, database)
    finally:
        database.close()
