"""The first page: its routes, and what it asks of the archive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Actor
from viewer.activity import Report
from viewer.assets import HTML, Asset, asset, page

router = APIRouter(tags=["page"])

MAX_LIMIT = 200
#: Everything comes from this address, nothing runs that is not a file of ours, and
#: no other page may frame this one.
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True, slots=True)
class StudySearch:
    """What the list is narrowed to; empty fields do not restrict.

    Attributes
    ----------
    text : str
        Words that begin names (also in pinyin), Patient IDs or Accession Numbers.
    date_from, date_to : str
        YYYYMMDD, both inclusive.
    modalities : tuple of str
        Any of them.
    """

    text: str = ""
    name: str = ""
    patient_id: str = ""
    accession: str = ""
    date_from: str = ""
    date_to: str = ""
    modalities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StudyLine:
    """One line of the list. Dates and times are as in the data set."""

    tenant: str
    study_instance_uid: str
    patient_name: str
    patient_id: str
    birth_date: str | None
    sex: str
    study_date: str | None
    study_time: str | None
    accession_number: str
    study_description: str
    modalities: tuple[str, ...]
    n_series: int
    n_instances: int
    size_bytes: int
    updated_us: int


@dataclass(frozen=True, slots=True)
class StudyPage:
    """A page of the list, newest first; `cursor` is empty on the last one."""

    studies: tuple[StudyLine, ...]
    cursor: str


class StudyDirectory(Protocol):
    """Finds studies."""

    def list_studies(
        self, actor: Actor, wanted: StudySearch, *, cursor: str, limit: int
    ) -> StudyPage:
        """Return the page behind `cursor`."""
        ...


class ActivitySource(Protocol):
    """Tells how much is stored and how much arrives."""

    def report(self, actor: Actor) -> Report:
        """Return what the archive holds and what arrived lately."""
        ...


@dataclass(frozen=True, slots=True)
class NodeCard:
    """What the page says about its node."""

    aet: str
    dimse_port: int
    version: str


async def current_actor() -> Actor:
    """Return who asks. The application replaces this dependency."""
    raise NotImplementedError


async def study_directory() -> StudyDirectory:
    """Return what finds studies. The application replaces this dependency."""
    raise NotImplementedError


async def activity_source() -> ActivitySource:
    """Return what tells of activity. The application replaces this dependency."""
    raise NotImplementedError


async def node_card() -> NodeCard:
    """Return what this node is. The application replaces this dependency."""
    raise NotImplementedError


Asking = Annotated[Actor, Depends(current_actor)]
Text = Annotated[str, Query(max_length=256)]
Day = Annotated[str, Query(max_length=10)]


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def read_page(
    request: Request, _actor: Asking, card: Annotated[NodeCard, Depends(node_card)]
) -> Response:
    """Return the page."""
    return _file(request, page(card.aet, card.dimse_port, card.version), "no-cache")


@router.api_route("/assets/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def read_asset(request: Request, _actor: Asking, name: str) -> Response:
    """Return a file of the page, for good when the address names its content."""
    found = asset(name)
    exact = request.query_params.get("v") == found.version
    return _file(
        request,
        found,
        "public, max-age=31536000, immutable" if exact else "no-cache",
    )


@router.get("/api/v1/study-list")
def list_studies(
    actor: Asking,
    directory: Annotated[StudyDirectory, Depends(study_directory)],
    text: Text = "",
    name: Text = "",
    patient_id: Text = "",
    accession: Text = "",
    date_from: Annotated[Day, Query(alias="from")] = "",
    date_to: Annotated[Day, Query(alias="to")] = "",
    modality: Annotated[str, Query(max_length=128)] = "",
    cursor: Annotated[str, Query(max_length=4096)] = "",
    limit: Annotated[int, Query(ge=1)] = 50,
) -> Response:
    """Return a page of the study list, newest first."""
    wanted = StudySearch(
        text=text,
        name=name,
        patient_id=patient_id,
        accession=accession,
        date_from=_day("from", date_from),
        date_to=_day("to", date_to),
        modalities=_modalities(modality),
    )
    found = directory.list_studies(
        actor, wanted, cursor=cursor, limit=min(limit, MAX_LIMIT)
    )
    return _json(found)


@router.get("/api/v1/activity")
def read_activity(
    actor: Asking, source: Annotated[ActivitySource, Depends(activity_source)]
) -> Response:
    """Return what the archive holds and what arrived lately."""
    return _json(source.report(actor))


def _day(name: str, value: str) -> str:
    """Return a day as YYYYMMDD; whether there is such a day, the search decides."""
    if not value:
        return ""
    if re.fullmatch(r"[0-9]{4}(-?)[0-9]{2}\1[0-9]{2}", value, re.ASCII) is None:
        raise InvalidParameter(name, "not YYYY-MM-DD or YYYYMMDD")
    return value.replace("-", "")


def _modalities(value: str) -> tuple[str, ...]:
    found = tuple(filter(None, (one.strip() for one in value.split(","))))
    if any(re.fullmatch(r"[A-Z0-9_ ]{1,16}", one) is None for one in found):
        raise InvalidParameter("modality", "not modalities, separated by commas")
    return found


def _json(body: Any) -> Response:
    return Response(
        orjson.dumps(body),
        media_type="application/json",
        headers={**SECURITY, "Cache-Control": "no-store"},
    )


def _file(request: Request, found: Asset, caching: str) -> Response:
    """Answer with a file, compressed where the browser takes that, or with 304."""
    headers = {
        **SECURITY,
        "Cache-Control": caching,
        "ETag": found.etag,
        "Vary": "Accept-Encoding",
        "Content-Type": found.media_type,
    }
    if found.media_type == HTML:
        headers["Content-Language"] = "zh-CN, en"
    if found.etag in _etags(request):
        return Response(status_code=304, headers=headers)
    body = found.body
    if "gzip" in request.headers.get("accept-encoding", "").lower():
        headers["Content-Encoding"] = "gzip"
        body = found.compressed
    headers["Content-Length"] = str(len(body))
    return Response(b"" if request.method == "HEAD" else body, headers=headers)


def _etags(request: Request) -> set[str]:
    """Return the versions a browser says it has; proxies mark them as weak."""
    listed = request.headers.get("if-none-match", "").split(",")
    return {one.strip().removeprefix("W/") for one in listed}
