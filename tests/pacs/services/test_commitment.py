"""What storage commitment promises between the request and its delivery."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pacs.services.commitment import (
    FOLLOWER,
    JOB,
    KINDS,
    Reference,
    Report,
    TransactionInUse,
)
from storage.kernel.errors import DependencyDown, TooLarge, Unavailable
from storage.kernel.types import Actor, TenantId
from storage.kernel.uids import new_uid
from tests.support.archive import ADMIN, Archive, archive
from tests.support.datasets import a_study

CT = "1.2.840.10008.5.1.4.1.1.2"


@dataclass
class MemoryDelivery:
    """A requestor in memory, not there at first."""

    down: int = 0
    taken: list[Report] = field(default_factory=list)

    def deliver(self, report: Report) -> None:
        if self.down:
            self.down -= 1
            raise DependencyDown("TCP: Connection refused")
        self.taken.append(report)


@pytest.fixture
def node(tmp_path: Path, database_url: str) -> Iterator[Archive]:
    with archive(tmp_path / "node", database={"url": database_url}) as made:
        yield made


def ask(node: Archive, *uids: str, transaction: str, peer: str = "CT1") -> int:
    return node.commitment.request(
        ADMIN,
        peer_ae=peer,
        called_ae=node.aet,
        transaction_uid=transaction,
        references=[Reference(CT, uid) for uid in uids],
    )


def test_a_request_becomes_one_job_that_delivers_once(node: Archive) -> None:
    uids = node.store_all(a_study())
    transaction = new_uid()
    pk = ask(node, *uids, transaction=transaction)
    delivery = MemoryDelivery()
    work = node.commitment.worker(delivery)

    jobs = node.jobs_of(FOLLOWER, KINDS, node.commitment.follower)
    for _ in range(2):
        assert work(jobs[0]) == {"committed": 3, "failed": 0}

    assert jobs == [{"id": pk}]
    assert JOB == "commitment"
    [report] = delivery.taken
    assert report.transaction_uid == transaction
    assert (report.peer_ae, report.called_ae) == ("CT1", node.aet)
    assert [one.sop_instance_uid for one in report.committed] == uids


def test_the_result_is_found_once_and_kept(node: Archive) -> None:
    uids = node.store_all(a_study())
    transaction = new_uid()
    pk = ask(node, *uids, new_uid(), transaction=transaction)
    delivery = MemoryDelivery(down=2)
    work = node.commitment.worker(delivery)
    for _ in range(2):
        with pytest.raises(DependencyDown):
            work({"id": pk})
    node.damage(uids[0])

    work({"id": pk})

    # What was promised at the first look is what is reported.
    assert len(delivery.taken[0].committed) == 3
    [found] = node.commitment.find(ADMIN, transaction)
    assert (found.n_references, found.attempts) == (4, 3)
    assert found.report is not None
    assert found.report.delivered
    assert node.commitment.waiting() == 0


def test_a_transaction_uid_is_used_once_by_each_peer(node: Archive) -> None:
    transaction = new_uid()
    ask(node, "1.2.3", transaction=transaction)

    with pytest.raises(TransactionInUse):
        ask(node, "1.2.3", transaction=transaction)

    ask(node, "1.2.3", transaction=transaction, peer="CT2")
    assert len(node.commitment.find(ADMIN, transaction)) == 2


def test_another_tenants_instances_are_not_committed(node: Archive) -> None:
    other = Actor(TenantId("other"), "test")
    [uid] = node.store_all(a_study(n_instances=1), actor=other)
    transaction = new_uid()
    ask(node, uid, transaction=transaction)

    report = node.check_commitment(transaction)

    assert [int(reason) for _, reason in report.failed] == [0x0112]
    assert node.commitment.find(other, transaction) == []


def test_too_many_references_are_refused_before_anything_is_written(
    node: Archive,
) -> None:
    with pytest.raises(TooLarge):
        ask(node, *["1.2"] * 100_001, transaction=new_uid())

    assert node.commitment.waiting() == 0


def test_transactions_are_forgotten_in_time(node: Archive) -> None:
    kept, gone = new_uid(), new_uid()
    node.commitment.worker(MemoryDelivery())(
        {"id": ask(node, "1.2.3", transaction=gone)}
    )
    between = node.node.clock.now_us()
    ask(node, "1.2.3", transaction=kept)

    assert node.commitment.prune(between) == 1

    assert node.commitment.find(ADMIN, gone) == []
    assert len(node.commitment.find(ADMIN, kept)) == 1
    assert node.commitment.prune(node.node.clock.now_us() + 1) == 1
    assert node.commitment.check(10**6) is None


def test_a_look_that_takes_too_long_decides_nothing(node: Archive) -> None:
    uids = node.store_all(a_study())
    transaction = new_uid()
    pk = ask(node, *uids, transaction=transaction)

    with pytest.raises(Unavailable, match="longer"):
        node.commitment.check(pk, within_seconds=-1)

    [found] = node.commitment.find(ADMIN, transaction)
    assert found.report is None
    assert len(node.check_commitment(transaction).committed) == 3
