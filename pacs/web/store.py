"""STOW-RS: store instances (PS3.18 10.5, Annex I)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Request, Response
from starlette.requests import ClientDisconnect

from pacs.web.dependencies import (
    BaseUrl,
    Policy,
    access_policy,
    base_url,
    context,
    current_actor,
    path_uid,
)
from pacs.web.intake import EmptyPart, Intake, Reception
from pacs.web.metadata_store import MetadataRequest
from pacs.web.multipart import (
    DATA,
    END,
    PART,
    ContentType,
    Headers,
    MultipartReader,
    boundary_of,
    parse_content_type,
)
from pacs.web.native_xml import native_model
from pacs.web.negotiation import (
    DICOM,
    DICOM_JSON,
    DICOM_XML,
    MULTIPART,
    Offer,
    accept_of,
    choose,
)
from pacs.web.problems import (
    problem,
    problem_response,
)
from pacs.web.request_body import TooSlow, read_body
from pacs.web.store_report import Report
from storage.kernel.errors import (
    ImagingError,
    MalformedObject,
    TooLarge,
    Unsupported,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Actor, Door, Source

router = APIRouter(tags=["store"])

JSON = Offer(DICOM_JSON)
XML = Offer(DICOM_XML)


async def intake() -> Intake:
    """Return what stores. The application replaces this dependency."""
    raise NotImplementedError


@context
@dataclass(frozen=True, slots=True)
class _Asked:
    """What both store routes need."""

    request: Request
    actor: Annotated[Actor, Depends(current_actor)]
    policy: Annotated[Policy, Depends(access_policy)]
    intake: Annotated[Intake, Depends(intake)]
    base_url: Annotated[BaseUrl, Depends(base_url)]


Asked = Annotated[_Asked, Depends()]


@router.post("/studies")
async def store(asked: Asked) -> Response:
    """Store instances of any study."""
    return await _store(asked, None)


@router.post("/studies/{study}")
async def store_in_study(asked: Asked, study: str) -> Response:
    """Store instances of one study."""
    return await _store(asked, path_uid("study", study))


async def _store(asked: _Asked, study_uid: str | None) -> Response:
    """Take the body apart, hand its instances over, and answer for each."""
    asked.policy.require(asked.actor, "store")
    form = choose(accept_of(asked.request), (JSON, XML))
    content_type = parse_content_type(asked.request.headers.get("content-type", ""))
    refusal = _unsupported(asked.request, content_type)
    if refusal:
        return problem(415, "input.unsupported_media_type", refusal)
    client = asked.request.client
    report = Report(asked.base_url.of(asked.request))
    reception = Reception(
        asked.intake,
        asked.actor,
        Source(Door.WEB, peer=client.host if client else ""),
        study_uid,
        report.keep,
    )
    failure: ImagingError | None = None
    try:
        await _receive(asked, content_type, reception)
    except ImagingError as error:
        failure = error
    except ClientDisconnect:
        # Nobody listens; what was complete is stored, the rest is dropped.
        return Response(status_code=499)
    finally:
        await reception.abort()
    await reception.drain()
    if failure is not None:
        if not report.n_stored:
            return _refused(failure)
        reception.refuse(failure)
    elif not report.fragments:
        return _refused(MalformedObject("the request holds no instance"))
    elif report.errors == {EmptyPart} and not report.n_stored:
        return _refused(MalformedObject("the request holds nothing but an empty part"))
    response = _answer(report, form)
    if isinstance(failure, TooLarge):
        # What follows is not worth reading.
        response.headers["Connection"] = "close"
    return response


def _refused(error: ImagingError) -> Response:
    if isinstance(error, TooSlow):
        return problem(408, error.code, str(error), {"Connection": "close"})
    response = problem_response(error)
    if response.status_code == 413:
        # What follows is not worth reading.
        response.headers["Connection"] = "close"
    return response


def _answer(report: Report, form: Offer) -> Response:
    body = report.body()
    if form == XML:
        body = native_model(orjson.loads(body))
    response = Response(body, report.status, media_type=form.media_type)
    if report.status == 503:
        response.headers["Retry-After"] = "5"
    return response


def _unsupported(request: Request, content_type: ContentType) -> str:
    """Say why a body of this kind is not taken; nothing when it is."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        return "bodies with a Content-Encoding are not taken"
    kind = content_type.media_type
    if kind == MULTIPART:
        kind = content_type.parameters.get("type", "").strip().lower() or DICOM
    if kind == DICOM_XML:
        return f"metadata are taken as {DICOM_JSON}, not as XML"
    if kind in {DICOM, DICOM_JSON}:
        return ""
    return f'taken are {MULTIPART}; type="{DICOM}" or "{DICOM_JSON}", and {DICOM}'


async def _receive(
    asked: _Asked, content_type: ContentType, reception: Reception
) -> None:
    """Hand the instances of the body over."""
    limits = asked.intake.limits
    body = read_body(
        asked.request,
        allowed=limits.request_bytes,
        seconds=asked.intake.body_seconds,
    )
    async with aclosing(body) as chunks:
        if content_type.media_type == MULTIPART:
            reader = MultipartReader(
                boundary_of(content_type),
                header_bytes=limits.part_header_bytes,
                max_parts=limits.request_parts,
            )
            named = content_type.parameters.get("type", "").strip().lower()
            parts = _Parts(reception, named, limits)
            async for chunk in chunks:
                for kind, value in reader.feed(chunk):
                    await parts.take(kind, value)
            reader.close()
        else:
            parts = _Parts(reception, content_type.media_type, limits)
            await parts.take(PART, {"content-type": content_type.media_type})
            async for chunk in chunks:
                await parts.take(DATA, chunk)
            await parts.take(END, None)
        await parts.close()


class _Parts:
    """Sends each part where its type belongs."""

    def __init__(self, reception: Reception, media_type: str, limits: Limits) -> None:
        self._reception = reception
        self._media_type = media_type
        self._limits = limits
        self._metadata: MetadataRequest | None = None
        self._skipping = False

    async def take(self, kind: int, value: Headers | bytes | None) -> None:
        """Go on with an event of the body."""
        if kind == PART:
            self._begin(value if isinstance(value, Mapping) else {})
        elif self._skipping:
            return
        elif kind == DATA and isinstance(value, bytes):
            if self._metadata is None:
                await self._reception.write(value)
            else:
                self._metadata.write(value)
        elif kind == END and self._metadata is None:
            await self._reception.end()

    def _begin(self, headers: Headers) -> None:
        named = parse_content_type(headers.get("content-type", "")).media_type
        kind = named or self._media_type
        # Tolerates: no `type` in the request; the first part tells.
        self._media_type = self._media_type or kind
        self._skipping = False
        if self._media_type in {DICOM_JSON, "application/json"}:
            if self._metadata is None:
                self._metadata = MetadataRequest(self._limits)
            self._metadata.begin(headers)
        elif kind == DICOM:
            self._reception.begin()
        else:
            self._skipping = True
            self._reception.refuse(Unsupported(f"a part is not {DICOM}"))

    async def close(self) -> None:
        """Complete the request."""
        if self._metadata is not None:
            for syntax, build, size in self._metadata.instances():
                await self._reception.add(syntax, build, size)
