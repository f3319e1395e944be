"""The synthetic studies: valid, readable, and the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from gateway import demo
from gateway.demo import PLANS, Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("demo")
    demo.write_studies(made)
    return made


def test_there_are_three_studies(folder: Path) -> None:
    files = sorted(folder.rglob("*.dcm"))
    studies = {str(pydicom.dcmread(f).StudyInstanceUID) for f in files}

    assert (len(files), len(studies)) == (33, 3)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.modality)
def test_names_are_readable_in_their_character_set(plan: Plan, folder: Path) -> None:
    path = next(folder.glob(f"{plan.modality.lower()}-*/001.dcm"))

    ds = pydicom.dcmread(path)

    assert ds.SpecificCharacterSet == plan.charset
    assert str(ds.PatientName) == plan.patient_name
    assert ds.StudyDescription == plan.description


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.modality)
def test_images_show_something(plan: Plan, folder: Path) -> None:
    path = sorted(folder.glob(f"{plan.modality.lower()}-*/*.dcm"))[plan.n_images // 2]

    pixels = pydicom.dcmread(path).pixel_array

    assert pixels.shape[0] >= 256
    assert np.ptp(pixels) > 1000


def test_slices_lie_in_order(folder: Path) -> None:
    positions = [
        pydicom.dcmread(path).ImagePositionPatient[2]
        for path in sorted(folder.glob("ct-*/*.dcm"))
    ]
    assert positions == [5.0 * n for n in range(20)]


def test_a_second_demo_makes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    mr = [plan for plan in PLANS if plan.modality == "MR"]

    again = demo.write_studies(tmp_path, mr)

    for path in again:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_the_example_is_a_file_that_every_sender_can_send(folder: Path) -> None:
    assert demo.example_file([folder]).name == "001.dcm"


def test_the_corpus_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "chest-ct").mkdir()
    (tmp_path / "broken").mkdir()

    assert demo.corpus_paths(tmp_path) == [tmp_path / "chest-ct"]
    assert demo.corpus_paths(tmp_path / "absent") == []
