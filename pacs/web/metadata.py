"""WADO-RS metadata of studies, series and instances (PS3.18 10.4.1.1.2)."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from fastapi import APIRouter, Response
from starlette.responses import StreamingResponse

from pacs.services.metadata import MetadataBody
from pacs.web.bodies import PiecesResponse, Validators, not_modified
from pacs.web.dependencies import StoredRoute, path_uid, readable
from pacs.web.multipart import MultipartWriter, Part
from pacs.web.native_xml import native_model
from pacs.web.negotiation import DICOM_JSON, DICOM_XML, Offer, choose
from pacs.web.retrieve import Asked, RetrieveContext, instance_validators

router = APIRouter(tags=["metadata"], route_class=StoredRoute)

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
    if form.media_type == DICOM_JSON and _takes_gzip(asked):
        return _packed(asked, found)
    return _text(asked, form, found.etag, found.text())


@readable(router, "/studies/{study}/series/{series}/instances/{instance}/metadata")
def instance_metadata(asked: Asked, study: str, series: str, instance: str) -> Response:
    """Retrieve the metadata of an instance: an array with one object."""
    found = asked.instance(study, series, instance)
    form = choose(asked.accept(), OFFERS)
    validators = instance_validators(found, f"metadata-{_suffix(form)}")
    if validators.unchanged(asked.request):
        return not_modified(validators)
    text = b"[" + asked.retrieve.metadata(found) + b"]"
    headers = validators.headers()
    if form.media_type == DICOM_XML:
        writer = _xml(text)
        headers["Content-Type"] = writer.content_type
        return PiecesResponse(list(writer), 200, headers)
    headers["Content-Type"] = DICOM_JSON
    return PiecesResponse([text], 200, headers)


def _suffix(form: Offer) -> str:
    return "xml" if form.media_type == DICOM_XML else "json"


def _packed(asked: RetrieveContext, found: MetadataBody) -> Response:
    validators = Validators(f"{found.etag}-gzip")
    if validators.unchanged(asked.request):
        return not_modified(validators)
    headers = {
        **validators.headers(),
        "Content-Type": DICOM_JSON,
        "Content-Encoding": "gzip",
    }
    return PiecesResponse([found.gzip_body], 200, headers)


def _text(
    asked: RetrieveContext, form: Offer, etag: str, chunks: Iterator[bytes]
) -> Response:
    validators = Validators(f"{etag}-{_suffix(form)}")
    if validators.unchanged(asked.request):
        return not_modified(validators)
    headers = validators.headers()
    if form.media_type == DICOM_XML:
        writer = _xml(b"".join(chunks))
        headers["Content-Type"] = writer.content_type
        return StreamingResponse(iter(writer), 200, headers)
    headers["Content-Type"] = DICOM_JSON
    if asked.request.method == "HEAD":
        return Response(None, 200, headers)
    return StreamingResponse(chunks, 200, headers)


def _xml(text: bytes) -> MultipartWriter:
    """Return one document for each object of a JSON array (PS3.18 F.3)."""

    def part(one: dict[str, object]) -> Part:
        return Part(
            (("Content-Type", DICOM_XML),), None, lambda: iter((native_model(one),))
        )

    return MultipartWriter(DICOM_XML, [part(one) for one in orjson.loads(text)])


def _takes_gzip(asked: RetrieveContext) -> bool:
    """Tell whether the client decodes gzip (RFC 9110 12.5.3)."""
    weights = {}
    for entry in asked.request.headers.get("accept-encoding", "").lower().split(","):
        name, _, parameters = entry.partition(";")
        try:
            weight = float(parameters.partition("q=")[2] or 1)
        except ValueError:
            weight = 0.0
        weights[name.strip()] = weight
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0
