"""Retrieve Capabilities: what this origin server offers (PS3.18 8.9, Annex H).

The description is made from the routes themselves, so that it names what there is. It
comes as WADL or, for those who would rather have it, the same tree as JSON. `OPTIONS`
of the base or of any resource asks for it, and so does `GET …/capabilities`, which a
browser can (an extension).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final
from xml.sax.saxutils import quoteattr

import orjson
from fastapi import APIRouter, Depends, Request, Response
from starlette.routing import Route

from pacs.imaging import syntaxes
from pacs.imaging.encoders import ENCODERS
from pacs.web.compression import coded
from pacs.web.dependencies import (
    BaseUrl,
    Policy,
    access_policy,
    base_url,
    context,
    current_actor,
    readable,
)
from pacs.web.negotiation import (
    DICOM,
    DICOM_JSON,
    DICOM_XML,
    MULTIPART,
    OCTETS,
    ZIP,
    Offer,
    accept_of,
    choose,
)
from storage.kernel.types import Actor

router = APIRouter(tags=["capabilities"])

#: Where the application puts these routes.
PREFIX: Final = "/dicom-web"
WADL: Final = "application/vnd.sun.wadl+xml"
JSON: Final = "application/json"
#: What negotiation calls DICOM JSON is what clients call JSON.
OFFERS: Final = (Offer(WADL), Offer(DICOM_JSON), Offer(DICOM_XML))
NAMESPACE: Final = "http://wadl.dev.java.net/2009/02"
_XML_TYPES: Final = frozenset((WADL, DICOM_XML))


@dataclass(frozen=True, slots=True)
class Method:
    """One transaction on a resource."""

    name: str
    identifier: str
    title: str
    query: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


@dataclass(slots=True)
class Resource:
    """A segment of a path, and what is below it."""

    path: str
    methods: list[Method] = field(default_factory=list)
    below: dict[str, Resource] = field(default_factory=dict)

    def at(self, segments: Iterable[str]) -> Resource:
        """Return the resource at a path below this one; made when it is new."""
        here = self
        for segment in segments:
            here = here.below.setdefault(segment, Resource(segment))
        return here


_MULTIPART_JSON: Final = (DICOM_JSON, f'{MULTIPART}; type="{DICOM_XML}"')
_SEARCH_QUERY: Final = (
    "{attributeID}",
    "includefield",
    "fuzzymatching",
    "emptyvaluematching",
    "limit",
    "offset",
    "orderby",
    "totalcount",
    "cursor",
    "accept",
)
_COUNT_QUERY: Final = ("{attributeID}", "fuzzymatching", "emptyvaluematching", "accept")


def _parts(media_type: str, uids: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        f'{MULTIPART}; type="{media_type}"; transfer-syntax={uid}' for uid in uids
    )


def _instances() -> tuple[str, ...]:
    """Return the forms of whole instances, the default first."""
    uids = (syntaxes.EXPLICIT_VR_LE, "*", *ENCODERS)
    return (*_parts(DICOM, uids), ZIP)


def _frames() -> tuple[str, ...]:
    kinds = [*_parts(OCTETS, (syntaxes.EXPLICIT_VR_LE, "*"))]
    for uid in ENCODERS:
        kinds += _parts(syntaxes.get(uid).media_type, (uid,))
    # As stored only.
    for kind in ("image/jpeg", "image/jls", "image/jp2", "image/jphc", "image/jxl"):
        kinds += _parts(kind, ("*",))
    return (*kinds, *_parts("video/mp4", ("*",)), *_parts("video/mpeg", ("*",)))


_RENDERED: Final = ("image/jpeg", "image/png")

#: What routes give and take, by their tag and the end of their path; the first wins.
_TABLE: Final[tuple[tuple[str, str, Mapping[str, Any]], ...]] = (
    ("search", "/count", {"query": _COUNT_QUERY, "gives": (JSON,)}),
    ("search", "", {"query": _SEARCH_QUERY, "gives": _MULTIPART_JSON}),
    ("metadata", "/bundle", {"query": ("accept",), "gives": (JSON,)}),
    ("metadata", "", {"query": ("accept",), "gives": _MULTIPART_JSON}),
    ("retrieve", "", {"query": ("accept",), "gives": _instances()}),
    ("bulk data", "/frames/{frames}", {"query": ("accept",), "gives": _frames()}),
    ("bulk data", "", {"query": ("accept",), "gives": _parts(OCTETS, ("*",))}),
    ("rendered", "/thumbnail", {"query": ("accept", "viewport"), "gives": _RENDERED}),
    (
        "rendered",
        "",
        {
            "query": ("accept", "annotation", "quality", "viewport", "window"),
            "gives": _RENDERED,
        },
    ),
    (
        "store",
        "",
        {
            "accepts": (
                f'{MULTIPART}; type="{DICOM}"',
                f'{MULTIPART}; type="{DICOM_JSON}"',
                DICOM,
            ),
            "gives": (DICOM_JSON, DICOM_XML),
        },
    ),
)
_EXTENSIONS: Final = ("/count", "/bundle", "/pixeldata", "/capabilities")
_NOT_LISTED: Final = frozenset(("HEAD", "OPTIONS"))


def _described(route: Route, tag: str, name: str) -> Method:
    known: Mapping[str, Any] = {}
    for of_tag, ending, entry in _TABLE:
        if of_tag == tag and route.path.endswith(ending):
            known = entry
            break
    text = (route.endpoint.__doc__ or "").strip().partition("\n")[0]
    if route.path.endswith(_EXTENSIONS) or name == "DELETE":
        text += " (extension)"
    return Method(name, _camel(route.name), text, **known)


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _routes() -> Iterator[Route]:
    """Yield the routes of DICOMweb, without the prefix they are served under."""
    # Imported here: that module names this one.
    from pacs.web.routes import DICOMWEB

    for one in DICOMWEB:
        for route in one.routes:
            if isinstance(route, Route):
                yield route


def tree(routes: Iterable[Route], base: str) -> Resource:
    """Return the resources below a path."""
    root = Resource(base)
    for route in routes:
        segments = route.path.split("/")
        # A converter says how a segment is read, not what it is called.
        names = [re.sub(r":.*(?=})", "", segment) for segment in segments if segment]
        here = root.at(names)
        tags = getattr(route, "tags", None) or [""]
        for name in sorted((route.methods or set()) - _NOT_LISTED):
            here.methods.append(_described(route, str(tags[0]), name))
    return root


def wadl(root: Resource, address: str) -> bytes:
    """Return the tree as a Web Application Description (PS3.18 H.1)."""
    body = "".join(map(_xml, root.below.values()))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<application xmlns="{NAMESPACE}">'
        f"<resources base={quoteattr(address)}>{body}</resources></application>"
    ).encode()


def _xml(resource: Resource) -> str:
    name = resource.path
    own = ""
    if name.startswith("{"):
        own = f'<param name={quoteattr(name[1:-1])} style="template" required="true"/>'
    methods = "".join(map(_xml_method, resource.methods))
    below = "".join(map(_xml, resource.below.values()))
    return f"<resource path={quoteattr(name)}>{own}{methods}{below}</resource>"


def _xml_method(method: Method) -> str:
    query = "".join(
        f'<param name={quoteattr(name)} style="query"/>' for name in method.query
    )
    takes = "".join(
        f"<representation mediaType={quoteattr(kind)}/>" for kind in method.accepts
    )
    gives = "".join(
        f"<representation mediaType={quoteattr(kind)}/>" for kind in method.gives
    )
    accept = ""
    if method.gives and method.name == "GET":
        options = "".join(f"<option value={quoteattr(kind)}/>" for kind in method.gives)
        accept = (
            f'<param name="Accept" style="header" default={quoteattr(method.gives[0])}>'
            f"{options}</param>"
        )
    return (
        f"<method name={quoteattr(method.name)} id={quoteattr(method.identifier)}>"
        f"<doc title={quoteattr(method.title)}/>"
        f"<request>{accept}{query}{takes}</request>"
        f"<response>{gives}</response></method>"
    )


def plain(root: Resource, address: str) -> dict[str, Any]:
    """Return the tree as JSON, with the names of WADL."""
    return {
        "application": {
            "resources": {
                "@base": address,
                "resource": [_plain(one) for one in root.below.values()],
            }
        }
    }


def _plain(resource: Resource) -> dict[str, Any]:
    methods = [
        {
            "@name": method.name,
            "@id": method.identifier,
            "doc": method.title,
            "request": {
                "param": [{"@name": name, "@style": "query"} for name in method.query],
                "representation": [{"@mediaType": kind} for kind in method.accepts],
            },
            "response": {
                "representation": [{"@mediaType": kind} for kind in method.gives]
            },
        }
        for method in resource.methods
    ]
    made: dict[str, Any] = {"@path": resource.path}
    if methods:
        made["method"] = methods
    if resource.below:
        made["resource"] = [_plain(one) for one in resource.below.values()]
    return made


@context
@dataclass(frozen=True, slots=True)
class _Asked:
    """What the routes need."""

    request: Request
    actor: Annotated[Actor, Depends(current_actor)]
    policy: Annotated[Policy, Depends(access_policy)]
    base_url: Annotated[BaseUrl, Depends(base_url)]


Asked = Annotated[_Asked, Depends()]


@readable(router, "/capabilities")
def capabilities(asked: Asked) -> Response:
    """Retrieve what this server offers."""
    return _answer(asked)


@readable(router, "")
def service(asked: Asked) -> Response:
    """Retrieve what this server offers, as at ``capabilities``."""
    return _answer(asked)


def options(asked: Asked) -> Response:
    """Retrieve what this server offers, and which methods a resource has."""
    response = _answer(asked)
    wanted = asked.request.scope["path"].removeprefix(PREFIX)
    allowed = {"OPTIONS"}
    for route in _routes():
        if route.path_regex.match(wanted):
            allowed |= route.methods or set()
    response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def answer_options(paths: Iterable[str]) -> None:
    """Answer `OPTIONS` of these resources; what is not there stays unknown."""
    for path in dict.fromkeys(("", "/", *paths)):
        router.add_api_route(
            path, options, methods=["OPTIONS"], include_in_schema=False
        )


def _answer(asked: _Asked) -> Response:
    asked.policy.require(asked.actor, "find")
    form = choose(accept_of(asked.request), OFFERS)
    address = f"{asked.base_url.of(asked.request)}{PREFIX}"
    root = tree(_routes(), PREFIX)
    if form.media_type in _XML_TYPES:
        body, kind = wadl(root, address), WADL
    else:
        body, kind = orjson.dumps(plain(root, address)), JSON
    headers = {
        "Content-Type": kind,
        "Vary": "Accept, Accept-Encoding",
        "Cache-Control": "private, max-age=300",
    }
    text, headers = coded(asked.request, body, headers)
    return Response(text, headers=headers)
