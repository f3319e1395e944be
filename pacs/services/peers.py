"""Remote AEs: those of the settings file, and those added at run time."""

from __future__ import annotations

import builtins
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import orjson
from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from pacs.repository.tables import Peer
from pacs.services.policy import Action, KnownPeer
from storage.audit import AuditEvent
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    Conflict,
    DependencyDown,
    InvalidParameter,
    NotFound,
    TooLarge,
    Unavailable,
)
from storage.kernel.settings import PeerSettings

#: What a peer can be allowed to do here.
GRANTS = frozenset(
    {
        Action.ECHO,
        Action.STORE,
        Action.FIND,
        Action.GET,
        Action.MOVE,
        Action.COMMIT,
    }
)
#: How long other processes may go on with what they have read.
CACHE_SECONDS = 1.0
MAX_PEERS = 10_000

_TITLE = re.compile(r"[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?\Z")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}\Z")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


class Trail(Protocol):
    """The audit trail."""

    def record_in(
        self, connection: Connection, event: AuditEvent
    ) -> Callable[[], None]:
        """Record a change in the transaction that makes it.

        What is returned is to be called after the commit.
        """
        ...


class PeerService:
    """The directory of remote AEs; safe from any thread.

    Peers of the settings file win over the table and cannot be changed here.

    Parameters
    ----------
    configured : iterable of PeerSettings
        ``dimse.peers`` of the settings.
    trail : Trail, optional
        Where changes are recorded.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        configured: Iterable[PeerSettings],
        trail: Trail | None = None,
    ) -> None:
        self._database = database
        self._trail = trail
        self._clock = clock
        self._configured = {one.title: _from_settings(one) for one in configured}
        self._lock = threading.Lock()
        self._known: Mapping[str, KnownPeer] = {}
        self._failure = ""
        self._read_at = -CACHE_SECONDS

    def find(self, title: str) -> KnownPeer | None:
        """Return the peer with this AE title, or None."""
        fixed = self._configured.get(title)
        return fixed if fixed is not None else self._all().get(title)

    def list(self) -> builtins.list[KnownPeer]:
        """Return every peer, by title."""
        self._read_at = -CACHE_SECONDS
        known = {**self._all(), **self._configured}
        return [known[title] for title in sorted(known)]

    def is_configured(self, title: str) -> bool:
        """Tell whether a peer comes from the settings file."""
        return title in self._configured

    def put(self, peer: KnownPeer, by: AuditEvent | None = None) -> None:
        """Add a peer, or change it.

        Parameters
        ----------
        by : AuditEvent, optional
            Who does it, and by which way; what was changed is recorded with it, in
            the transaction that changes it.

        Raises
        ------
        InvalidParameter
            Names the field that is wrong.
        Conflict
            The settings file has it.
        TooLarge
        """
        check_peer(peer)
        self._not_configured(peer.title)
        values = {
            "host": peer.host,
            "port": peer.port,
            "tenant": peer.tenant,
            "may": " ".join(sorted(peer.may)),
            "tls": int(peer.tls),
            "forward": int(peer.forward),
        }
        module = sqlite if self._database.is_sqlite else postgresql
        statement = module.insert(Peer).values(
            title=peer.title, created_us=self._clock.now_us(), **values
        )
        with self._database.write() as connection:
            before = _held(connection, peer.title)
            held = connection.scalar(select(func.count()).select_from(Peer))
            if held is not None and held >= MAX_PEERS:
                raise TooLarge("peers", MAX_PEERS)
            connection.execute(
                statement.on_conflict_do_update(index_elements=["title"], set_=values)
            )
            note = self._record(connection, by, peer.title, before, peer)
        note()
        self._read_at = -CACHE_SECONDS

    def remove(self, title: str, by: AuditEvent | None = None) -> None:
        """Remove a peer; `by` as in `put`.

        Raises
        ------
        NotFound
        Conflict
            The settings file has it.
        """
        self._not_configured(title)
        with self._database.write() as connection:
            before = _held(connection, title)
            if before is None:
                raise NotFound(f"no peer called {title}")
            connection.execute(delete(Peer).where(Peer.title == title))
            note = self._record(connection, by, title, before, None)
        note()
        self._read_at = -CACHE_SECONDS

    def _record(
        self,
        connection: Connection,
        by: AuditEvent | None,
        title: str,
        before: KnownPeer | None,
        after: KnownPeer | None,
    ) -> Callable[[], None]:
        """Record a change; return what is left to do after its commit."""
        if self._trail is None or by is None:
            return lambda: None
        return self._trail.record_in(connection, _change(by, title, before, after))

    def _not_configured(self, title: str) -> None:
        if title in self._configured:
            raise Conflict(f"{title} is in the settings file; change it there")

    def _all(self) -> Mapping[str, KnownPeer]:
        with self._lock:
            if time.monotonic() - self._read_at >= CACHE_SECONDS:
                self._read()
            if self._failure:
                raise DependencyDown(self._failure)
            return self._known

    def _read(self) -> None:
        """Look the peers up, or remember that they cannot be.

        A failure is kept as long as an answer: those who wait for the lock would else
        ask a database that is away one after the other.
        """
        self._failure = ""
        try:
            with self._database.read() as connection:
                rows = connection.execute(select(*_COLUMNS)).all()
        except Unavailable as error:
            self._failure = str(error)
        else:
            self._known = {row.title: _from_row(row) for row in rows}
        self._read_at = time.monotonic()


_COLUMNS = (
    Peer.title, Peer.host, Peer.port, Peer.tenant, Peer.may, Peer.tls, Peer.forward,
)  # fmt: skip


def _held(connection: Connection, title: str) -> KnownPeer | None:
    """Return the peer of the table, kept from other writers (PostgreSQL)."""
    row = connection.execute(
        select(*_COLUMNS).where(Peer.title == title).with_for_update()
    ).first()
    return None if row is None else _from_row(row)


def _from_row(row: Any) -> KnownPeer:
    return KnownPeer(
        title=row.title,
        host=row.host,
        port=row.port,
        tenant=row.tenant,
        may=frozenset(row.may.split()),
        tls=bool(row.tls),
        forward=bool(row.forward),
    )


def _change(
    by: AuditEvent, title: str, before: KnownPeer | None, after: KnownPeer | None
) -> AuditEvent:
    """Return the event of a change: digests of both states, and what differs."""
    action = "peer.change"
    if before is None:
        action = "peer.add"
    elif after is None:
        action = "peer.remove"
    old, new = _values(before), _values(after)
    return replace(
        by,
        action=action,
        object_kind="peer",
        object_id=title,
        detail={
            **{f"before_{k}": v for k, v in old.items() if new.get(k) != v},
            **{f"after_{k}": v for k, v in new.items() if old.get(k) != v},
        },
        before=_digest(old),
        after=_digest(new),
    )


def _values(peer: KnownPeer | None) -> dict[str, Any]:
    if peer is None:
        return {}
    return {
        "host": peer.host,
        "port": peer.port,
        "tenant": peer.tenant,
        "may": sorted(peer.may),
        "tls": peer.tls,
        "forward": peer.forward,
    }


def _digest(values: Mapping[str, Any]) -> bytes | None:
    """Return the SHA-256 of a peer's values as JSON with sorted keys."""
    if not values:
        return None
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).digest()


def check_peer(peer: KnownPeer) -> None:
    """Raise InvalidParameter when a peer cannot be what it says."""
    if not _TITLE.match(peer.title):
        raise InvalidParameter(
            "title", "1 to 16 printable ASCII characters, no backslash (PS3.5 6.2)"
        )
    if peer.host and not _HOST.match(peer.host):
        raise InvalidParameter("host", "a host name or an address")
    if not 0 <= peer.port <= 65_535:
        raise InvalidParameter("port", "0 to 65535")
    if peer.port and not peer.host:
        raise InvalidParameter("host", "a port without a host")
    if peer.tenant and not _TENANT.match(peer.tenant):
        raise InvalidParameter("tenant", "a short name of letters, digits, . _ -")
    unknown = sorted(peer.may - GRANTS)
    if unknown:
        raise InvalidParameter(
            "may",
            f"no such permission: {unknown[0]}; one of {', '.join(sorted(GRANTS))}",
        )
    if peer.forward and not (peer.host and peer.port):
        raise InvalidParameter("forward", "needs a host and a port")


def _from_settings(one: PeerSettings) -> KnownPeer:
    return KnownPeer(
        title=one.title,
        host=one.host,
        port=one.port,
        tenant=one.tenant,
        may=frozenset(one.may),
        tls=one.tls,
        forward=one.forward,
    )
