"""A closed node for each test, on SQLite; `any_site` is one on each engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.accounts import Site, closed_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with closed_site(tmp_path / "data") as made:
        yield made


@pytest.fixture
def any_site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    with closed_site(tmp_path / "data", url=database_url) as made:
        yield made
