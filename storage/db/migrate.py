"""Bring the index to the schema this version knows, and tell where it stands.

Commands take the index' SQLAlchemy URL and need no configuration file. All
revisions of one command run in one transaction, under a lock: processes of several
machines may start together.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, event, inspect, text
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from storage.db.base import Base
from storage.db.engine import BUSY_TIMEOUT_MS, make_private, one_off, parse_url
from storage.kernel.errors import (
    Conflict,
    CorruptData,
    DependencyDown,
    InvalidParameter,
    NewerSchema,
)

FOLDER = Path(__file__).parent / "migrations"
#: Key of the advisory lock (PostgreSQL); any constant does.
LOCK_KEY = 0x68757969
VERSION_TABLE = "alembic_version"


def head() -> str:
    """Return the revision this version of the code needs."""
    return _scripts().get_current_head() or ""


def current(url: str) -> str | None:
    """Return the revision of the index, or None when it is empty.

    Raises
    ------
    DependencyDown
        If the database does not answer.
    """
    if _is_missing(url):
        return None
    with _connection(url) as connection:
        return _revision(connection)


def upgrade(url: str) -> str:
    """Apply every missing revision; return the revision reached.

    Raises
    ------
    NewerSchema
        The index belongs to a newer version; nothing was changed.
    CorruptData
        The file is damaged, or no SQLite database.
    InvalidParameter
        The address names no database that can be used.
    DependencyDown
    """
    with _locked(url) as connection:
        _refuse_newer(connection)
        command.upgrade(_config(connection), "head")
        return _revision(connection) or ""


def downgrade(url: str, revision: str) -> None:
    """Take revisions back down to `revision` (``"base"``: all of them).

    Raises
    ------
    Conflict
        ``base`` would drop tables that hold rows.
    """
    with _locked(url) as connection:
        _refuse_newer(connection)
        if revision == "base":
            _refuse_loss(connection)
        command.downgrade(_config(connection), revision)


def require_current(url: str) -> None:
    """Refuse an index this version cannot work with.

    Raises
    ------
    NewerSchema
        It was written by a newer version.
    Conflict
        It is older and has to be upgraded first.
    """
    with _connection(url) as connection:
        _refuse_newer(connection)
        found = _revision(connection)
        if found != head():
            raise Conflict(
                f"the index is at revision {found or 'none'} and this version needs"
                f" {head()}: run `huying db upgrade`"
            )


def check(url: str) -> list[str]:
    """Compare the database with the tables that are imported now.

    Returns
    -------
    list of str
        One line for each difference; empty when they agree.
    """
    with _connection(url) as connection:
        context = MigrationContext.configure(
            connection,
            opts={"compare_type": True, "target_metadata": Base.metadata},
        )
        return [_describe(found) for found in compare_metadata(context, Base.metadata)]


def _is_missing(url: str) -> bool:
    """Tell whether `url` names an SQLite file that does not exist yet."""
    parsed = parse_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    return sqlite and not Path(parsed.database or "").exists()


def _describe(difference: Any) -> str:
    """Put Alembic's nested tuples into a line."""
    if isinstance(difference, list):
        return "; ".join(_describe(one) for one in difference)
    return " ".join(str(part) for part in difference if part is not None)


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(None))


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = Base.metadata
    return config


def _engine(url: str) -> Engine:
    try:
        engine = one_off(url)
    except (ArgumentError, ImportError) as error:
        raise InvalidParameter(
            "database.url", "is not sqlite:///FILE or postgresql://..."
        ) from error
    if engine.dialect.name == "sqlite":
        make_private(Path(engine.url.database or ""))

        @event.listens_for(engine, "connect")
        def _configure(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            cursor.execute("PRAGMA journal_mode=WAL")
            # Copying a table drops the old one; its rows' children must stay.
            cursor.execute("PRAGMA foreign_keys=OFF")
            cursor.close()

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


@contextmanager
def _connection(url: str) -> Iterator[Connection]:
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            yield connection
    except OperationalError as error:
        raise DependencyDown("database does not answer") from error
    except DatabaseError as error:
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code not in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}:
            raise
        raise CorruptData(
            f"{engine.url.database} is damaged or no index: move it away, then"
            " `huying verify --rebuild-index` makes it anew"
        ) from error
    finally:
        engine.dispose()


@contextmanager
def _locked(url: str) -> Iterator[Connection]:
    """Yield a connection in a transaction that no other migration shares."""
    with _connection(url) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(
                text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY}
            )
        yield connection


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(connection: Connection) -> None:
    found = _revision(connection)
    known = {script.revision for script in _scripts().walk_revisions()}
    if found is not None and found not in known:
        raise NewerSchema(
            f"the index has revision {found}, which this version does not know:"
            " start the newer version, or restore a backup made by this one"
        )


def _refuse_loss(connection: Connection) -> None:
    for table in inspect(connection).get_table_names():
        if table == VERSION_TABLE:
            continue
        quoted = connection.dialect.identifier_preparer.quote(table)
        if connection.execute(text(f"SELECT 1 FROM {quoted} LIMIT 1")).first():  # noqa: S608
            raise Conflict(f"downgrade refused: {table} holds rows that would be lost")
