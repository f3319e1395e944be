"""A node's services behind the viewer's endpoints, on a real HTTP listener."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request

from gateway import viewing
from gateway.viewing import Views
from storage.kernel.types import Actor
from tests.support.archive import Archive, archive
from tests.support.dicomweb import actor_of, application, given, serving
from tests.support.web import Response, request
from viewer import endpoints


@dataclass
class Viewing:
    """An archive, what its endpoints stand on, and their address."""

    archive: Archive
    views: Views
    base: str

    def get(self, path: str, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return request(f"{self.base}{endpoints.PREFIX}{path}", headers=named)

    def json(self, path: str) -> Any:
        answer = self.get(path)
        assert answer.status == 200, answer.text
        return answer.json()

    def render(self, asked: Mapping[str, Any], body: bytes | None = None) -> Response:
        """Ask for a picture; `study` and `series` belong into the address."""
        named = {name: asked[name] for name in ("study", "series") if name in asked}
        rest = {name: value for name, value in asked.items() if name not in named}
        data = json.dumps(rest).encode() if body is None else body
        return self.post(f"/render?{urlencode(named)}", data)

    def post(self, path: str, body: bytes = b"") -> Response:
        return request(f"{self.base}{endpoints.PREFIX}{path}", method="POST", body=body)


@contextmanager
def viewing_archive(folder: Path, **settings: Any) -> Iterator[Viewing]:
    """Serve the viewer's endpoints over an empty archive below `folder`."""

    async def current_actor(request: Request) -> Actor:
        return actor_of(request)

    with archive(folder, **settings) as made:
        views = made.node.views
        app = application(
            [("", endpoints.router)],
            viewing.dependencies(views, made.node.policy, current_actor, given),
        )
        with serving(app) as base:
            yield Viewing(made, views, base)
