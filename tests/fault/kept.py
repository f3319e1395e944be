"""Storing one object in a node of its own, and looking at what was kept."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

from sqlalchemy import text

from tests.fault.doors import Archive
from tests.fault.objects import (
    EXPLICIT,
    Objects,
)

O = Objects(1)  # noqa: E741  as in the table: objects


def keep(archive: Archive, body: bytes, syntax: str = EXPLICIT, **meta: Any) -> Any:
    """Store a data set; return its row."""
    assert archive.send(O.file(body, syntax, **meta)).kind.is_kept
    return archive.find(O.instance_uid)


def metadata(archive: Archive) -> dict[str, Any]:
    raw = archive.retrieve.metadata(archive.find(O.instance_uid))
    parsed: dict[str, Any] = json.loads(raw, parse_constant=_no_constant)
    return parsed


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def served(archive: Archive, syntax: str | None = None) -> bytes:
    stored = archive.find(O.instance_uid)
    return b"".join(archive.retrieve.part10(stored, syntax).chunks)


def column(archive: Archive, table: str, name: str) -> Any:
    with archive.database.read() as connection:
        return connection.execute(text(f"SELECT {name} FROM {table}")).scalar_one()  # noqa: S608


def peak_of(act: Any) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
