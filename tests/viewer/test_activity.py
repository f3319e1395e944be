"""Sums over the archive are dear, so they are remembered for a while."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from storage.activity import Activity, Amount
from storage.kernel.types import Actor, TenantId
from viewer import activity
from viewer.activity import ArchiveActivity, Totals

CITY = Actor(TenantId("city"), "city")
TOWN = Actor(TenantId("town"), "town")
NOTHING = Amount(0, 0)


class Quiet:
    def activity(self, actor: Actor) -> Activity:
        return Activity(NOTHING, NOTHING, NOTHING, ())


@dataclass
class Archive:
    """Counts how often it was added up, and takes its time."""

    takes: float = 0.0
    now: float = 100.0
    asked: list[Actor] = field(default_factory=list)

    def sums(self, actor: Actor) -> Totals:
        self.asked.append(actor)
        self.now += self.takes
        return Totals(len(self.asked), 0, 0, 0)

    def monotonic(self) -> float:
        return self.now


def over(archive: Archive) -> ArchiveActivity:
    return ArchiveActivity(Quiet(), archive.sums, archive.monotonic)


def test_sums_are_taken_once_for_a_while() -> None:
    archive = Archive()
    source = over(archive)

    assert source.report(CITY).totals.studies == 1
    archive.now += activity.TOTALS_SECONDS - 0.1
    assert source.report(CITY).totals.studies == 1
    archive.now += 0.2
    assert source.report(CITY).totals.studies == 2


def test_slow_sums_rest_longer() -> None:
    archive = Archive(takes=1.0)
    source = over(archive)
    source.report(CITY)

    archive.now += activity.TOTALS_REST - 1
    source.report(CITY)
    assert len(archive.asked) == 1

    archive.now += 2
    source.report(CITY)
    assert len(archive.asked) == 2


def test_each_set_of_tenants_has_its_own_sums() -> None:
    archive = Archive()
    source = over(archive)

    source.report(CITY)
    source.report(TOWN)
    source.report(CITY)

    assert archive.asked == [CITY, TOWN]


def test_only_so_many_sums_are_remembered() -> None:
    archive = Archive()
    source = over(archive)
    for number in range(activity.REMEMBERED + 1):
        source.report(Actor(TenantId(f"t{number}"), ""))

    source.report(Actor(TenantId(f"t{activity.REMEMBERED}"), ""))

    assert len(archive.asked) == activity.REMEMBERED + 1


def test_while_one_adds_up_the_others_get_the_old_sums() -> None:
    archive = Archive()
    inside, leave = threading.Event(), threading.Event()

    def sums(actor: Actor) -> Totals:
        found = archive.sums(actor)
        if len(archive.asked) > 1:
            inside.set()
            leave.wait(10)
        return found

    source = ArchiveActivity(Quiet(), sums, archive.monotonic)
    source.report(CITY)
    archive.now += activity.TOTALS_SECONDS + 1
    slow = threading.Thread(target=source.report, args=(CITY,))
    slow.start()
    assert inside.wait(10)

    assert source.report(CITY).totals.studies == 1

    leave.set()
    slow.join(10)
    assert source.report(CITY).totals.studies == 2
