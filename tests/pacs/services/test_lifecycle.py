"""A study's whole life, as verification, a rebuild and the job runner see it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pacs.services.rebuild import Rebuilder
from pacs.services.sealing import KINDS
from pacs.services.verify import Verifier
from storage.jobs import runner as runner_module
from storage.jobs.runner import JobRunner, Retry
from storage.kernel.errors import DependencyDown
from storage.objects.files import FileObjectStore
from storage.outbox import ChangeFeed
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import GRACE_SECONDS, Life, admin, content, lives
from tests.support.waiting import wait_until

STUDY, SERIES = uid(1), uid(1, 1)


@pytest.fixture
def life(tmp_path: Path, database_url: str) -> Iterator[Life]:
    yield from lives(tmp_path, database_url, FileObjectStore(tmp_path / "objects"))


def findings(life: Life) -> list[object]:
    verifier = Verifier(
        database=life.database,
        folder=life.folder,
        objects=life.objects,
        node_id="node-1",
    )
    return list(verifier.verify().findings)


def rebuild(life: Life) -> None:
    life.packs.close()
    Rebuilder(
        database=life.database,
        folder=life.folder,
        objects=life.objects,
        ingest=life.ingest,
        clock=life.clock,
        node_id="node-1",
    ).rebuild()


def held(life: Life) -> dict[str, bytes | None]:
    uids = [row[0] for row in life.rows("SELECT sop_instance_uid FROM instance")]
    return {name: life.bytes_of(name) for name in sorted(uids)}


def live_through(life: Life) -> None:
    """Store, seal, delete, store again, seal again: every kind of record there is."""
    for number in range(1, 6):
        life.store(ct_slice(number=number))
    life.settle_all()
    life.seal_all()
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 2))
    life.store(ct_slice(number=2))
    life.store(ct_slice(number=6))
    life.settle_all()
    life.seal_all()
    life.store(ct_slice(seed=2))
    life.deletion.delete(admin(), uid(2))
    life.store(ct_slice(seed=2))
    life.deletion.delete(admin(), uid(2))
    life.store(ct_slice(seed=3))


def test_verification_finds_nothing_at_any_time(life: Life) -> None:
    live_through(life)
    early = findings(life)
    life.roll()
    life.retirement.tick()
    retired = findings(life)
    life.clock.turn(GRACE_SECONDS + 1)
    life.retirement.tick()

    assert (early, retired, findings(life)) == ([], [], [])


@pytest.mark.parametrize("moment", ["before", "retired", "unlinked"])
def test_a_rebuild_gives_the_same_archive(life: Life, moment: str) -> None:
    live_through(life)
    if moment != "before":
        life.roll()
        life.retirement.tick()
    if moment == "unlinked":
        life.clock.turn(GRACE_SECONDS + 1)
        life.retirement.tick()
    before = held(life)
    expected = [uid(1, 1, n) for n in range(2, 7)] + [uid(3, 1, 1)]
    assert sorted(before) == expected

    rebuild(life)

    assert held(life) == before
    assert life.recount() == []
    assert findings(life) == []


def test_the_runner_seals_once_the_store_answers(
    life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "POLL_SECONDS", 0.05)
    url = life.database.url.render_as_string(hide_password=False)
    jobs_url = f"sqlite:///{tmp_path / 'jobs.db'}" if life.database.is_sqlite else url
    runner = JobRunner(jobs_url)
    retry = Retry(first_seconds=0.05, longest_seconds=0.1, give_up_seconds=60)
    runner.register(life.sealing.job, life.sealing.seal, retry=retry)
    life.store(ct_slice())
    life.settle_all()
    life.events()
    stat, calls = life.objects.stat, iter([1, 2])

    def down_twice(key: str) -> object:
        if next(calls, None) is not None:
            raise DependencyDown("object store does not answer")
        return stat(key)

    monkeypatch.setattr(life.objects, "stat", down_twice)
    with warnings.catch_warnings():
        # dbos' own use of its dependencies is not ours to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        runner.start()
    try:
        ChangeFeed(life.database).follow(
            life.sealing.job,
            partial(life.sealing.follow, jobs=runner),
            kinds=KINDS,
        )
        wait_until(
            lambda: life.rows("SELECT 1 FROM series WHERE sealed_version = 1"),
            "the series to be sealed",
        )
    finally:
        runner.stop(grace_seconds=5)

    assert life.bytes_of(uid(1, 1, 1)) == content(ct_slice())
    assert life.rows("SELECT kind FROM pack JOIN instance ON pack_pk = pack.id") == [
        ("sealed",)
    ]
