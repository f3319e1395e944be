"""What the DICOMweb routes need from the application, which replaces each of these."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from pacs.web.leaving import watched
from pacs.web.problems import problem
from storage.kernel.errors import InvalidParameter, MalformedObject
from storage.kernel.types import Actor


class Policy(Protocol):
    """Who may do what."""

    def require(self, actor: Actor, action: str) -> None:
        """Raise NotAllowed unless `actor` may do `action`."""
        ...


async def current_actor() -> Actor:
    """Return who asks."""
    raise NotImplementedError


async def access_policy() -> Policy:
    """Return who may do what."""
    raise NotImplementedError


#: A name or an address, and a port: what may stand in an address that we write.
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """What addresses that we write begin with (PS3.18 10.5.3, 10.6.3).

    Metadata keep bulk data references without it, as paths that clients resolve
    against the address they asked for: so one body serves every name of this node.

    Attributes
    ----------
    configured : str
        ``http.external_url`` without a slash at its end.
    from_host : bool
        Without one, the request's own ``Host`` is taken: someone checks it before.
        Else addresses stay paths.
    """

    configured: str = ""
    from_host: bool = False

    def of(self, request: Request) -> str:
        """Return the beginning of the addresses in the answer to `request`."""
        if self.configured or not self.from_host:
            return self.configured
        host = request.headers.get("host", "")
        if len(host) > 255 or _HOST.fullmatch(host) is None:
            return ""
        return f"{request.scope['scheme']}://{host}"


async def base_url() -> BaseUrl:
    """Return what absolute addresses begin with."""
    raise NotImplementedError


_UID_CHARACTERS = frozenset(
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz._-"
)


def path_uid(name: str, value: str) -> str:
    """Return a UID of the path.

    Tolerates: UIDs that are no UIDs, for archives that accepted them.

    Raises
    ------
    InvalidParameter
        It could not be one, whatever the archive accepts.
    """
    if not 0 < len(value) <= 64 or not _UID_CHARACTERS.issuperset(value):
        raise InvalidParameter(name, "not a UID")
    return value


Context = TypeVar("Context", bound=type)


def context(kind: Context) -> Context:
    """Resolve the annotations of a class of dependencies once.

    While an application replaces dependencies, FastAPI looks at the signature of each
    for every request; evaluating annotations again and again costs more than a frame.
    """
    kind.__signature__ = inspect.signature(kind, eval_str=True)  # type: ignore[attr-defined]
    return kind


#: Nothing but their client's leaving comes after the head of such a request.
WITHOUT_BODY = frozenset(("GET", "HEAD"))


class StoredRoute(APIRoute):
    """A route whose request is right even where what is stored cannot be read: 422."""

    def get_route_handler(
        self,
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                if request.method in WITHOUT_BODY:
                    return await watched(request, handler)
                return await handler(request)
            except MalformedObject as error:
                return problem(422, error.code, str(error))

        return handle


Route = TypeVar("Route", bound=Callable[..., Any])


def readable(router: APIRouter, path: str) -> Callable[[Route], Route]:
    """Register a route for GET and HEAD; only the first is in the description."""

    def register(route: Route) -> Route:
        router.add_api_route(path, route, methods=["GET"])
        router.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)
        return route

    return register
