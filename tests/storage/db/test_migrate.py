"""Migrations, up and down, on both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import inspect, text

import gateway.identity.tables
import pacs.repository.tables
import storage.db.tables
from storage.db import migrate
from storage.db.base import Base
from storage.db.engine import Database, one_off
from storage.kernel.errors import (
    Conflict,
    CorruptData,
    DependencyDown,
    InvalidParameter,
    NewerSchema,
)

#: Importing them registers their tables.
TABLES = (storage.db.tables, pacs.repository.tables, gateway.identity.tables)


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


def tables(url: str) -> set[str]:
    engine = one_off(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def execute(url: str, statement: str) -> None:
    engine = one_off(url)
    try:
        with engine.begin() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()


def test_upgrade_makes_every_table_and_agrees_with_the_models(url: str) -> None:
    reached = migrate.upgrade(url)

    assert reached == migrate.head()
    assert tables(url) == set(Base.metadata.tables) | {migrate.VERSION_TABLE}
    assert migrate.check(url) == []


def test_upgrade_twice_changes_nothing(url: str) -> None:
    migrate.upgrade(url)
    execute(url, "INSERT INTO tenant (key, name, created_us) VALUES ('a', '', 1)")

    assert migrate.upgrade(url) == migrate.head()
    migrate.require_current(url)


def test_down_and_up_again(url: str) -> None:
    migrate.upgrade(url)

    migrate.downgrade(url, "base")

    assert tables(url) <= {migrate.VERSION_TABLE}
    assert migrate.current(url) is None
    assert migrate.upgrade(url) == migrate.head()
    assert migrate.check(url) == []


def test_downgrade_that_would_lose_rows_is_refused(url: str) -> None:
    migrate.upgrade(url)
    execute(url, "INSERT INTO tenant (key, name, created_us) VALUES ('a', '', 1)")

    with pytest.raises(Conflict, match="tenant holds rows"):
        migrate.downgrade(url, "base")

    assert migrate.current(url) == migrate.head()


def test_d09_an_index_of_a_newer_version_is_refused(url: str) -> None:
    migrate.upgrade(url)
    execute(url, "UPDATE alembic_version SET version_num = '9999'")

    for action in (migrate.upgrade, migrate.require_current):
        with pytest.raises(NewerSchema, match="9999"):
            action(url)


def test_an_old_index_names_the_command_that_helps(url: str) -> None:
    with pytest.raises(Conflict, match="huying db upgrade"):
        migrate.require_current(url)


def test_a_missing_column_is_found(url: str) -> None:
    migrate.upgrade(url)
    execute(url, "ALTER TABLE tenant DROP COLUMN name")

    assert any("tenant" in line and "name" in line for line in migrate.check(url))


def test_asking_for_the_revision_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "index.db"

    assert migrate.current(f"sqlite:///{path}") is None
    assert not path.exists()


def test_a_database_that_is_down_is_named() -> None:
    with pytest.raises(DependencyDown):
        migrate.upgrade("postgresql://nobody@127.0.0.1:1/none")


def test_a_file_that_is_no_index_is_named(tmp_path: Path) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(b"not an index " * 1000)

    with pytest.raises(CorruptData, match=r"index\.db is damaged or no index"):
        migrate.upgrade(f"sqlite:///{path}")


@pytest.mark.parametrize("url", ["nothing", "unheard://of", "mysql://host/name"])
def test_an_address_that_cannot_be_used_is_named(url: str) -> None:
    with pytest.raises(InvalidParameter, match=r"database\.url"):
        migrate.upgrade(url)


def test_the_migrated_index_takes_rows(url: str) -> None:
    migrate.upgrade(url)
    database = Database(url)
    try:
        with database.write() as connection:
            connection.execute(
                text("INSERT INTO tenant (key, name, created_us) VALUES ('a','',1)")
            )
        with database.read() as connection:
            assert connection.scalar(text("SELECT count(*) FROM tenant")) == 1
    finally:
        database.close()
