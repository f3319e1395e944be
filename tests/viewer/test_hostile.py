"""What was never meant to be shown: every broken object, at every endpoint."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pacs.services.query import StudyFilter
from storage.kernel.errors import ImagingError
from tests.support import corpus
from tests.support.archive import ADMIN
from tests.support.datasets import a_study, ct_slice, uid
from tests.support.viewing import Viewing
from tests.viewer.test_frames import parse

#: The longest that one bad object may hold a request.
SECONDS = 10.0


@corpus.needs_corpus
@pytest.mark.parametrize("path", corpus.broken(), ids=lambda path: path.stem)
def test_a_broken_object_costs_its_own_request(viewing: Viewing, path: Path) -> None:
    """Each is answered in time: shown where it can be, else refused by name."""
    try:
        instance = viewing.archive.store(path.read_bytes())
    except ImagingError:
        # Refused at the door (tests/fault): there is nothing to show.
        assert (
            viewing.archive.node.query.list_studies(ADMIN, StudyFilter()).studies == ()
        )
        return
    found = viewing.archive.node.retrieve.find_instance(ADMIN, instance)
    study, series = found.study_instance_uid, found.series_instance_uid
    started = time.monotonic()

    manifest = viewing.get(f"/manifest/{study}")
    overlays = viewing.get(f"/overlays/{study}")
    frames = viewing.get(f"/series/{series}/frames.bin?form=raw")
    small = viewing.get(f"/series/{series}/frames.bin?form=raw&level=3")
    drawn = viewing.render({"study": study, "series": series})
    ahead = viewing.post(f"/prefetch?study={study}")
    viewing.views.ahead.wait()

    assert manifest.status == overlays.status == 200
    assert frames.status in {200, 404, 413}
    assert small.status in {200, 404, 413}
    assert drawn.status in {200, 422}
    assert ahead.status in {202, 404}
    for answer in (frames, small):
        if answer.status == 200:
            assert parse(answer.body).ended
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("frames", [1_000_000_000, 2**31, 5])
def test_claims_of_many_frames_cost_nothing(viewing: Viewing, frames: int) -> None:
    viewing.archive.store_all([ct_slice(NumberOfFrames=frames)])

    answer = viewing.get(f"/series/{uid(1, 1)}/frames.bin")

    # There are bytes for one.
    assert answer.status == 200
    assert len(parse(answer.body).records) == 1
    assert viewing.get(f"/manifest/{uid(1)}").status == 200
    assert viewing.get(f"/overlays/{uid(1)}").status == 200


@pytest.mark.parametrize(
    "values",
    [
        {"ImagePositionPatient": ["1e308", "1e308", "1e308"]},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
        {"PixelSpacing": ["0", "0"]},
        {"PixelSpacing": ["1e-30", "1e30"]},
        {"RescaleSlope": "1e300"},
        {"RescaleSlope": "0"},
        {"RescaleIntercept": "-1e300"},
        {"BitsStored": 0},
        {"BitsStored": 40},
        {"HighBit": 3},
        {"WindowCenter": "1e300", "WindowWidth": "1e-300"},
        {"Rows": 65535, "Columns": 65535},
        {"SamplesPerPixel": 3},
    ],
    ids=str,
)
def test_impossible_attributes_are_refused_or_survived(
    viewing: Viewing, values: dict[str, object]
) -> None:
    datasets = a_study(n_instances=4)
    for ds in datasets:
        for keyword, value in values.items():
            setattr(ds, keyword, value)
    viewing.archive.store_all(datasets)
    ref = {"study": uid(1), "series": uid(1, 1)}

    plane = viewing.render({**ref, "plane": "coronal"})
    raw = viewing.render({**ref, "format": "int16"})
    volume = viewing.render({**ref, "kind": "volume", "preset": "surface"})

    assert {plane.status, raw.status, volume.status} <= {200, 404, 413, 422}
    assert viewing.get(f"/manifest/{uid(1)}").status == 200
    assert viewing.views.volumes.kept() <= 32 * 32 * 4 * 4
