"""WADO-RS: rendered and thumbnail resources (PS3.18 8.3.5, 10.4.1.1.3, 10.4.1.1.4).

What a study, series or instance is rendered as:

* an image of one frame: a picture; of several: an animated GIF, or one frame of it in
  the formats of pictures (the middle one), when that is what is accepted;
* several instances or frames: each a part of a multipart body, or the representative
  one of them when a single picture is accepted;
* a presentation state: its first image, shown by it; a structured report: a page or
  plain text; an encapsulated PDF, a video: as they are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final

import orjson
from fastapi import APIRouter, Depends, Request, Response

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.rendering.parameters import GIF, JP2, JPEG, PNG, Viewport, Wanted
from pacs.services.rendering import Kind, Rendered, RenderService, kind_of
from pacs.services.sources import ByteSource
from pacs.services.thumbnails import ThumbnailService
from pacs.web.bodies import (
    IMMUTABLE,
    REVALIDATE,
    Attachment,
    PiecesResponse,
    Validators,
    not_modified,
    send_parts,
    send_source,
)
from pacs.web.dependencies import context, path_uid, readable
from pacs.web.direct import DirectRoute
from pacs.web.frames import ENCAPSULATED_DOCUMENT, parse_frame_list
from pacs.web.multipart import MultipartWriter, Part
from pacs.web.negotiation import Offer, candidates
from pacs.web.rendered_parameters import thumbnail_size, wanted_of
from pacs.web.retrieve import RetrieveContext
from storage.kernel.errors import (
    ImagingError,
    InvalidParameter,
    NotFound,
    Unavailable,
    Unsupported,
)

log = logging.getLogger(__name__)

router = APIRouter(tags=["rendered"], route_class=DirectRoute)

_INSTANCE = "/studies/{study}/series/{series}/instances/{instance}"
#: Changes with what the same parameters give: then no cache may keep the old.
EDITION: Final = "1"
HTML, TEXT, PDF = "text/html", "text/plain", "application/pdf"
PICTURES: Final = tuple(Offer(kind) for kind in (JPEG, PNG, JP2))
PICTURE_PARTS: Final = tuple(Offer(kind, multipart=True) for kind in (JPEG, PNG, JP2))
ANIMATION: Final = Offer(GIF)
DOCUMENTS: Final = (Offer(HTML), Offer(TEXT))
#: A page that was made of a document runs nothing and loads nothing.
PAGE_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "sandbox; default-src 'none'; style-src 'unsafe-inline'"
    ),
}


async def render_service() -> RenderService:
    """Return the rendering service. The application replaces this dependency."""
    raise NotImplementedError


async def thumbnail_service() -> ThumbnailService:
    """Return the thumbnail service. The application replaces this dependency."""
    raise NotImplementedError


@context
@dataclass(frozen=True, slots=True)
class RenderContext:
    """What every rendering route needs."""

    asked: Annotated[RetrieveContext, Depends()]
    render: Annotated[RenderService, Depends(render_service)]
    thumbnails: Annotated[ThumbnailService, Depends(thumbnail_service)]

    @property
    def request(self) -> Request:
        return self.asked.request

    @property
    def agent(self) -> str:
        """What a warning names as its source."""
        return f"{self.asked.base}/dicom-web"


Asked = Annotated[RenderContext, Depends()]


@readable(router, "/studies/{study}/rendered")
def render_study(asked: Asked, study: str) -> Response:
    """Render a study: each of its instances, or one that stands for it."""
    return _render_many(asked, asked.asked.instances(study))


@readable(router, "/studies/{study}/series/{series}/rendered")
def render_series(asked: Asked, study: str, series: str) -> Response:
    """Render a series: each of its instances, or one that stands for it."""
    return _render_many(asked, asked.asked.instances(study, series))


@readable(router, _INSTANCE + "/rendered")
def render_instance(asked: Asked, study: str, series: str, instance: str) -> Response:
    """Render an instance."""
    found = asked.asked.instance(study, series, instance)
    kind = kind_of(found)
    if kind is Kind.IMAGE:
        return _image(asked, found)
    if kind is Kind.STATE:
        offer = candidates(asked.asked.accept(), PICTURES)[0][0]
        shown, number = asked.render.target(asked.asked.actor, found)
        return _picture(asked, shown, [number], offer, state=found)
    return other_kind(asked, found, kind)


@readable(router, _INSTANCE + "/frames/{frames}/rendered")
def render_frames(
    asked: Asked, study: str, series: str, instance: str, frames: str
) -> Response:
    """Render frames of an instance, in the order they are asked for."""
    numbers = parse_frame_list(frames, asked.asked.retrieve.limits.frames_list)
    found = asked.asked.instance(study, series, instance)
    if kind_of(found) is not Kind.IMAGE:
        raise Unsupported(f"no frames to render: this is a {kind_of(found)}")
    if len(numbers) == 1:
        offer = candidates(asked.asked.accept(), (*PICTURES, ANIMATION))[0][0]
        return _picture(asked, found, numbers, offer)
    offer = candidates(asked.asked.accept(), (*PICTURE_PARTS, ANIMATION))[0][0]
    if not offer.multipart:
        return _picture(asked, found, numbers, offer)
    if max(numbers) > asked.render.frame_count(found):
        raise NotFound(f"no frame {max(numbers)}")
    return _parts(asked, [(found, number) for number in numbers], offer.media_type)


@readable(router, "/studies/{study}/thumbnail")
def study_thumbnail(asked: Asked, study: str) -> Response:
    """Return a small picture that stands for a study."""
    return _representative(asked, study)


@readable(router, "/studies/{study}/series/{series}/thumbnail")
def series_thumbnail(asked: Asked, study: str, series: str) -> Response:
    """Return a small picture that stands for a series."""
    return _representative(asked, study, series)


@readable(router, _INSTANCE + "/thumbnail")
def instance_thumbnail(
    asked: Asked, study: str, series: str, instance: str
) -> Response:
    """Return a small picture of an instance: of its middle frame."""
    found = asked.asked.instance(study, series, instance)
    kind = kind_of(found)
    if kind is Kind.STATE:
        shown, number = asked.render.target(asked.asked.actor, found)
        return _small(asked, shown, number, IMMUTABLE, state=found)
    if kind is not Kind.IMAGE:
        raise Unsupported(f"no thumbnail: this is a {kind}")
    return _small(asked, found, asked.render.middle_frame(found), IMMUTABLE)


@readable(router, _INSTANCE + "/frames/{frames}/thumbnail")
def frame_thumbnail(
    asked: Asked, study: str, series: str, instance: str, frames: str
) -> Response:
    """Return a small picture of one frame."""
    numbers = parse_frame_list(frames, asked.asked.retrieve.limits.frames_list)
    if len(numbers) > 1:
        raise InvalidParameter("frames", "a thumbnail shows one frame")
    found = asked.asked.instance(study, series, instance)
    if kind_of(found) is not Kind.IMAGE:
        raise Unsupported(f"no frame to show: this is a {kind_of(found)}")
    return _small(asked, found, numbers[0], IMMUTABLE)


def _image(asked: RenderContext, found: StoredInstance) -> Response:
    count = asked.render.frame_count(found)
    if not count:
        raise NotFound("no frame whose bytes are all there")
    offers: list[Offer] = list(PICTURES)
    if count > 1 and _fits(asked, found, count):
        # The default of a multi-frame image is all of it (PS3.18 Table 8.7.4-1).
        offers.insert(0, ANIMATION)
    elif count == 1:
        offers.append(ANIMATION)
    offer = candidates(asked.asked.accept(), offers)[0][0]
    if offer == ANIMATION:
        return _picture(asked, found, range(1, count + 1), offer)
    return _picture(asked, found, [count // 2 + 1], offer)


def _fits(asked: RenderContext, found: StoredInstance, count: int) -> bool:
    """Tell whether all frames of an instance may be one animation."""
    limits = asked.asked.retrieve.limits
    pixels = (found.rows or 0) * (found.columns or 0)
    viewport = asked.request.query_params.get("viewport")
    if viewport is not None:
        shown = Viewport.parse(viewport, limits.rendered_pixels)
        pixels = shown.width * shown.height
    stored = (found.rows or 0) * (found.columns or 0) * (found.samples or 1)
    # Frames are read as they are stored, whatever size is asked for.
    return (
        count <= limits.frames_list
        and count * pixels <= limits.rendered_pixels
        and count * stored <= limits.rendered_pixels
    )


def _picture(
    asked: RenderContext,
    found: StoredInstance,
    numbers: Sequence[int],
    offer: Offer,
    *,
    state: StoredInstance | None = None,
    cache: str = IMMUTABLE,
) -> Response:
    """Answer with one picture, unless the client has it."""
    limits = asked.asked.retrieve.limits
    wanted, warnings = wanted_of(
        asked.request.query_params, offer.media_type, limits.rendered_pixels
    )
    validators = validators_of(found, numbers, wanted, state=state, cache=cache)
    if validators.unchanged(asked.request):
        return not_modified(validators)
    made = asked.render.picture(found, numbers, wanted, state=state)
    return send_picture(asked.request, made, validators, asked.agent, warnings)


def validators_of(
    found: StoredInstance,
    numbers: Sequence[int],
    wanted: Wanted,
    *,
    state: StoredInstance | None = None,
    cache: str = IMMUTABLE,
) -> Validators:
    """Return the validators of a picture: by content, frames and parameters."""
    named = hashlib.sha256(found.digest)
    named.update(state.digest if state is not None else b"-")
    named.update(orjson.dumps([EDITION, list(numbers), wanted.arguments()]))
    return Validators(named.hexdigest()[:32], cache=cache)


def send_picture(
    request: Request,
    made: Rendered,
    validators: Validators,
    agent: str,
    warnings: Sequence[str] = (),
) -> Response:
    """Send a picture with its warnings."""
    headers = {
        **validators.headers(),
        "Content-Type": made.media_type,
        "Content-Length": str(len(made.body)),
        "X-Content-Type-Options": "nosniff",
    }
    pieces = [] if request.method == "HEAD" else [made.body]
    response: Response = PiecesResponse(pieces, 200, headers)
    response.headers["Content-Length"] = str(len(made.body))
    for text in (*warnings, *made.warnings):
        response.headers.append("Warning", warning(agent, text))
    return response


def warning(agent: str, text: str) -> str:
    """Return a Warning header (PS3.18 8.3.4.6; RFC 7234 5.5)."""
    plain = f"299 {agent}: {text}".encode("ascii", "replace").decode()
    return "".join(char if char.isprintable() else "?" for char in plain)


def other_kind(asked: RenderContext, found: StoredInstance, kind: Kind) -> Response:
    """Answer with what is no picture: documents, PDF, video."""
    if kind is Kind.DOCUMENT:
        offer = candidates(asked.asked.accept(), DOCUMENTS)[0][0]
        etag = f"{found.digest.hex()[:32]}-{EDITION}-{offer.media_type[5:]}"
        validators = Validators(etag, cache=IMMUTABLE)
        if validators.unchanged(asked.request):
            return not_modified(validators)
        body = asked.render.document(found, offer.media_type)
        return send_source(
            asked.request,
            ByteSource.of(body, found.transfer_syntax_uid, transcoded=True),
            f"{offer.media_type}; charset=utf-8",
            validators,
            PAGE_HEADERS,
        )
    validators = Validators(f"{found.digest.hex()[:32]}-{kind}"[:64], cache=IMMUTABLE)
    if kind is Kind.PDF:
        candidates(asked.asked.accept(), (Offer(PDF),))
        bulk = asked.asked.retrieve.bulkdata(found, ENCAPSULATED_DOCUMENT)
        if bulk.mime_type != PDF:
            raise Unsupported(f"available: {bulk.mime_type} as bulk data")
        headers = Attachment(f"{found.sop_instance_uid}.pdf").headers()
        return send_source(asked.request, bulk.source, PDF, validators, headers)
    if kind is Kind.VIDEO:
        return _video(asked, found, validators)
    raise Unsupported("this object cannot be rendered: it has no pixels")


def _video(
    asked: RenderContext, found: StoredInstance, validators: Validators
) -> Response:
    """Send a stored video stream as it is, or the range of it that is asked for."""
    media_type = syntaxes.get(found.transfer_syntax_uid).media_type
    candidates(asked.asked.accept(), (Offer(media_type),))
    source = asked.asked.retrieve.open_frame(found, 1)
    return send_source(asked.request, source, media_type, validators)


def _render_many(asked: RenderContext, found: Sequence[StoredInstance]) -> Response:
    """Answer for a study or series: all of it, or what stands for it."""
    offers = (*PICTURES, *PICTURE_PARTS)
    offer = candidates(asked.asked.accept(), offers)[0][0]
    if not offer.multipart:
        one, number = asked.render.representative(asked.asked.actor, found)
        return _picture(asked, one, [number], offer, cache=REVALIDATE)
    images = [one for one in found if kind_of(one) is Kind.IMAGE]
    if not images:
        raise Unsupported("there is no image in it")
    shown = [(one, asked.render.middle_frame(one)) for one in images]
    return _parts(asked, shown, offer.media_type)


def _parts(
    asked: RenderContext,
    shown: Sequence[tuple[StoredInstance, int]],
    media_type: str,
) -> Response:
    """Send pictures one after another; each is made when its turn comes.

    The part of one that cannot be made is empty, and that is logged: the status has
    been sent before.
    """
    limits = asked.asked.retrieve.limits
    wanted, warnings = wanted_of(
        asked.request.query_params, media_type, limits.rendered_pixels
    )
    parts = [
        Part(
            (
                ("Content-Type", media_type),
                (
                    "Content-Location",
                    f"{asked.asked.url(one)}/frames/{number}/rendered",
                ),
            ),
            None,
            _Deferred(asked.render, one, number, wanted),
        )
        for one, number in shown
    ]
    response = send_parts(
        asked.request, MultipartWriter(media_type, parts), Validators()
    )
    for text in warnings:
        response.headers.append("Warning", warning(asked.agent, text))
    return response


@dataclass(frozen=True, slots=True)
class _Deferred:
    """A picture that is made when its bytes are asked for."""

    render: RenderService
    instance: StoredInstance
    number: int
    wanted: Wanted

    def __call__(self) -> Iterator[bytes]:
        try:
            yield self.render.picture(self.instance, [self.number], self.wanted).body
        except Unavailable:
            raise
        except ImagingError as error:
            log.warning(
                "an instance cannot be rendered: %s",
                error,
                extra={
                    "event": "render.failed",
                    "instance": self.instance.sop_instance_uid,
                    "code": error.code,
                },
            )


def _representative(
    asked: RenderContext, study: str, series: str | None = None
) -> Response:
    """Answer with a small picture that stands for a study or series."""
    asked.asked.policy.require(asked.asked.actor, "get")
    one = asked.thumbnails.representative(
        asked.asked.actor,
        path_uid("study", study),
        None if series is None else path_uid("series", series),
    )
    return _small(asked, one.instance, one.frame_number, REVALIDATE, kept=one.kept)


def _small(
    asked: RenderContext,
    found: StoredInstance,
    number: int,
    cache: str,
    *,
    state: StoredInstance | None = None,
    kept: Rendered | None = None,
) -> Response:
    """Answer with a thumbnail of one frame: kept, or made now."""
    offer = candidates(asked.asked.accept(), PICTURES[:2])[0][0]
    width, height = thumbnail_size(
        asked.request.query_params, asked.asked.retrieve.limits.rendered_pixels
    )
    wanted = replace(
        asked.thumbnails.wanted(width, height), media_type=offer.media_type
    )
    validators = validators_of(found, [number], wanted, state=state, cache=cache)
    if validators.unchanged(asked.request):
        return not_modified(validators)
    if kept is not None and wanted == asked.thumbnails.wanted():
        made = kept
    else:
        made = asked.render.picture(found, [number], wanted, state=state)
    return send_picture(asked.request, made, validators, asked.agent)
