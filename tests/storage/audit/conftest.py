"""A database and a trail, on one engine after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.audit import AuditTrail
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrate.upgrade(database_url)
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def trail(database: Database, folder: Path) -> Iterator[AuditTrail]:
    trail = AuditTrail(database, SystemClock(), folder)
    yield trail
    trail.close()
