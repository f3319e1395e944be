"""Routes that cost less than the picture they answer with.

FastAPI resolves the dependencies of each request anew, and while an application
replaces some, it looks at every signature again: more work than rendering a slice. A
`DirectRoute` has its plan made once. It is declared, documented and matched as any
other route; its endpoint takes a class of dependencies (`dependencies.context`)
and parts of the path as text, nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import Request
from fastapi.params import Depends
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from pacs.web.dependencies import StoredRoute
from pacs.web.problems import problem
from storage.kernel.errors import MalformedObject

Overrides = Mapping[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How an instance of `kind` is made: its fields in their order.

    Each comes from the request itself (None), a dependency, or another class.
    """

    kind: Callable[..., Any]
    parts: tuple[Callable[..., Any] | _Plan | None, ...]

    async def make(self, request: Request, overrides: Overrides) -> Any:
        values: list[Any] = []
        for part in self.parts:
            if part is None:
                values.append(request)
            elif isinstance(part, _Plan):
                values.append(await part.make(request, overrides))
            else:
                values.append(await _given(part, request, overrides))
        return self.kind(*values)


async def _given(
    dependency: Callable[..., Any], request: Request, overrides: Overrides
) -> Any:
    call = overrides.get(dependency, dependency)
    return await (call(request) if _takes_request(call) else call())


@cache
def _takes_request(call: Callable[..., Any]) -> bool:
    return bool(inspect.signature(call).parameters)


@cache
def _plan_of(kind: Callable[..., Any]) -> _Plan:
    if not is_dataclass(kind):
        raise TypeError(f"{kind!r} is no class of dependencies")
    hints = get_type_hints(kind, include_extras=True)
    return _Plan(kind, tuple(_part(hints[field.name]) for field in fields(kind)))


def _part(hint: Any) -> Callable[..., Any] | _Plan | None:
    if hint is Request:
        return None
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        for mark in marks:
            if isinstance(mark, Depends):
                return mark.dependency or _plan_of(kind)
    raise TypeError(f"{hint!r} is neither the request nor a dependency")


@cache
def _endpoint_plan(endpoint: Callable[..., Any]) -> tuple[str, _Plan]:
    hints = get_type_hints(endpoint, include_extras=True)
    name = next(iter(inspect.signature(endpoint).parameters))
    plan = _part(hints[name])
    if not isinstance(plan, _Plan):
        raise TypeError(f"{endpoint!r} takes no class of dependencies first")
    return name, plan


class DirectRoute(StoredRoute):
    """A route that calls its endpoint without the framework in between."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] not in (self.methods or ()):
            # 405, with the methods there are.
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive, send)
        name, plan = _endpoint_plan(self.endpoint)
        overrides: Overrides = scope["app"].dependency_overrides
        context = await plan.make(request, overrides)
        given = {name: context, **scope["path_params"]}
        try:
            response = await run_in_threadpool(self.endpoint, **given)
        except MalformedObject as error:
            response = problem(422, error.code, str(error))
        await response(scope, receive, send)
