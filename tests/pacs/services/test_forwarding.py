"""What forwarding promises, with a peer that is not always there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from pacs.domain.study import StoredInstance
from pacs.services.forwarding import FOLLOWER, KINDS, Fate, ForwardingService
from pacs.services.policy import KnownPeer
from storage.audit import AuditEvent
from storage.kernel.errors import DependencyDown
from storage.kernel.types import Actor, Door, Role, Source, TenantId
from tests.support.archive import ADMIN, Archive, archive
from tests.support.auditing import records
from tests.support.datasets import a_study, ct_slice
from tests.support.dicom_peers import PyScp

STUDY = str(ct_slice().StudyInstanceUID)


@dataclass
class MemorySender:
    """A peer in memory that breaks down when it is told to."""

    sent: list[str] = field(default_factory=list)
    fates: dict[int, Fate] = field(default_factory=dict)
    breaks_at: int | None = None

    def send(
        self,
        peer: KnownPeer,
        instances: Sequence[StoredInstance],
        done: Callable[[StoredInstance, Fate, str], None],
    ) -> None:
        for instance in instances:
            if len(self.sent) == self.breaks_at:
                self.breaks_at = None
                raise DependencyDown("TCP: Connection refused")
            fate = self.fates.pop(len(self.sent), Fate.STORED)
            self.sent.append(instance.sop_instance_uid)
            done(instance, fate, "a reason")


@pytest.fixture
def node(tmp_path: Path, database_url: str) -> Iterator[Archive]:
    with archive(tmp_path / "node", database={"url": database_url}) as made:
        yield made


@pytest.fixture
def sender() -> MemorySender:
    return MemorySender()


@pytest.fixture
def forwarding(node: Archive, sender: MemorySender) -> ForwardingService:
    return ForwardingService(
        database=node.node.database,
        retrieve=node.node.retrieve,
        reader=node.node.reader,
        peers=node.node.peers,
        sender=sender,
        clock=node.node.clock,
        trail=node.node.audit,
    )


def settled(node: Archive, service: ForwardingService) -> list[Any]:
    """Settle the study; return the jobs asked for."""
    node.node.settling.settle(ADMIN, STUDY)
    return node.jobs_of(FOLLOWER, KINDS, service.follower)


def test_a_settled_study_is_sent_in_order_to_each_peer_that_wants_it(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("WANTS", 104, forward=True)
    node.add_peer("WANTS-NOT", 104)
    node.add_peer("ELSEWHERE", 104, forward=True, tenant="other")
    made = a_study(n_series=2, n_instances=3)
    node.store_all(reversed(made))

    [job] = settled(node, forwarding)
    result = forwarding.work(job)

    assert job["peer"] == "WANTS"
    assert result["sent"] == 6
    assert sender.sent == [ds.SOPInstanceUID for ds in made]


def test_only_what_is_new_is_sent_when_the_study_grows(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    node.store_all(a_study(n_instances=2))
    [first] = settled(node, forwarding)
    forwarding.work(first)
    node.store_all(a_study(n_instances=5))
    [second] = settled(node, forwarding)

    assert forwarding.work(second)["sent"] == 3

    assert len(sender.sent) == 5
    assert forwarding.work(first)["sent"] == 0
    assert forwarding.work(second)["sent"] == 0


def test_an_attempt_goes_on_where_the_last_one_stopped(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    uids = node.store_all(a_study(n_instances=5))
    [job] = settled(node, forwarding)
    sender.breaks_at = 2
    with pytest.raises(DependencyDown):
        forwarding.work(job)

    assert forwarding.work(job)["sent"] == 3

    assert sender.sent == uids


def test_a_later_version_carries_what_an_earlier_one_could_not(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    node.store_all(a_study(n_instances=2))
    [first] = settled(node, forwarding)
    sender.breaks_at = 1
    with pytest.raises(DependencyDown):
        forwarding.work(first)
    node.store_all(a_study(n_instances=3))
    [second] = settled(node, forwarding)

    assert forwarding.work(second)["sent"] == 2
    assert forwarding.work(first)["sent"] == 0
    assert len(set(sender.sent)) == len(sender.sent) == 3


def test_what_the_peer_is_short_of_is_tried_again_and_a_refusal_is_not(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    uids = node.store_all(a_study(n_instances=4))
    [job] = settled(node, forwarding)
    sender.fates = {0: Fate.REFUSED, 1: Fate.RETRY, 2: Fate.NOTED}

    with pytest.raises(DependencyDown, match="could not take 1 of 4"):
        forwarding.work(job)
    result = forwarding.work(job)

    assert sender.sent == [*uids, uids[1]]
    assert result["sent"] == 1


def test_nothing_goes_back_to_where_it_came_from(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    own, theirs = a_study(n_instances=2)
    [own_uid] = node.store_all([own])
    node.store_all([theirs], source=Source(Door.DIMSE, calling_ae="PEER"))
    [job] = settled(node, forwarding)

    result = forwarding.work(job)

    assert sender.sent == [own_uid]
    assert result["kept_back"] == 1


def test_a_job_without_a_peer_or_a_study_ends(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    node.store_all(a_study())
    [job] = settled(node, forwarding)
    node.node.deletion.delete(ADMIN, STUDY)
    assert "gone" in forwarding.work(job)["skipped"]

    node.node.peers.remove("PEER")

    assert "no longer" in forwarding.work(job)["skipped"]
    assert sender.sent == []


def test_another_tenants_study_with_the_same_uids_stays_its_own(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True, tenant="default")
    other = Actor(TenantId("other"), "test", roles=frozenset({Role.OPEN}))
    node.store_all(a_study(n_instances=3), actor=other)
    node.node.settling.settle(other, STUDY)
    node.store_all(a_study(n_instances=1))

    [job] = settled(node, forwarding)

    assert job["tenant"] == "default"
    assert forwarding.work(job)["sent"] == 1


def test_d07_a_real_peer_that_comes_and_goes(node: Archive) -> None:
    uids = node.store_all(a_study(n_instances=4))
    answers = [0x0000, 0xA700, 0xB000, 0xA900, 0x0000]
    with PyScp(status=answers.__getitem__).running() as scp:
        node.add_peer(scp.title, scp.port, forward=True)
        service = node.forwarding()
        [job] = settled(node, service)

        with pytest.raises(DependencyDown, match="A700"):
            service.work(job)
        result = service.work(job)

    assert [one.instance_uid for one in scp.received] == [*uids, uids[1]]
    assert result == {"sent": 1, "noted": 0, "refused": 0, "kept_back": 0}
    node.store_all(a_study(n_instances=5))
    [job] = settled(node, service)
    with pytest.raises(DependencyDown, match="TCP"):
        service.work(job)


def audited(node: Archive) -> list[tuple[str, str, str, dict[str, Any]]]:
    return [
        (one.action, one.outcome, one.reason or "", orjson.loads(one.detail))
        for one in records(node.node.database)
        if (one.actor, one.door, one.study_uid) == ("forwarding", "worker", STUDY)
    ]


def test_each_attempt_is_recorded_before_anything_leaves_and_at_its_end(
    node: Archive, forwarding: ForwardingService, sender: MemorySender
) -> None:
    node.add_peer("PEER", 104, forward=True)
    node.store_all(a_study(n_instances=4))
    sender.breaks_at, sender.fates = 1, {2: Fate.REFUSED}
    [job] = settled(node, forwarding)

    with pytest.raises(DependencyDown):
        forwarding.work(job)
    forwarding.work(job)
    assert forwarding.work(job)["sent"] == 0

    where = {"destination": "PEER", "address": "127.0.0.1:104"}
    assert audited(node) == [
        ("forward", "allow", "", {**where, "instances": 4}),
        (
            "forward.end", "error", "TCP: Connection refused",
            {**where, "sent": 1, "refused": 0, "left": 3},
        ),
        ("forward", "allow", "", {**where, "instances": 3}),
        (
            "forward.end", "error", "a reason",
            {**where, "sent": 2, "refused": 1, "left": 0},
        ),
    ]  # fmt: skip


def test_what_went_well_is_recorded_so(
    node: Archive, forwarding: ForwardingService
) -> None:
    node.add_peer("PEER", 104, forward=True)
    node.store_all(a_study(n_instances=2))
    [job] = settled(node, forwarding)

    forwarding.work(job)

    assert [(one[0], one[1]) for one in audited(node)] == [
        ("forward", "allow"), ("forward.end", "allow"),
    ]  # fmt: skip


def test_nothing_is_forwarded_that_cannot_be_recorded(
    node: Archive,
    forwarding: ForwardingService,
    sender: MemorySender,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(_event: AuditEvent) -> None:
        raise DependencyDown("audit: down")

    node.add_peer("PEER", 104, forward=True)
    node.store_all(a_study(n_instances=2))
    [job] = settled(node, forwarding)
    with monkeypatch.context() as patch:
        patch.setattr(node.node.audit, "record_now", down)
        with pytest.raises(DependencyDown, match="audit"):
            forwarding.work(job)

    assert sender.sent == []
    assert forwarding.work(job)["sent"] == 2
