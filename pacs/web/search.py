"""QIDO-RS: search for studies, series and instances (PS3.18 10.6, 8.3.4)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol
from urllib.parse import quote, unquote_to_bytes

import orjson
from fastapi import APIRouter, Depends, Request, Response
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword

from pacs.domain.matching import (
    BY_TAG,
    REQUEST_ATTRIBUTES_SEQUENCE,
    REQUEST_KEYS,
)
from pacs.domain.study import Level
from pacs.services.query import SearchPage, SearchRequest
from pacs.web.compression import coded
from pacs.web.dependencies import (
    BaseUrl,
    Policy,
    access_policy,
    base_url,
    context,
    current_actor,
    path_uid,
)
from pacs.web.native_xml import native_model
from pacs.web.negotiation import DICOM_JSON, DICOM_XML, Offer, accept_of, choose
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Actor

router = APIRouter(tags=["search"])

#: Forms a search answers in; JSON when nothing is said.
JSON = Offer(DICOM_JSON)
XML = Offer(DICOM_XML, multipart=True)
MAX_PARAMETERS = 256
MAX_WARNINGS = 16
MAX_PATH_DEPTH = 8
#: Extensions: how many matches there are, and whether counting stopped there.
TOTAL = "X-Total-Count"
TOTAL_IS_APPROXIMATE = "X-Total-Count-Approximate"


class Search(Protocol):
    """The query service, as far as QIDO-RS needs it."""

    def search(self, actor: Actor, level: Level, request: SearchRequest) -> SearchPage:
        """Answer a search with ready JSON."""
        ...

    def count(self, actor: Actor, level: Level, request: SearchRequest) -> SearchPage:
        """Count the matches of a search."""
        ...


async def query_service() -> Search:
    """Return the query service. The application replaces this dependency."""
    raise NotImplementedError


@context
@dataclass(frozen=True, slots=True)
class SearchContext:
    """What every search route needs."""

    request: Request
    actor: Annotated[Actor, Depends(current_actor)]
    policy: Annotated[Policy, Depends(access_policy)]
    query: Annotated[Search, Depends(query_service)]
    base_url: Annotated[BaseUrl, Depends(base_url)]

    @property
    def base(self) -> str:
        """What addresses in the answer begin with."""
        return self.base_url.of(self.request)

    def parsed(self, study: str | None, series: str | None) -> ParsedQuery:
        """Return the search that is asked for, by someone who may search.

        Raises
        ------
        InvalidParameter, NotAllowed
        """
        self.policy.require(self.actor, "find")
        parsed = parse_query(self.request.scope["query_string"])
        search = replace(
            parsed.search,
            study_uid=None if study is None else path_uid("study", study),
            series_uid=None if series is None else path_uid("series", series),
            base_url=self.base,
        )
        return replace(parsed, search=search)

    def describe(
        self, response: Response, parsed: ParsedQuery, found: SearchPage
    ) -> None:
        """Add the warnings and the total of an answer to its headers."""
        agent = f"{self.base}/dicom-web"
        for text in (*parsed.warnings, *found.warnings)[:MAX_WARNINGS]:
            response.headers.append("Warning", _header(f"299 {agent}: {text}"))
        if found.total is not None:
            response.headers[TOTAL] = str(found.total)
            if found.at_least:
                response.headers[TOTAL_IS_APPROXIMATE] = "true"


Asked = Annotated[SearchContext, Depends()]


@router.get("/studies")
def search_studies(asked: Asked) -> Response:
    """Search all studies."""
    return _answer(asked, Level.STUDY)


@router.get("/series")
def search_series(asked: Asked) -> Response:
    """Search all series."""
    return _answer(asked, Level.SERIES)


@router.get("/instances")
def search_instances(asked: Asked) -> Response:
    """Search all instances."""
    return _answer(asked, Level.IMAGE)


@router.get("/studies/{study}/series")
def search_series_of_study(asked: Asked, study: str) -> Response:
    """Search the series of a study."""
    return _answer(asked, Level.SERIES, study)


@router.get("/studies/{study}/instances")
def search_instances_of_study(asked: Asked, study: str) -> Response:
    """Search the instances of a study."""
    return _answer(asked, Level.IMAGE, study)


@router.get("/studies/{study}/series/{series}/instances")
def search_instances_of_series(asked: Asked, study: str, series: str) -> Response:
    """Search the instances of a series."""
    return _answer(asked, Level.IMAGE, study, series)


def _answer(
    asked: SearchContext,
    level: Level,
    study: str | None = None,
    series: str | None = None,
) -> Response:
    """Parse, search, and write the answer in the form that was asked for."""
    parsed = asked.parsed(study, series)
    form = choose(accept_of(asked.request), (JSON, XML))
    found = asked.query.search(asked.actor, level, parsed.search)
    response = _body(asked.request, found, form)
    asked.describe(response, parsed, found)
    if found.cursor:
        following = f"{asked.base}{_next(asked.request, found.cursor)}"
        response.headers["Link"] = _header(f'<{following}>; rel="next"')
    return response


def _body(request: Request, found: SearchPage, form: Offer) -> Response:
    if not found.rows:
        return Response(status_code=204)
    if form == JSON:
        text, kind = found.body, DICOM_JSON
    else:
        boundary = uuid.uuid4().hex
        parts = b"".join(
            b"--%s\r\nContent-Type: %s\r\n\r\n%s\r\n"
            % (boundary.encode(), DICOM_XML.encode(), native_model(orjson.loads(row)))
            for row in found.rows
        )
        text = parts + b"--%s--\r\n" % boundary.encode()
        kind = f"{XML}; boundary={boundary}"
    body, headers = coded(request, text, {"Content-Type": kind})
    return Response(body, headers={**headers, "Vary": "Accept, Accept-Encoding"})


def _header(value: str) -> str:
    """Return `value` as it may stand in a header: one line of Latin-1."""
    return (
        re.sub(r"[\x00-\x1f\x7f]", " ", value)
        .encode("latin-1", "replace")
        .decode("latin-1")
    )


def _next(request: Request, cursor: str) -> str:
    """Return the path and query that go on behind `cursor`."""
    kept = [
        part
        for part in request.scope["query_string"].decode("latin-1").split("&")
        if part and part.partition("=")[0].lower() not in {"cursor", "offset"}
    ]
    query = quote("&".join([*kept, f"cursor={cursor}"]), safe="!$&'()*+,;=:@/?%~-._")
    return f"{quote(request.scope['path'])}?{query}"


@dataclass(slots=True)
class ParsedQuery:
    """A query string: the search it asks for, and what could not be honoured."""

    search: SearchRequest
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Collected:
    """Parameters as they are read, one after the other."""

    keys: dict[int, str] = field(default_factory=dict)
    include: set[int] = field(default_factory=set)
    include_all: bool = False
    fuzzy: bool = False
    limit: int | None = None
    offset: int = 0
    cursor: str = ""
    order: str = ""
    total: bool = False
    warnings: list[str] = field(default_factory=list)


def parse_query(query_string: bytes) -> ParsedQuery:
    """Parse the query part of a search (PS3.18 8.3.4, 10.6.1.2).

    Examples
    --------
    >>> parse_query(b"PatientName=Wang*&limit=10").search.keys
    {1048592: 'Wang*'}

    Raises
    ------
    InvalidParameter
        Not UTF-8, an unknown keyword, a malformed value, or a key given twice.
    """
    found = _Collected()
    parts = [part for part in query_string.split(b"&") if part]
    if len(parts) > MAX_PARAMETERS:
        raise InvalidParameter("query", f"more than {MAX_PARAMETERS} parameters")
    for part in parts:
        raw_name, _, raw_value = part.partition(b"=")
        name, value = _decoded(raw_name), _decoded(raw_value)
        setter = _PARAMETERS.get(name.lower())
        if setter is not None:
            setter(found, value)
        else:
            _add_key(found, name, value)
    search = SearchRequest(
        keys=found.keys,
        include=frozenset(found.include),
        include_all=found.include_all,
        fuzzy=found.fuzzy,
        limit=found.limit,
        offset=found.offset,
        cursor=found.cursor,
        order=found.order,
        total=found.total,
    )
    return ParsedQuery(search, tuple(dict.fromkeys(found.warnings)))


def _decoded(raw: bytes) -> str:
    if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
        raise InvalidParameter("query", "a percent sign is not followed by two digits")
    try:
        text = unquote_to_bytes(raw.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidParameter("query", "is not UTF-8") from error
    if "\0" in text:
        raise InvalidParameter("query", "holds a NUL character")
    return text


def _add_key(found: _Collected, name: str, value: str) -> None:
    """Add a matching key; lists of UIDs and codes may use commas."""
    tag, sequence = _attribute(name)
    if sequence is not None and (
        sequence != REQUEST_ATTRIBUTES_SEQUENCE or tag not in REQUEST_KEYS
    ):
        found.warnings.append(
            "Matching within this sequence is not supported; ignored."
        )
        return
    known = BY_TAG.get(tag)
    is_list = known is not None and known.vr in {"UI", "CS"}
    if is_list:
        value = value.replace(",", "\\")
    if tag in found.keys:
        if not is_list:
            raise InvalidParameter(_shown(name), "given twice")
        value = f"{found.keys[tag]}\\{value}"
    found.keys[tag] = value


def _attribute(path: str) -> tuple[int, int | None]:
    """Resolve a keyword, tag or dotted path to its last tag and its sequence.

    Raises
    ------
    InvalidParameter
        No such attribute, or a path through something that is no sequence.
    """
    parts = path.split(".")
    if len(parts) > MAX_PATH_DEPTH:
        raise InvalidParameter(_shown(path), "nested too deeply")
    tags = [_tag(part) for part in parts]
    for tag in tags[:-1]:
        if not tag >> 16 & 1 and dictionary_has_tag(tag) and dictionary_VR(tag) != "SQ":
            raise InvalidParameter(_shown(path), "not a sequence")
    return tags[-1], tags[0] if len(tags) > 1 else None


def _tag(name: str) -> int:
    if re.fullmatch(r"[0-9A-Fa-f]{8}", name):
        tag = int(name, 16)
        # Private tags are legal; standard ones must be in the dictionary (PS3.6).
        if tag >> 16 & 1 or dictionary_has_tag(tag):
            return tag
    elif re.fullmatch(r"[A-Za-z][A-Za-z0-9]{0,63}", name):
        found = tag_for_keyword(name)
        if found is not None:
            return found
    raise InvalidParameter(_shown(name), "no such attribute")


def _shown(name: str) -> str:
    """Return a parameter's name as an error may show it."""
    return re.sub(r"[^A-Za-z0-9.,_-]", "?", name)[:64] or "query"


def _include(found: _Collected, value: str) -> None:
    for name in filter(None, (part.strip() for part in value.split(","))):
        if name.lower() == "all":
            found.include_all = True
            continue
        tag, sequence = _attribute(name)
        # Bound: a sequence is returned whole, whatever part of it was asked for.
        found.include.add(tag if sequence is None else sequence)
    if len(found.include) > MAX_PARAMETERS:
        raise InvalidParameter("includefield", f"more than {MAX_PARAMETERS}")


def _flag(name: str, value: str) -> bool:
    if value.lower() not in {"true", "false"}:
        raise InvalidParameter(name, "true or false")
    return value.lower() == "true"


def _unsigned(name: str, value: str) -> int:
    if re.fullmatch(r"[0-9]{1,18}", value, re.ASCII) is None:
        raise InvalidParameter(name, "not an unsigned number")
    return int(value)


def _fuzzy(found: _Collected, value: str) -> None:
    found.fuzzy = _flag("fuzzymatching", value)


def _empty_values(_found: _Collected, value: str) -> None:
    """Accept the parameter: a key of two quotation marks always means empty."""
    _flag("emptyvaluematching", value)


def _multiple_values(found: _Collected, value: str) -> None:
    if _flag("multiplevaluematching", value):
        found.warnings.append(
            "The multiplevaluematching parameter is not supported. "
            "Only literal matching has been performed."
        )


def _limit(found: _Collected, value: str) -> None:
    found.limit = _unsigned("limit", value)


def _offset(found: _Collected, value: str) -> None:
    found.offset = _unsigned("offset", value)


def _cursor(found: _Collected, value: str) -> None:
    found.cursor = value


def _order(found: _Collected, value: str) -> None:
    # An unescaped plus sign arrives as a space.
    found.order = value.strip().removeprefix("+")


def _total(found: _Collected, value: str) -> None:
    found.total = _flag("totalcount", value)


def _accept(_found: _Collected, _value: str) -> None:
    """Leave the parameter to `accept_of`, which reads it before it is decoded."""


#: Parameters that are no matching keys; the last three are extensions.
_PARAMETERS: Mapping[str, Callable[[_Collected, str], None]] = {
    "accept": _accept,
    "includefield": _include,
    "fuzzymatching": _fuzzy,
    "emptyvaluematching": _empty_values,
    "multiplevaluematching": _multiple_values,
    "limit": _limit,
    "offset": _offset,
    "cursor": _cursor,
    "orderby": _order,
    "totalcount": _total,
}
