"""Changing peers over REST: who may, and what the audit keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.support.accounts import Site, closed_site, with_identity

PEERS = "/api/v1/peers"
CT1 = {"host": "10.0.0.7", "port": 104}


@pytest.fixture
def site(tmp_path: Path, database_url: str) -> Iterator[Site]:
    one_factor = with_identity(second_factor=frozenset())
    with closed_site(tmp_path / "data", url=database_url, identity=one_factor) as made:
        yield made


def test_changes_are_told_from_reads_and_name_what_changed(site: Site) -> None:
    keeper = site.logged_in("lin", "administrator")

    assert keeper.request("PUT", f"{PEERS}/CT1", CT1).status == 200
    assert keeper.request("PUT", f"{PEERS}/CT1", {**CT1, "port": 105}).status == 200
    assert keeper.get(PEERS).status == 200
    assert keeper.request("DELETE", f"{PEERS}/CT1").status == 204

    [read] = site.audit(actor="lin", action="read_peers")
    assert (read["object_kind"], read["outcome"]) == ("peers", "allow")
    [added] = site.audit(actor="lin", action="peer.add")
    [changed] = site.audit(actor="lin", action="peer.change")
    [removed] = site.audit(actor="lin", action="peer.remove")
    assert orjson.loads(changed["detail"]) == {"before_port": 104, "after_port": 105}
    assert (added["before"], removed["after"]) == (None, None)
    assert changed["before"] == added["after"]
    assert changed["after"] == removed["before"] != changed["before"]
    for one in (added, changed, removed):
        assert (one["object_id"], one["door"]) == ("CT1", "web")
        assert one["session"]
        assert one["request_id"]
        assert one["source"] == "127.0.0.1"
        assert one["roles"] == "administrator"
    assert not site.audit(action="administer")


def test_who_may_not_change_peers_is_recorded(site: Site) -> None:
    doctor = site.logged_in("chen", "clinician")

    assert doctor.request("PUT", f"{PEERS}/CT1", CT1).status == 403
    assert doctor.request("DELETE", f"{PEERS}/CT1").status == 403
    assert doctor.get(PEERS).status == 403

    changes = site.audit(actor="chen", action="administer", outcome="deny")
    assert [one["object_id"] for one in changes] == ["CT1", "CT1"]
    assert len(site.audit(actor="chen", action="read_peers", outcome="deny")) == 1
