"""Who may read the files of an embedded node."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from storage.db import migrate
from storage.db.engine import Database
from storage.jobs.runner import JobRunner


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Return the mode of each file in a folder, and of the folder as ``.``."""
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    return {".": stat.S_IMODE(folder.stat().st_mode), **found}


@pytest.mark.parametrize("first", ["migration", "connection"])
def test_index_log_and_folder_are_not_for_others(tmp_path: Path, first: str) -> None:
    folder = tmp_path / "data"
    url = f"sqlite:///{folder / 'index.db'}"
    if first == "migration":
        migrate.upgrade(url)
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("CREATE TABLE one (two INTEGER)"))

    found = modes(folder)
    database.close()

    assert found == {
        ".": 0o750,
        "index.db": 0o640,
        "index.db-wal": 0o640,
        "index.db-shm": 0o640,
        "index.lock": 0o600,
    }


def test_jobs_are_not_for_others(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    runner = JobRunner(f"sqlite:///{folder / 'jobs.db'}")
    runner.start()
    try:
        found = modes(folder)
    finally:
        runner.stop()

    assert found["."] == 0o750
    assert {"jobs.db", "jobs.db-wal"} <= found.keys()
    assert all(mode & stat.S_IRWXO == 0 for mode in found.values())


def test_what_is_there_keeps_its_mode_and_its_content(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'index.db'}"
    migrate.upgrade(url)
    (tmp_path / "index.db").chmod(0o660)
    tmp_path.chmod(0o755)

    Database(url).close()

    assert modes(tmp_path)["index.db"] == 0o660
    assert modes(tmp_path)["."] == 0o755
    assert migrate.current(url) == migrate.head()
