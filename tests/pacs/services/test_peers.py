"""What the directory of remote AEs promises, on both engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import orjson
import pytest
from sqlalchemy import Connection

from pacs.services import peers as peers_module
from pacs.services.peers import PeerService
from pacs.services.policy import KnownPeer
from storage.audit import AuditEvent, AuditTrail
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.errors import (
    Conflict,
    DependencyDown,
    InvalidParameter,
    NotFound,
)
from storage.kernel.settings import PeerSettings
from tests.support.auditing import records, verified

CT1 = KnownPeer("CT1", "10.0.0.7", 104, "city-a", frozenset({"store"}), forward=True)
FIXED = PeerSettings(title="FIXED", host="10.0.0.9", port=104, forward=True)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    migrate.upgrade(database_url)
    opened = Database(database_url)
    yield opened
    opened.close()


def directory(database: Database) -> PeerService:
    return PeerService(database=database, clock=SystemClock(), configured=[FIXED])


def test_a_peer_comes_back_as_it_was_put(database: Database) -> None:
    peers = directory(database)

    peers.put(CT1)

    assert peers.find("CT1") == CT1
    assert directory(database).find("CT1") == CT1
    assert [peer.title for peer in peers.list()] == ["CT1", "FIXED"]


def test_putting_again_changes(database: Database) -> None:
    peers = directory(database)
    peers.put(CT1)

    peers.put(KnownPeer("CT1", "10.0.0.8", 105, "", frozenset()))

    assert peers.find("CT1") == KnownPeer("CT1", "10.0.0.8", 105, "", frozenset())
    assert len(peers.list()) == 2


def test_a_database_that_is_away_is_asked_once_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory(database).put(CT1)
    asked: list[int] = []

    @contextmanager
    def down(_: Database) -> Iterator[Connection]:
        asked.append(1)
        raise DependencyDown("database does not answer")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Database, "read", down)
        # However long the test takes: what is known counts as fresh.
        patch.setattr(peers_module, "CACHE_SECONDS", 3600.0)
        peers = directory(database)
        for _ in range(3):
            with pytest.raises(DependencyDown):
                peers.find("CT1")
        assert len(asked) == 1
        assert peers.find("FIXED") is not None

    monkeypatch.setattr(peers_module, "CACHE_SECONDS", 0.0)
    assert peers.find("CT1") == CT1


def test_removing_removes(database: Database) -> None:
    peers = directory(database)
    peers.put(CT1)

    peers.remove("CT1")

    assert peers.find("CT1") is None
    with pytest.raises(NotFound):
        peers.remove("CT1")


def test_a_change_is_recorded_with_what_was_and_what_is(
    database: Database, tmp_path: Path
) -> None:
    trail = AuditTrail(database, SystemClock(), tmp_path / "audit")
    peers = PeerService(
        database=database, clock=SystemClock(), configured=[FIXED], trail=trail
    )
    by = AuditEvent(action="administer", actor="lin", door="web", source="::1")

    peers.put(CT1, by)
    peers.put(replace(CT1, host="10.0.0.8", may=frozenset({"find", "get"})), by)
    peers.remove("CT1", by)
    with pytest.raises(NotFound):
        peers.remove("CT1", by)
    with pytest.raises(Conflict):
        peers.remove("FIXED", by)

    added, changed, removed = records(database)
    assert {(one.object_kind, one.object_id) for one in records(database)} == {
        ("peer", "CT1")
    }
    assert (changed.actor, changed.door, changed.source) == ("lin", "web", "::1")
    assert [added.action, changed.action, removed.action] == [
        "peer.add", "peer.change", "peer.remove",
    ]  # fmt: skip
    assert (added.before, removed.after) == (None, None)
    assert added.after == changed.before != changed.after == removed.before
    assert orjson.loads(added.detail)["after_forward"] is True
    assert orjson.loads(changed.detail) == {
        "before_host": "10.0.0.7", "after_host": "10.0.0.8",
        "before_may": ["store"], "after_may": ["find", "get"],
    }  # fmt: skip
    assert orjson.loads(removed.detail)["before_host"] == "10.0.0.8"
    assert verified(database, tmp_path / "audit").is_clean
    trail.close()


def test_a_change_that_cannot_be_recorded_does_not_happen(database: Database) -> None:
    class Down:
        def record_in(self, _connection: Connection, _event: AuditEvent) -> NoReturn:
            raise DependencyDown("audit: down")

    by = AuditEvent(action="administer", actor="lin")
    kept = directory(database)
    kept.put(CT1)
    peers = PeerService(
        database=database, clock=SystemClock(), configured=[], trail=Down()
    )

    with pytest.raises(DependencyDown):
        peers.put(replace(CT1, port=105), by)
    with pytest.raises(DependencyDown):
        peers.put(replace(CT1, title="CT2"), by)
    with pytest.raises(DependencyDown):
        peers.remove("CT1", by)

    assert directory(database).find("CT1") == CT1
    assert directory(database).find("CT2") is None


def test_the_settings_file_wins(database: Database) -> None:
    peers = directory(database)

    found = peers.find("FIXED")
    assert found is not None
    assert (found.host, found.forward, found.may) == (
        "10.0.0.9", True, frozenset({"echo", "store"}),
    )  # fmt: skip
    with pytest.raises(Conflict):
        peers.put(KnownPeer("FIXED", "10.0.0.1", 104, "", frozenset()))
    with pytest.raises(Conflict):
        peers.remove("FIXED")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("title", {"title": ""}),
        ("title", {"title": "A" * 17}),
        ("title", {"title": "A\\B"}),
        ("title", {"title": "ÄÖ"}),
        ("title", {"title": " A"}),
        ("host", {"host": "a b"}),
        ("host", {"host": "", "port": 104, "forward": False}),
        ("port", {"port": 65_536}),
        ("port", {"port": -1}),
        ("tenant", {"tenant": "a/b"}),
        ("may", {"may": frozenset({"delete"})}),
        ("forward", {"port": 0}),
    ],
    ids=str,
)
def test_a_peer_that_cannot_be_names_the_field(
    database: Database, field: str, values: dict[str, object]
) -> None:
    whole = {
        "title": "CT1", "host": "h", "port": 104, "tenant": "", "may": frozenset(),
        "forward": True, **values,
    }  # fmt: skip

    with pytest.raises(InvalidParameter) as caught:
        directory(database).put(KnownPeer(**whole))  # type: ignore[arg-type]

    assert caught.value.name == field
