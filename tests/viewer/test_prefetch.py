"""Reading ahead: which series, and that they are read."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from gateway.viewing import MAX_WAITING
from tests.support.archive import ADMIN
from tests.support.datasets import uid
from tests.support.viewing import Viewing
from tests.support.volumes import Phantom
from viewer import likely
from viewer.sources import SeriesFacts, StudyFacts


def series(uid_: str, **changed: object) -> SeriesFacts:
    facts = SeriesFacts(
        series=uid_,
        number=1,
        modality="CT",
        description="",
        body_part="CHEST",
        laterality="",
        kind="image",
        n_instances=10,
        n_frames=10,
        size_bytes=1000,
        sop_classes=(),
        transfer_syntaxes=(),
        encoding="raw",
        rows=512,
        columns=512,
        equal_sizes=True,
        first=None,
        middle=None,
        volume=None,
        not_a_volume="",
    )
    return replace(facts, **changed)  # type: ignore[arg-type]


def study(*made: SeriesFacts) -> StudyFacts:
    return StudyFacts(
        "1.2", "default", None, None, "", "", "", "", None, "", (), made, (), ()
    )


def test_the_next_number_of_the_same_modality_comes_first() -> None:
    now = series("1", number=3)
    facts = study(
        series("before", number=2),
        now,
        series("later", number=7),
        series("next", number=4),
        series("other", number=4, modality="SR", kind="sr"),
    )

    found = likely.ranked(facts, now, likely.NEXT)

    assert [one.series for one in found] == ["next", "later"]
    assert found[0].reasons == (
        "same_modality",
        "same_body_part",
        "next_number",
        "later_number",
    )


def test_of_a_prior_the_same_description_comes_first() -> None:
    now = series("1", description="lung 1 mm", n_frames=300)
    facts = study(
        series("a", description="soft 5 mm"),
        series("b", description="lung 1 mm", n_frames=290),
    )

    found = likely.ranked(facts, now, likely.PRIOR)

    assert found[0].series == "b"


def test_what_is_too_large_is_not_read_ahead() -> None:
    now = series("1")
    huge = series("2", number=2, size_bytes=likely.MAX_BYTES + 1)

    assert likely.ranked(study(now, huge), now, likely.NEXT) == []


def test_no_more_than_a_few_series() -> None:
    now = series("0")
    many = [series(str(n), number=1 + n) for n in range(1, 30)]

    assert len(likely.ranked(study(now, *many), now, likely.NEXT)) == likely.MAX_SERIES


@pytest.mark.parametrize("weights", [likely.NEXT, likely.PRIOR])
def test_every_weight_has_a_rule(weights: dict[str, float]) -> None:
    assert weights.keys() <= likely.REASONS.keys()


def test_the_next_series_and_the_prior_s_are_read(viewing: Viewing) -> None:
    for seed, date in ((1, "20240101"), (2, "20230101")):
        for number in (1, 2):
            viewing.archive.store_all(
                Phantom().datasets(
                    seed=seed,
                    series=number,
                    PatientID="P",
                    StudyDate=date,
                    SeriesDescription=f"axial {number}",
                )
            )

    answer = viewing.post(f"/prefetch?study={uid(1)}&series={uid(1, 1)}")
    viewing.views.ahead.wait()

    assert answer.status == 202
    found = answer.json()["series"]
    assert [one["series"] for one in found] == [uid(1, 2), uid(2, 1), uid(2, 2)]
    assert all(one["started"] for one in found)
    assert viewing.views.volumes.kept() == 3 * 20 * 32 * 40 * 2


def test_what_waits_is_bounded_and_told(
    viewing: Viewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one series is being read, so many wait, and the next is not begun."""
    going = threading.Event()
    retrieve = viewing.archive.node.retrieve

    def hanging(*_: object, **__: object) -> list[object]:
        going.wait(10)
        return []

    monkeypatch.setattr(retrieve, "instances", hanging)
    ahead = viewing.views.ahead
    begun = [ahead.warm(ADMIN, "1.2", str(n)) for n in range(MAX_WAITING + 5)]
    again = ahead.warm(ADMIN, "1.2", "3")
    going.set()
    ahead.wait()

    # One may be out of the queue already, being read.
    assert begun.count(True) in {MAX_WAITING, MAX_WAITING + 1}
    assert not begun[-1]
    assert again


def test_priors_can_be_left_out(phantom: Viewing) -> None:
    answer = phantom.post(f"/prefetch?study={uid(1)}&series={uid(1, 1)}&priors=false")

    assert [one["study"] for one in answer.json()["series"]] == [uid(1)]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("study=a%20b", 400),
        (f"study={uid(1)}&priors=maybe", 400),
        (f"study={uid(1)}&series=", 400),
        (f"study={uid(99)}", 404),
        (f"study={uid(1)}&series={uid(9, 9)}", 404),
    ],
)
def test_bad_requests_are_refused(phantom: Viewing, query: str, status: int) -> None:
    assert phantom.post(f"/prefetch?{query}").status == status
