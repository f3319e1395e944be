"""WADO-RS metadata of studies, series and instances (PS3.18 10.4.1.1.2).

An extension gives what a viewer needs of a series before its first frame in one
answer: `bundle`, its metadata and its frame table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import orjson
from fastapi import APIRouter, Response
from starlette.responses import StreamingResponse

from pacs.services.metadata import MetadataBody
from pacs.web.bodies import PiecesResponse, Validators, gathered, not_modified
from pacs.web.compression import coded, coded_chunks, content_coding
from pacs.web.dependencies import StoredRoute, path_uid, readable
from pacs.web.multipart import MultipartWriter, Part
from pacs.web.native_xml import native_model
from pacs.web.negotiation import DICOM_JSON, DICOM_XML, Offer, choose
from pacs.web.retrieve import Asked, RetrieveContext, instance_validators

router = APIRouter(tags=["metadata"], route_class=StoredRoute)

JSON = "application/json"
OFFERS = (Offer(DICOM_JSON), Offer(DICOM_XML, multipart=True))


@readable(router, "/studies/{study}/metadata")
def study_metadata(asked: Asked, study: str) -> Response:
    """Retrieve the metadata of a study: its series' one after another."""
    asked.policy.require(asked.actor, "get")
    form = choose(asked.accept(), OFFERS)
    etag, chunks = asked.retrieve.study_metadata(asked.actor, path_uid("study", study))
    return _text(asked, form, etag, chunks)


@readable(router, "/studies/{study}/series/{series}/metadata")
def series_metadata(asked: Asked, study: str, series: str) -> Response:
    """Retrieve the metadata of a series, as it was prepared."""
    asked.policy.require(asked.actor, "get")
    form = choose(asked.accept(), OFFERS)
    found = asked.retrieve.series_metadata(
        asked.actor, path_uid("study", study), path_uid("series", series)
    )
    coding = content_coding(asked.request)
    if form.media_type == DICOM_JSON and coding:
        return _packed(asked, found, coding)
    return _text(asked, form, found.etag, found.text())


@readable(router, "/studies/{study}/series/{series}/bundle")
def series_bundle(asked: Asked, study: str, series: str) -> Response:
    """Retrieve the metadata of a series and its frame table in one answer."""
    asked.policy.require(asked.actor, "get")
    choose(asked.accept(), OFFERS[:1])
    found = asked.retrieve.series_metadata(
        asked.actor, path_uid("study", study), path_uid("series", series)
    )
    coding = content_coding(asked.request)
    validators = Validators("-".join(filter(None, (found.etag, "bundle", coding))))
    if validators.unchanged(asked.request):
        return not_modified(validators)
    headers = {**validators.headers(), "Content-Type": JSON}
    if asked.request.method == "HEAD":
        return Response(None, 200, headers)
    chunks = itertools.chain(
        (b'{"frames":', found.frames, b',"metadata":'), found.text(), (b"}",)
    )
    pieces, headers = coded_chunks(asked.request, chunks, headers)
    return StreamingResponse(gathered(pieces), 200, headers)


@readable(router, "/studies/{study}/series/{series}/instances/{instance}/metadata")
def instance_metadata(asked: Asked, study: str, series: str, instance: str) -> Response:
    """Retrieve the metadata of an instance: an array with one object."""
    found = asked.instance(study, series, instance)
    form = choose(asked.accept(), OFFERS)
    validators = instance_validators(found, _suffix(asked, "metadata", form))
    if validators.unchanged(asked.request):
        return not_modified(validators)
    text = b"[" + asked.retrieve.metadata(found) + b"]"
    headers = validators.headers()
    if form.media_type == DICOM_XML:
        writer = _xml(text)
        headers["Content-Type"] = writer.content_type
        return PiecesResponse(list(writer), 200, headers)
    text, headers = coded(asked.request, text, {**headers, "Content-Type": DICOM_JSON})
    return PiecesResponse([text], 200, headers)


def _suffix(asked: RetrieveContext, first: str, form: Offer) -> str:
    """Return what tells a representation from others, its coding included."""
    kind = "xml" if form.media_type == DICOM_XML else "json"
    return "-".join(filter(None, (first, kind, content_coding(asked.request))))


def _packed(asked: RetrieveContext, found: MetadataBody, coding: str) -> Response:
    validators = Validators(f"{found.etag}-{coding}")
    if validators.unchanged(asked.request):
        return not_modified(validators)
    headers = {
        **validators.headers(),
        "Content-Type": DICOM_JSON,
        "Content-Encoding": coding,
    }
    return PiecesResponse([found.coded(coding)], 200, headers)


def _text(
    asked: RetrieveContext, form: Offer, etag: str, chunks: Iterator[bytes]
) -> Response:
    validators = Validators(_suffix(asked, etag, form))
    if validators.unchanged(asked.request):
        return not_modified(validators)
    headers = validators.headers()
    if form.media_type == DICOM_XML:
        writer = _xml(b"".join(chunks))
        headers["Content-Type"] = writer.content_type
        chunks = iter(writer)
    else:
        headers["Content-Type"] = DICOM_JSON
    if asked.request.method == "HEAD":
        return Response(None, 200, headers)
    pieces, headers = coded_chunks(asked.request, chunks, headers)
    return StreamingResponse(gathered(pieces), 200, headers)


def _xml(text: bytes) -> MultipartWriter:
    """Return one document for each object of a JSON array (PS3.18 F.3)."""

    def part(one: dict[str, object]) -> Part:
        return Part(
            (("Content-Type", DICOM_XML),), None, lambda: iter((native_model(one),))
        )

    return MultipartWriter(DICOM_XML, [part(one) for one in orjson.loads(text)])
