"""Direct routes: dependencies made once, errors answered as by any other route."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, Request, Response

from pacs.web.dependencies import context, readable
from pacs.web.direct import DirectRoute, _endpoint_plan
from storage.kernel.errors import MalformedObject, NotFound
from tests.support.dicomweb import application, serving
from tests.support.web import request

router = APIRouter(route_class=DirectRoute)


async def greeting() -> str:
    """Return a greeting. The application replaces this dependency."""
    raise NotImplementedError


async def asked_path() -> str:
    """Return what was asked for. The application replaces this dependency."""
    raise NotImplementedError


@context
@dataclass(frozen=True, slots=True)
class Inner:
    """What is nested."""

    greeting: Annotated[str, Depends(greeting)]


@context
@dataclass(frozen=True, slots=True)
class Outer:
    """What routes take."""

    request: Request
    inner: Annotated[Inner, Depends()]
    path: Annotated[str, Depends(asked_path)]


Asked = Annotated[Outer, Depends()]


@readable(router, "/{name}/say")
def say(asked: Asked, name: str) -> Response:
    """Answer with what came from everywhere."""
    said = f"{asked.inner.greeting} {name} {asked.path} {asked.request.method}"
    return Response(said)


@readable(router, "/{name}/fail")
def fail(asked: Asked, name: str) -> Response:
    """Fail as the name says."""
    raise {"stored": MalformedObject("no LUT"), "missing": NotFound("no frame")}[name]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    async def hello() -> str:
        return "hello"

    async def path_of(request: Request) -> str:
        return request.url.path

    app = application([("/x", router)], {greeting: hello, asked_path: path_of})
    with serving(app) as base:
        yield f"{base}/x"


def test_dependencies_come_from_the_application_and_the_request(url: str) -> None:
    assert request(f"{url}/you/say").text == "hello you /x/you/say GET"
    assert request(f"{url}/a%20b/say").text == "hello a b /x/a b/say GET"
    assert request(f"{url}/you/say", method="HEAD").status == 200


def test_errors_are_answered_as_elsewhere(url: str) -> None:
    assert request(f"{url}/stored/fail").status == 422
    assert request(f"{url}/missing/fail").json()["detail"] == "no frame"
    assert request(f"{url}/you/say", method="PUT").status == 405
    assert request(f"{url}/you").status == 404


def test_an_endpoint_that_takes_something_else_is_refused() -> None:
    def number(asked: int) -> Response:
        raise NotImplementedError

    def bare(asked: Annotated[Any, Depends(greeting)]) -> Response:
        raise NotImplementedError

    for endpoint in (number, bare):
        with pytest.raises(TypeError):
            _endpoint_plan(endpoint)
