"""WADO-URI: one object by a query (PS3.18 9), as a picture, a page or a DICOM file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from fastapi import APIRouter, Response

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.rendering.parameters import (
    ANNOTATIONS,
    JPEG,
    Region,
    Wanted,
    Window,
    decimal,
    quality_of,
    whole,
)
from pacs.services.rendering import Kind, kind_of
from pacs.services.sources import ByteSource
from pacs.web.bodies import (
    Attachment,
    Validators,
    not_modified,
    send_source,
)
from pacs.web.dependencies import path_uid, readable
from pacs.web.direct import DirectRoute
from pacs.web.negotiation import DICOM, MAX_RANGES, Offer, accept_of, candidates
from pacs.web.rendered import (
    ANIMATION,
    DOCUMENTS,
    PAGE_HEADERS,
    PICTURES,
    Asked,
    RenderContext,
    other_kind,
    send_picture,
    validators_of,
)
from pacs.web.retrieve import instance_validators, transfer_target
from storage.kernel.errors import InvalidParameter, NotFound, Unsupported

router = APIRouter(tags=["WADO-URI"], route_class=DirectRoute)

_FILE: Final = Offer(DICOM)
#: Text leaves in this character set only.
UTF_8: Final = "utf-8"
#: Parameters that mean nothing when a presentation state says how to show an image.
_SHOWN_BY_STATE: Final = ("windowCenter", "windowWidth")


@readable(router, "/wado")
def retrieve_object(asked: Asked) -> Response:
    """Retrieve one object: a picture, a page, or the object itself."""
    query = asked.request.query_params
    if query.get("requestType", "") != "WADO":
        raise InvalidParameter("requestType", "not WADO")
    found = asked.asked.instance(
        *(_uid(query, name) for name in ("studyUID", "seriesUID", "objectUID"))
    )
    anonymize = query.get("anonymize")
    if anonymize not in {None, "", "yes"}:
        raise InvalidParameter("anonymize", "not yes")
    if anonymize:
        raise Unsupported("anonymize: this server does not de-identify what it sends")
    kind = kind_of(found)
    offer = _offer(asked, found, kind)
    if offer == _FILE:
        return _file(asked, found)
    if kind is Kind.DOCUMENT:
        return _document(asked, found, offer)
    if kind in {Kind.IMAGE, Kind.STATE}:
        return _picture(asked, found, kind, offer)
    return other_kind(asked, found, kind)


def _uid(query: Mapping[str, str], name: str) -> str:
    value = query.get(name)
    if not value:
        raise InvalidParameter(name, "is missing")
    return path_uid(name, value)


def _offer(asked: RenderContext, found: StoredInstance, kind: Kind) -> Offer:
    """Return the form that is wanted: by contentType, else by Accept (PS3.18 9.1.2)."""
    query = asked.request.query_params
    offers: tuple[Offer, ...] = (*PICTURES, ANIMATION, _FILE)
    frames = found.number_of_frames or 1
    if kind is Kind.DOCUMENT:
        offers = (*DOCUMENTS, _FILE)
    elif kind is Kind.IMAGE and frames > 1 and "frameNumber" not in query:
        # The default for several frames is the object (PS3.18 Table 9.1.2-1).
        offers = (_FILE, *PICTURES, ANIMATION)
    elif kind not in {Kind.IMAGE, Kind.STATE}:
        media_type = "application/pdf" if kind is Kind.PDF else ""
        if kind is Kind.VIDEO:
            media_type = syntaxes.get(found.transfer_syntax_uid).media_type
        offers = (_FILE, *((Offer(media_type),) if media_type else ()))
    # The types of contentType are listed by preference, without weights.
    for one in query.get("contentType", "").split(",")[:MAX_RANGES]:
        if one.strip():
            try:
                return candidates(one, offers)[0][0]
            except Unsupported:
                continue
    accept = query.get("contentType") or accept_of(asked.request)
    return candidates(accept, offers)[0][0]


def _file(asked: RenderContext, found: StoredInstance) -> Response:
    """Send the object itself, in the transfer syntax that was asked for."""
    wanted = asked.request.query_params.get("transferSyntax", "")
    retrieve = asked.asked.retrieve
    target = transfer_target(
        retrieve, found, path_uid("transferSyntax", wanted) if wanted else ""
    )
    if target is None:
        raise Unsupported(
            f"transferSyntax: cannot send {wanted}, stored is "
            f"{found.transfer_syntax_uid}"
        )
    return send_source(
        asked.request,
        retrieve.open_object(found, target, asked.asked.caller.check),
        f"{DICOM}; transfer-syntax={target}",
        instance_validators(found, target),
        Attachment(f"{found.sop_instance_uid}.dcm").headers(),
    )


def _document(asked: RenderContext, found: StoredInstance, offer: Offer) -> Response:
    charset = asked.request.query_params.get("charset", "")
    accepted = {part.partition(";")[0].strip().lower() for part in charset.split(",")}
    if charset and not accepted & {UTF_8, "utf8", "*"}:
        raise Unsupported(f"available: charset {UTF_8}")
    validators = Validators(f"{found.digest.hex()[:32]}-{offer.media_type[5:]}")
    if validators.unchanged(asked.request):
        return not_modified(validators)
    body = asked.render.document(found, offer.media_type)
    return send_source(
        asked.request,
        ByteSource.of(body, found.transfer_syntax_uid, transcoded=True),
        f"{offer.media_type}; charset={UTF_8}",
        validators,
        PAGE_HEADERS,
    )


def _picture(
    asked: RenderContext, found: StoredInstance, kind: Kind, offer: Offer
) -> Response:
    query = asked.request.query_params
    limits = asked.asked.retrieve.limits
    number = 1
    if query.get("frameNumber"):
        number = whole("frameNumber", query["frameNumber"])
    state: StoredInstance | None = None
    shown = found
    if kind is Kind.STATE:
        state = found
        shown, number = asked.render.target(asked.asked.actor, found)
    elif query.get("presentationUID"):
        state = _state(asked, query)
    wanted, warnings = wanted_of(query, offer.media_type, limits.rendered_pixels)
    numbers: list[int] | range = [number]
    if offer == ANIMATION and "frameNumber" not in query:
        count = asked.render.frame_count(shown)
        if count > limits.frames_list:
            raise Unsupported("too many frames for one animation: name one")
        numbers = range(1, count + 1)
    validators = validators_of(shown, numbers, wanted, state=state)
    if validators.unchanged(asked.request):
        return not_modified(validators)
    made = asked.render.picture(shown, numbers, wanted, state=state)
    agent = f"{asked.asked.base}/wado"
    return send_picture(asked.request, made, validators, agent, warnings)


def _state(asked: RenderContext, query: Mapping[str, str]) -> StoredInstance:
    """Return the presentation state that is named (PS3.18 9.1.2.2.8)."""
    for name in _SHOWN_BY_STATE:
        if query.get(name):
            raise InvalidParameter(name, "not together with presentationUID")
    series = _uid(query, "presentationSeriesUID")
    uid = _uid(query, "presentationUID")
    study = _uid(query, "studyUID")
    state = asked.asked.instance(study, series, uid)
    if kind_of(state) is not Kind.STATE:
        raise NotFound("no such presentation state")
    return state


def wanted_of(
    query: Mapping[str, str], media_type: str, max_pixels: int
) -> tuple[Wanted, list[str]]:
    """Return what the rendering parameters of WADO-URI ask for, and warnings.

    Raises
    ------
    InvalidParameter
    """
    wanted = Wanted(media_type, max_pixels=max_pixels)
    warnings: list[str] = []
    center, width = query.get("windowCenter"), query.get("windowWidth")
    if (center is None) != (width is None):
        raise InvalidParameter("windowCenter", "goes with windowWidth only")
    if center is not None and width is not None:
        window = Window(decimal("windowCenter", center), decimal("windowWidth", width))
        wanted = replace(wanted, window=window)
    for name, field in (("rows", "max_height"), ("columns", "max_width")):
        if query.get(name):
            size = whole(name, query[name])
            if size > max_pixels:
                raise InvalidParameter(name, f"more than {max_pixels}")
            wanted = replace(wanted, **{field: size})  # type: ignore[arg-type]
    if (wanted.max_width or 1) * (wanted.max_height or 1) > max_pixels:
        raise InvalidParameter("rows", f"more than {max_pixels} pixels")
    if query.get("region"):
        wanted = replace(wanted, region=Region.parse(query["region"]))
    quality = query.get("imageQuality")
    if quality and media_type == JPEG:
        wanted = replace(wanted, quality=quality_of("imageQuality", quality))
    annotation = query.get("annotation")
    if annotation:
        asked = {part.strip().lower() for part in annotation.split(",")} - {""}
        if asked - ANNOTATIONS:
            warnings.append("Unknown values of the annotation parameter are ignored.")
        wanted = replace(wanted, annotations=frozenset(asked & ANNOTATIONS))
    return wanted, warnings
