"""Settling: once for each state a study comes to rest in, and nothing forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pacs.repository import lifecycle
from pacs.services import settling as module
from pacs.services.settling import Settling
from storage.kernel.errors import NotAllowed, NotFound
from storage.kernel.settings import DuplicatePolicy
from storage.kernel.types import Actor, TenantId
from storage.objects.files import FileObjectStore
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import SETTLE_SECONDS, Life, admin, lives, payload_of

STUDY = uid(1)


@pytest.fixture
def life(tmp_path: Path, database_url: str) -> Iterator[Life]:
    yield from lives(tmp_path, database_url, FileObjectStore(tmp_path / "objects"))


def settled(life: Life) -> list[dict[str, object]]:
    return [payload_of(event) for event in life.events("study.settled")]


def test_a_study_settles_after_its_pause_and_names_what_came(life: Life) -> None:
    life.store(ct_slice(number=1))
    life.store(ct_slice(number=2, series=2))

    early = life.settling.tick()
    life.clock.turn(SETTLE_SECONDS + 1)
    due = life.settling.tick()
    again = life.settling.tick()

    assert (early, due, again) == (0, 1, 0)
    [event] = life.events("study.settled")
    assert (event.tenant, event.subject) == ("default", STUDY)
    assert payload_of(event) == {
        "study": STUDY,
        "version": 1,
        "added": [uid(1, 1, 1), uid(1, 2, 2)],
        "added_count": 2,
        "removed": [],
        "removed_count": 0,
        "own": [],
        "own_count": 0,
        "origin": "external",
        "complete": True,
    }


def test_a_study_that_grows_settles_again_with_what_is_new(life: Life) -> None:
    life.store(ct_slice(number=1))
    life.settle_all()
    life.store(ct_slice(number=2))
    life.settle_all()

    assert [(one["version"], one["added"]) for one in settled(life)] == [
        (1, [uid(1, 1, 1)]),
        (2, [uid(1, 1, 2)]),
    ]


def test_a_duplicate_does_not_settle_a_study_again(life: Life) -> None:
    life.store(ct_slice(number=1))
    life.settle_all()
    life.store(ct_slice(number=1))
    life.settle_all()

    assert len(settled(life)) == 1


def test_a_study_that_shrinks_settles_again_with_what_went(life: Life) -> None:
    for number in (1, 2):
        life.store(ct_slice(number=number))
    life.settle_all()
    life.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 2))
    life.settle_all()

    last = settled(life)[-1]
    assert (last["version"], last["added"], last["removed"]) == (2, [], [uid(1, 1, 2)])


def test_what_never_settled_is_not_reported_as_removed(life: Life) -> None:
    for number in (1, 2):
        life.store(ct_slice(number=number))
    life.deletion.delete(admin(), STUDY, uid(1, 1), uid(1, 1, 2))
    life.settle_all()

    [only] = settled(life)
    assert (only["added"], only["removed"]) == ([uid(1, 1, 1)], [])


def test_a_study_stored_again_goes_on_where_the_old_one_ended(life: Life) -> None:
    life.store(ct_slice(number=1))
    life.settle_all()
    life.deletion.delete(admin(), STUDY)
    life.store(ct_slice(number=1))
    life.settle_all()

    [gone] = life.events("study.deleted")
    assert gone.payload["version"] == 2
    assert [one["version"] for one in settled(life)] == [1, 3]


def test_settling_at_once_needs_no_pause(life: Life) -> None:
    life.store(ct_slice(number=1))

    first = life.settling.settle(admin(), STUDY)
    second = life.settling.settle(admin(), STUDY)

    assert (first, second) == (1, 1)
    assert len(settled(life)) == 1


def test_settling_is_for_the_actors_own_tenant_and_rights(life: Life) -> None:
    life.store(ct_slice(number=1))

    with pytest.raises(NotFound):
        life.settling.settle(admin("other", "default"), STUDY)
    with pytest.raises(NotAllowed):
        life.settling.settle(Actor(TenantId("default"), "nobody"), STUDY)
    assert settled(life) == []


def test_what_we_made_is_marked_by_origin(life: Life) -> None:
    life.store(ct_slice(number=1))
    life.settle_all()
    life.store(ct_slice(number=2), origin="ai")
    life.settle_all()
    life.store(ct_slice(number=3), origin="ai")
    life.store(ct_slice(number=4))
    life.settle_all()

    assert [(one["origin"], one["own"]) for one in settled(life)] == [
        ("external", []),
        ("own", [uid(1, 1, 2)]),
        ("external", [uid(1, 1, 3)]),
    ]


def test_a_large_study_names_some_and_pages_the_rest(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTED", 3)
    monkeypatch.setattr(module, "MARKED", 2)
    for number in range(1, 8):
        life.store(ct_slice(number=number))
    life.settle_all()

    [event] = settled(life)
    assert (event["added_count"], event["complete"]) == (7, False)
    names: list[str] = []
    while page := life.settling.added(
        admin(), STUDY, 1, after=names[-1] if names else "", limit=2
    ):
        names += page
    assert names == sorted(uid(1, 1, number) for number in range(1, 8))
    assert event["added"] == names[:3]


def test_d08_an_interrupted_settle_goes_on_under_its_version(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MARKED", 2)
    for number in range(1, 6):
        life.store(ct_slice(number=number))
    life.clock.turn(SETTLE_SECONDS + 1)
    with monkeypatch.context() as patch:
        calls = iter([2, 2])
        marked = lifecycle.mark_settled

        def dies(*args: object) -> int:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return marked(*args)  # type: ignore[arg-type]

        patch.setattr(lifecycle, "mark_settled", dies)
        with pytest.raises(KeyboardInterrupt):
            life.settling.tick()
    assert settled(life) == []

    life.settling.tick()

    [event] = settled(life)
    assert (event["version"], event["added_count"]) == (1, 5)


def test_an_arrival_between_the_steps_settles_later(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MARKED", 1)
    for number in (1, 2):
        life.store(ct_slice(number=number))
    life.clock.turn(SETTLE_SECONDS + 1)
    marked = lifecycle.mark_settled
    steps: list[int] = []

    def slow(*args: object) -> int:
        steps.append(marked(*args))  # type: ignore[arg-type]
        return steps[-1]

    find = lifecycle.lock_study

    def arrives(*args: object, **more: bool) -> object:
        if len(steps) == 1:
            steps.append(0)
            waiting.append(
                threading.Thread(target=life.store, args=[ct_slice(number=3)])
            )
            waiting[0].start()
        return find(*args, **more)  # type: ignore[arg-type]

    waiting: list[threading.Thread] = []
    monkeypatch.setattr(lifecycle, "mark_settled", slow)
    monkeypatch.setattr(lifecycle, "lock_study", arrives)
    life.settling.tick()
    for thread in waiting:
        thread.join()
    monkeypatch.undo()
    life.settle_all()

    named = [name for one in settled(life) for name in one["added"]]  # type: ignore[attr-defined]
    assert sorted(named) == [uid(1, 1, number) for number in (1, 2, 3)]
    assert life.rows("SELECT settle_due_us FROM study") == [(None,)]


def test_several_workers_and_senders_report_everything_once(
    life: Life, tmp_path: Path
) -> None:
    other = Settling(
        database=life.database,
        policy=life.settling._policy,  # noqa: SLF001  # the same rights
        clock=life.clock,
    )
    done = threading.Event()
    failures: list[BaseException] = []

    def work(settling: Settling) -> None:
        try:
            while not done.is_set():
                life.clock.turn(SETTLE_SECONDS + 1)
                settling.tick()
        except BaseException as error:  # noqa: BLE001  # told by the test
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=[one]) for one in (life.settling, other)
    ]
    for thread in threads:
        thread.start()
    for number in range(1, 31):
        life.store(ct_slice(number=number))
    done.set()
    for thread in threads:
        thread.join()
    life.settle_all()

    events = settled(life)
    named = [name for one in events for name in one["added"]]  # type: ignore[attr-defined]
    versions = [one["version"] for one in events]
    assert failures == []
    assert sorted(named) == sorted(uid(1, 1, number) for number in range(1, 31))
    assert versions == list(range(1, len(versions) + 1))


def test_replaced_content_counts_as_come_again(
    tmp_path: Path, database_url: str
) -> None:
    life = Life(
        tmp_path,
        database_url,
        FileObjectStore(tmp_path / "objects"),
        duplicates=DuplicatePolicy.IF_CHANGED,
    )
    life.store(ct_slice(number=1))
    life.settle_all()
    life.store(ct_slice(number=1, StationName="OTHER"))
    life.settle_all()

    last = settled(life)[-1]
    assert (last["added"], last["removed"]) == ([uid(1, 1, 1)], [])
    life.close()
