"""``/api/v1/viewer``: what a viewer needs beside DICOMweb; nothing here writes.

`docs/viewer-endpoints.md` describes each answer.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from storage.kernel.errors import InvalidParameter, NotFound, Unavailable
from storage.kernel.types import Actor
from viewer import framing, likely
from viewer.http import (
    IMMUTABLE,
    REVALIDATE,
    Policy,
    StoredRoute,
    digest,
    named,
    read_json,
    send_json,
    unchanged,
)
from viewer.sources import (
    Caller,
    Form,
    FrameSource,
    OverlaySource,
    Picture,
    PixelSource,
    PlaneView,
    SeriesFacts,
    SeriesRef,
    StudyCatalogue,
    StudyFacts,
    Warmer,
)
from viewer.views import RenderBody, parse

PREFIX = "/api/v1/viewer"
router = APIRouter(prefix=PREFIX, tags=["viewer"], route_class=StoredRoute)

UID = r"^[0-9A-Za-z._-]{1,64}$"
PathUid = Annotated[str, Path(pattern=UID)]
#: In the address, not in a body: what is looked at belongs into every record of it.
QueryUid = Annotated[str, Query(pattern=UID)]
#: Transfer syntaxes that Accept can name.
FORMS: dict[str, Form] = {
    "1.2.840.10008.1.2.1": "raw",
    "1.2.840.10008.1.2.4.201": "htj2k",
    "1.2.840.10008.1.2.4.202": "htj2k",
}
#: Pictures under way wait in threads of their own: all other routes keep theirs.
ROOM = CapacityLimiter(8)
#: More are told to come back.
MAX_WAITING = 32


async def current_actor() -> Actor:
    """Return who asks. The application replaces this dependency."""
    raise NotImplementedError


async def access_policy() -> Policy:
    """Return who may do what. The application replaces this dependency."""
    raise NotImplementedError


async def study_catalogue() -> StudyCatalogue:
    """Return what knows studies. The application replaces this dependency."""
    raise NotImplementedError


async def frame_source() -> FrameSource:
    """Return what reads frames. The application replaces this dependency."""
    raise NotImplementedError


async def pixel_source() -> PixelSource:
    """Return what draws volumes. The application replaces this dependency."""
    raise NotImplementedError


async def overlay_source() -> OverlaySource:
    """Return what gives overlays. The application replaces this dependency."""
    raise NotImplementedError


async def warmer() -> Warmer:
    """Return what reads ahead. The application replaces this dependency."""
    raise NotImplementedError


Asking = Annotated[Actor, Depends(current_actor)]
Deciding = Annotated[Policy, Depends(access_policy)]
Catalogue = Annotated[StudyCatalogue, Depends(study_catalogue)]
Frames = Annotated[FrameSource, Depends(frame_source)]
Pixels = Annotated[PixelSource, Depends(pixel_source)]
Overlays = Annotated[OverlaySource, Depends(overlay_source)]
Warming = Annotated[Warmer, Depends(warmer)]


@router.get("/manifest/{study}")
def read_manifest(
    request: Request,
    actor: Asking,
    policy: Deciding,
    catalogue: Catalogue,
    study: PathUid,
) -> Response:
    """Return everything a viewer needs before the first image, in one answer."""
    policy.require(actor, "find")
    body = orjson.dumps(_manifest(catalogue.facts(actor, study)))
    return send_json(request, body, digest(body))


def _manifest(facts: StudyFacts) -> dict[str, Any]:
    base = f"/dicom-web/studies/{facts.study}"
    return {
        "study": facts.study,
        "date": facts.date,
        "time": facts.time,
        "description": facts.description,
        "accession": facts.accession,
        "patient": {
            "id": facts.patient_id,
            "name": facts.patient_name,
            "birth_date": facts.birth_date,
            "sex": facts.sex,
        },
        "modalities": facts.modalities,
        "thumbnail": f"{base}/thumbnail",
        "series": [_series(facts.study, one) for one in facts.series],
        "has": {
            kind: any(one.kind == kind for one in facts.series)
            for kind in ("seg", "sr", "pr", "rtstruct")
        },
        "overlays": f"{PREFIX}/overlays/{facts.study}",
        "key_objects": facts.key_objects,
        "priors": [
            {
                **{name: getattr(one, name) for name in one.__slots__},
                "manifest": f"{PREFIX}/manifest/{one.study}",
            }
            for one in facts.priors
        ],
    }


def _series(study: str, facts: SeriesFacts) -> dict[str, Any]:
    base = f"/dicom-web/studies/{study}/series/{facts.series}"
    found = {name: getattr(facts, name) for name in facts.__slots__}
    if facts.volume is not None:
        del found["not_a_volume"]
    links = {"metadata": f"{base}/metadata"}
    if facts.first is not None:
        links["thumbnail"] = f"{base}/thumbnail"
        links["frames"] = f"{PREFIX}/series/{facts.series}/frames.bin"
    return {**found, **links}


@router.get("/series/{series}/volume")
def read_volume(
    request: Request,
    actor: Asking,
    policy: Deciding,
    pixels: Pixels,
    series: PathUid,
    study: QueryUid,
    stack: Annotated[int, Query(ge=0, le=10_000)] = 0,
) -> Response:
    """Return what a series is as a volume."""
    policy.require(actor, "find")
    body = orjson.dumps(pixels.volume(actor, SeriesRef(study, series, stack)))
    return send_json(request, body, digest(body))


@router.get("/series/{series}/frames.bin")
def read_frames(
    request: Request,
    actor: Asking,
    policy: Deciding,
    source: Frames,
    series: PathUid,
    order: Literal["middle-out", "ascending"] = "middle-out",
    form: Form | None = None,
    level: Annotated[int, Query(ge=0, le=5)] = 0,
    start: Annotated[int, Query(alias="from", ge=0, lt=2**31)] = 0,
    v: Annotated[str, Query(max_length=64)] = "",
    study: Annotated[str | None, Query(pattern=UID)] = None,
) -> Response:
    """Return the frames of a series in one stream (`viewer.framing`)."""
    policy.require(actor, "get")
    wanted = form or _accepted(request)
    found = source.frames(actor, series, form=wanted, order=order, level=level)
    if study not in {None, found.study}:
        # The record of this access names it.
        raise NotFound("no such series in this study")
    if start > len(found.places):
        raise InvalidParameter("from", f"there are {len(found.places)} frames")
    etag = f"{found.version}-{start}"
    # A series may grow: for good is only what is asked for by its version.
    headers = named(etag, IMMUTABLE if v == found.version else REVALIDATE)
    headers["X-Frames-Version"] = found.version
    if unchanged(request, etag):
        return Response(status_code=304, headers=headers)
    beginning = framing.head(found, form=wanted, order=order, level=level, start=start)
    length = framing.total_length(found, beginning, start)
    if length is not None:
        headers["Content-Length"] = str(length)
    return StreamingResponse(
        framing.stream(source, found, beginning, start),
        media_type=framing.MEDIA_TYPE,
        headers=headers,
    )


def _accepted(request: Request) -> Form:
    """Return the form that Accept names by transfer syntax; as stored without."""
    asked = request.headers.get("accept", "").replace('"', "").replace(" ", "")
    first = asked.split(",")[0].split(";")
    return next(
        (form for uid, form in FORMS.items() if f"transfer-syntax={uid}" in first),
        "stored",
    )


@router.get("/overlays/{study}")
def read_study_overlays(
    request: Request,
    actor: Asking,
    policy: Deciding,
    source: Overlays,
    study: PathUid,
) -> Response:
    """Return masks, graphics and contours of a study as plain JSON."""
    return _overlays(request, actor, policy, source, study, None)


@router.get("/overlays/{study}/series/{series}")
def read_series_overlays(
    request: Request,
    actor: Asking,
    policy: Deciding,
    source: Overlays,
    study: PathUid,
    series: PathUid,
) -> Response:
    """Return masks, graphics and contours of one series of such objects."""
    return _overlays(request, actor, policy, source, study, series)


def _overlays(
    request: Request,
    actor: Actor,
    policy: Policy,
    source: OverlaySource,
    study: str,
    series: str | None,
) -> Response:
    policy.require(actor, "get")
    etag = source.version(actor, study, series)
    if unchanged(request, etag):
        return Response(status_code=304, headers=named(etag))
    return send_json(request, source.overlays(actor, study, series), etag)


@router.post("/render")
async def render(
    request: Request,
    actor: Asking,
    policy: Deciding,
    source: Pixels,
    study: QueryUid,
    series: QueryUid,
) -> Response:
    """Draw a plane, a slab or a volume rendering.

    A client that leaves takes its request with it: what is drawn stops.
    """
    asked = parse(await read_json(request))
    caller = source.caller()
    if ROOM.statistics().tasks_waiting >= MAX_WAITING:
        raise Unavailable("too many pictures of volumes are asked for")
    draw = partial(_draw, actor, policy, source, (study, series), asked, caller)
    drawing = asyncio.ensure_future(to_thread.run_sync(draw, limiter=ROOM))
    watching = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({drawing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            caller.leave()
        picture = await drawing
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        if not drawing.done():
            caller.leave()
    return Response(
        picture.body,
        media_type=picture.media_type,
        headers={
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Picture": json.dumps(dict(picture.facts), separators=(",", ":")),
        },
    )


def _draw(
    actor: Actor,
    policy: Policy,
    source: PixelSource,
    named: tuple[str, str],
    asked: RenderBody,
    caller: Caller,
) -> Picture:
    policy.require(actor, "get")
    ref, view = SeriesRef(*named, asked.stack), asked.view()
    if isinstance(view, PlaneView):
        return source.plane(actor, ref, view, caller)
    return source.projection(actor, ref, view, caller)


async def _left(request: Request) -> None:
    """Return once the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.post("/prefetch")
def prefetch(
    actor: Asking,
    policy: Deciding,
    catalogue: Catalogue,
    reading: Warming,
    study: QueryUid,
    series: Annotated[str | None, Query(pattern=UID)] = None,
    *,
    priors: bool = True,
) -> Response:
    """Begin to read what is likely to be opened after a series; answer at once."""
    policy.require(actor, "get")
    facts = catalogue.facts(actor, study)
    images = [one for one in facts.series if one.kind == "image"]
    now = next((one for one in images if series in {None, one.series}), None)
    if now is None:
        raise NotFound("no such series of images")
    plan = likely.ranked(facts, now, likely.NEXT)
    if priors and facts.priors:
        prior = catalogue.facts(actor, facts.priors[0].study)
        plan += likely.ranked(prior, now, likely.PRIOR)
    found = [
        {
            "study": one.study,
            "series": one.series,
            "score": one.score,
            "reasons": one.reasons,
            "started": reading.warm(actor, one.study, one.series),
        }
        for one in plan
    ]
    return Response(
        orjson.dumps({"series": found}),
        status_code=202,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
