"""Group commit: order, errors, and the lead passing from thread to thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from storage.group import GroupCommit, Ticket
from storage.kernel.errors import DependencyDown, StorageFull
from tests.support.waiting import wait_until


class Slow:
    """A process function that waits to be let through."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.leaders: list[int] = []

    def __call__(self, group: Sequence[Ticket[int]]) -> None:
        self.groups.append([ticket.item for ticket in group])
        self.leaders.append(threading.get_ident())
        self.entered.release()
        assert self.gate.acquire(timeout=30)
        for ticket in group:
            if ticket.item == 13:
                ticket.error = StorageFull("13")
        if any(ticket.item == 99 for ticket in group):
            raise DependencyDown("99")
        if any(ticket.item == 666 for ticket in group):
            raise RuntimeError("666")


def start(
    commit: GroupCommit[int], item: int, results: dict[int, object], cost: int = 1
) -> threading.Thread:
    def submit() -> None:
        try:
            commit.submit(item, cost)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            results[item] = error
        else:
            results[item] = "done"

    thread = threading.Thread(target=submit, daemon=True)
    thread.start()
    return thread


def gathered(
    commit: GroupCommit[int],
    slow: Slow,
    items: Sequence[int],
    costs: dict[int, int] | None = None,
) -> dict[int, object]:
    """Let `items` wait behind a first one, in order; return what became of each."""
    results: dict[int, object] = {}
    threads = [start(commit, 0, results)]
    assert slow.entered.acquire(timeout=30)
    for n, item in enumerate(items, 1):
        threads.append(start(commit, item, results, (costs or {}).get(item, 1)))
        wait_until(lambda n=n: len(commit._waiting) == n, "the item to wait")  # type: ignore[misc]  # noqa: SLF001
    for _ in range(len(items) + 1):
        slow.gate.release()
    for thread in threads:
        thread.join(30)
    return results


def test_those_that_wait_share_the_next_group_in_order() -> None:
    slow = Slow()

    results = gathered(GroupCommit(slow), slow, [1, 2, 3])

    assert slow.groups == [[0], [1, 2, 3]]
    assert set(results.values()) == {"done"}


def test_a_lone_caller_works_in_its_own_thread() -> None:
    seen: list[int] = []
    commit: GroupCommit[int] = GroupCommit(lambda _: seen.append(threading.get_ident()))

    commit.submit(1, 1)
    commit.submit(2, 1)

    assert seen == [threading.get_ident()] * 2


def test_the_lead_passes_to_one_that_waits() -> None:
    slow = Slow()

    gathered(GroupCommit(slow, max_items=1), slow, [1, 2])

    assert slow.groups == [[0], [1], [2]]
    assert len(set(slow.leaders)) == 3


def test_a_group_is_bounded_by_items_and_by_cost() -> None:
    slow = Slow()
    gathered(GroupCommit(slow, max_items=2), slow, [1, 2, 3])
    assert slow.groups == [[0], [1, 2], [3]]

    slow = Slow()
    costs = {1: 60, 2: 60, 3: 500, 4: 1}
    gathered(GroupCommit(slow, max_cost=100), slow, [1, 2, 3, 4], costs)
    assert slow.groups == [[0], [1], [2], [3], [4]]


def test_one_that_fails_by_itself_does_not_fail_the_others() -> None:
    slow = Slow()

    results = gathered(GroupCommit(slow), slow, [1, 13, 2])

    assert isinstance(results[13], StorageFull)
    assert results[1] == results[2] == "done"


@pytest.mark.parametrize(("item", "error"), [(99, DependencyDown), (666, RuntimeError)])
def test_a_group_that_fails_fails_all_of_it_and_the_next_one_works(
    item: int, error: type[Exception]
) -> None:
    slow = Slow()
    commit = GroupCommit(slow)

    results = gathered(commit, slow, [1, item, 2])

    assert [type(results[n]) for n in (1, item, 2)] == [error] * 3
    assert results[0] == "done"
    slow.gate.release()
    commit.submit(5, 1)
    assert slow.groups[-1] == [5]


def test_nothing_is_lost_or_done_twice_under_load() -> None:
    done: list[int] = []
    commit: GroupCommit[int] = GroupCommit(
        lambda group: done.extend(ticket.item for ticket in group), max_items=3
    )

    def submit(first: int) -> None:
        for item in range(first, first + 200):
            commit.submit(item, 1)

    threads = [threading.Thread(target=submit, args=(n * 1000,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(done) == len(set(done)) == 1600
    for n in range(8):
        mine = [item for item in done if item // 1000 == n]
        assert mine == sorted(mine)
