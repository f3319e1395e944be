"""Connections to the index: SQLite in the data folder, or PostgreSQL.

Three ways in, by what a commit promises:

* `read`   a consistent snapshot; never writes.
* `write`  commits with full sync: accounts, relay, deletions, jobs.
* `ingest` commits without waiting for the disk, because the synced pack is the log
  the index derives from (`synchronous=NORMAL`, ``synchronous_commit=off``).

Open one `Database` per process, after forking.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool, QueuePool

from storage.kernel.errors import DependencyDown, LostRace, StorageFull

BUSY_TIMEOUT_MS = 30_000
#: The worker checkpoints; this is only the fallback while it is down.
WAL_AUTOCHECKPOINT_PAGES = 25_000
#: Names, birth dates and hashes of passwords are for the node and its group only.
FOLDER_MODE = 0o750
FILE_MODE = 0o640


class Database:
    """The index database of one process.

    Values of statements never reach an error's text: they may be names and birth
    dates.

    Parameters
    ----------
    url : str
        SQLAlchemy URL.
    pool_size : int
        Connections kept for `read` and `write` each.
    """

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        parsed = parse_url(url)
        self.url = parsed
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self._thread_lock = threading.Lock()
        self._lock_fd: int | None = None
        self._ingest_connection: Connection | None = None
        if self.is_sqlite:
            path = Path(parsed.database or "")
            make_private(path)
            self._lock_path = path.with_suffix(".lock")
            self._reader = self._sqlite("DEFERRED", "FULL", pool_size)
            self._writer = self._sqlite("IMMEDIATE", "FULL", 1)
            self._ingest = self._sqlite("", "NORMAL", 1)
        else:
            self._reader = self._writer = self._ingest = create_engine(
                parsed,
                hide_parameters=True,
                pool_size=pool_size,
                max_overflow=pool_size * 2,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 10},
            )

    @property
    def engine(self) -> Engine:
        """The engine of full-sync writes, for migrations and tools."""
        return self._writer

    def _sqlite(self, begin: str, synchronous: str, size: int) -> Engine:
        engine = create_engine(
            self.url,
            poolclass=QueuePool,
            hide_parameters=True,
            pool_size=size,
            max_overflow=20,
            connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1e3},
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: sqlite3.Connection, _record: object) -> None:
            # SQLAlchemy's begin event below opens transactions, not the driver.
            connection.isolation_level = None
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute(f"PRAGMA synchronous={synchronous}")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
            cursor.execute("PRAGMA cache_size=-8000")
            cursor.execute(f"PRAGMA wal_autocheckpoint={WAL_AUTOCHECKPOINT_PAGES}")
            cursor.close()

        if begin:

            @event.listens_for(engine, "begin")
            def _begin(connection: Connection) -> None:
                connection.exec_driver_sql(f"BEGIN {begin}")

        return engine

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection that sees one snapshot.

        Raises
        ------
        DependencyDown
            If the database does not answer.
        """
        with _translated(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def glance(self) -> Iterator[Connection]:
        """Yield a connection for look-ups that need no common snapshot.

        For the receive path: with SQLite it is the one that `ingest` keeps, which is
        had at a tenth of the price of `read`.
        """
        if not self.is_sqlite:
            with self.read() as connection:
                yield connection
            return
        with _translated(), self._thread_lock:
            yield self._kept_connection()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction; commit with full sync on exit."""
        with _translated(), self._serialised(), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def ingest(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that need not be synced."""
        if self.is_sqlite:
            with _translated(), self._serialised(), self._kept() as connection:
                yield connection
            return
        with _translated(), self._ingest.begin() as connection:
            connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
            yield connection

    @contextmanager
    def _kept(self) -> Iterator[Connection]:
        """Yield SQLite's one ingest connection in a transaction.

        It stays checked out: taking it from the pool and giving it back would cost
        as much as the rows of an instance. Queued by `_serialised`.
        """
        connection = self._kept_connection()
        raw: Any = connection.connection.driver_connection
        raw.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            raw.execute("COMMIT")
        except BaseException:
            if raw.in_transaction:
                raw.rollback()
            raise
        finally:
            if connection.in_transaction():
                # What the toolkit took for a transaction of its own.
                connection.rollback()

    def _kept_connection(self) -> Connection:
        if self._ingest_connection is None:
            self._ingest_connection = self._ingest.connect()
        return self._ingest_connection

    @contextmanager
    def _serialised(self) -> Iterator[None]:
        """Queue writers of all processes on a file lock.

        SQLite's own busy handler polls with growing sleeps; a blocking lock wakes
        the next writer at once.
        """
        if not self.is_sqlite:
            yield
            return
        with self._thread_lock:
            if self._lock_fd is None:
                self._lock_fd = os.open(
                    self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
                )
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    def checkpoint(self) -> None:
        """Move SQLite's write-ahead log into the database file; a no-op elsewhere."""
        if self.is_sqlite:
            with _translated(), self._reader.connect() as connection:
                raw = connection.connection.driver_connection
                raw.execute("PRAGMA wal_checkpoint(PASSIVE)")  # type: ignore[union-attr]

    def ping(self) -> None:
        """Read, and take the right to write, once; nothing is changed.

        Raises
        ------
        DependencyDown
        """
        with self.write() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        if self._ingest_connection is not None:
            self._ingest_connection.close()
            self._ingest_connection = None
        for engine in {self._reader, self._writer, self._ingest}:
            engine.dispose()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


@contextmanager
def _translated() -> Iterator[None]:
    """Turn a database that is down or full into our own errors."""
    try:
        yield
    except OperationalError as error:
        if isinstance(
            error.orig,
            psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure,
        ):
            raise LostRace("database: lost a race") from error
        if _is_full(str(error.orig)):
            raise StorageFull("database: no space left") from error
        raise DependencyDown("database does not answer") from error
    except PoolTimeout as error:
        raise DependencyDown("database: all connections are in use") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DependencyDown("database connection lost") from error
        raise
    except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure) as e:
        raise LostRace("database: lost a race") from e
    except (sqlite3.OperationalError, psycopg.OperationalError) as error:
        # Raised by statements that went to the driver directly.
        if _is_full(str(error)):
            raise StorageFull("database: no space left") from error
        raise DependencyDown("database does not answer") from error


def _is_full(detail: str) -> bool:
    return "database or disk is full" in detail or "No space left" in detail


def make_private(path: Path) -> None:
    """Make an SQLite file that only its owner and group may read, and its folder.

    What is there already stays as it is. SQLite takes an empty file for a new
    database, and gives ``-wal`` and ``-shm`` the mode of the file they belong to: so
    none of them is ever open to others.
    """
    path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    # Never opens a file that is there: closing it would drop the locks that SQLite
    # holds on it in this process. What else is wrong, SQLite says when it opens it.
    with suppress(OSError):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(path, flags, FILE_MODE))


def parse_url(url: str) -> URL:
    """Return `url` with the driver we use for its database."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def one_off(url: str) -> Engine:
    """Return an engine without a pool, for migrations and checks."""
    return create_engine(parse_url(url), poolclass=NullPool)
