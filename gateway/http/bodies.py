"""Small JSON bodies, read within bounds; what is wrong in them is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response

from pacs.web.request_body import read_body
from storage.kernel.errors import InvalidParameter

MAX_BODY = 64 * 1024
BODY_SECONDS = 10.0
MAX_TEXT = 1024
MAX_ITEMS = 256


def json_answer(body: Any, status: int = 200) -> Response:
    """Return `body` as JSON that nobody keeps."""
    return Response(
        orjson.dumps(body),
        status_code=status,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


async def read_object(request: Request) -> dict[str, Any]:
    """Read a small JSON object.

    Raises
    ------
    InvalidParameter
        Not declared as JSON (a form of another site cannot be), or none.
    TooLarge
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidParameter("Content-Type", "application/json is needed")
    body = bytearray()
    async for chunk in read_body(request, allowed=MAX_BODY, seconds=BODY_SECONDS):
        body += chunk
    try:
        found = orjson.loads(body)
    except ValueError as error:
        raise InvalidParameter("body", "is not JSON") from error
    if not isinstance(found, dict):
        raise InvalidParameter("body", "is not a JSON object")
    return found


@dataclass(slots=True)
class Fields:
    """The members of a JSON object, each taken once.

    Raises
    ------
    InvalidParameter
        By every method, naming the member.
    """

    members: dict[str, Any]

    def text(self, name: str, default: str | None = None, most: int = MAX_TEXT) -> str:
        """Take a string; without a default it must be there."""
        value = self.members.pop(name, default)
        if value is None:
            raise InvalidParameter(name, "is missing")
        if not isinstance(value, str) or len(value) > most:
            raise InvalidParameter(name, f"is not a string of at most {most}")
        if "\0" in value:
            # No text column of PostgreSQL takes it.
            raise InvalidParameter(name, "holds a NUL character")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        value = self.members.pop(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidParameter(name, "is not a number")
        return float(value)

    def words(
        self, name: str, default: tuple[str, ...] | None = None
    ) -> tuple[str, ...]:
        """Take a list of strings."""
        value = self.members.pop(name, default)
        if value is None:
            raise InvalidParameter(name, "is missing")
        if (
            not isinstance(value, list | tuple)
            or len(value) > MAX_ITEMS
            or not all(
                isinstance(one, str) and len(one) <= MAX_TEXT and "\0" not in one
                for one in value
            )
        ):
            raise InvalidParameter(
                name, f"is not a list of at most {MAX_ITEMS} strings"
            )
        return tuple(value)

    def objects(self, name: str) -> tuple[Mapping[str, Any], ...]:
        """Take a list of objects; none by default."""
        value = self.members.pop(name, [])
        if (
            not isinstance(value, list)
            or len(value) > MAX_ITEMS
            or not all(isinstance(one, dict) for one in value)
        ):
            raise InvalidParameter(name, "is not a list of objects")
        return tuple(value)

    def end(self) -> None:
        """Refuse members that nobody took."""
        for name in self.members:
            raise InvalidParameter(name[:40], "is not known here")
