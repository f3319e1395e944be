"""The manifest: what a viewer learns of a study before the first image."""

from __future__ import annotations

import gzip
import json

from tests.support.datasets import a_study, ct_slice, uid
from tests.support.viewing import Viewing
from tests.support.volumes import Phantom
from tests.support.web import request

CHEST = "1.3.6.1.4.1.14519.5.2.1.6655.2359.165554066086145834377508507990"


def test_series_come_with_their_geometry(phantom: Viewing) -> None:
    found = phantom.json(f"/manifest/{uid(1)}")

    axial, sagittal = found["series"]
    assert found["patient"]["name"] == "Test1^Case=测试^1"
    assert axial["n_instances"] == axial["n_frames"] == 20
    assert axial["body_part"] == "CHEST"
    assert axial["volume"]["size"] == [40, 32, 20]
    assert axial["volume"]["spacing"] == [1.25, 1.5, 3.0]
    assert axial["volume"]["origin"] == [-30.0, 12.0, 100.0]
    assert axial["volume"]["unit"] == "HU"
    assert axial["volume"]["window"] == [40.0, 400.0]
    assert axial["equal_sizes"]
    assert sagittal["volume"]["right"] == [0.0, 1.0, 0.0]
    assert "not_a_volume" not in axial


def test_first_and_middle_are_those_along_the_normal(phantom: Viewing) -> None:
    """Instance Numbers of the phantom follow no order; positions do."""
    datasets = Phantom().datasets(series=1)
    by_height = sorted(datasets, key=lambda ds: float(ds.ImagePositionPatient[2]))

    (axial, _) = phantom.json(f"/manifest/{uid(1)}")["series"]

    assert axial["first"] == {
        "instance": by_height[0].SOPInstanceUID,
        "frame": 1,
    }
    assert axial["middle"]["instance"] == by_height[10].SOPInstanceUID


def test_links_lead_to_pictures_metadata_and_frames(phantom: Viewing) -> None:
    found = phantom.json(f"/manifest/{uid(1)}")

    base = f"/dicom-web/studies/{uid(1)}"
    axial = found["series"][0]
    assert found["thumbnail"] == f"{base}/thumbnail"
    assert axial["thumbnail"] == f"{base}/series/{uid(1, 1)}/thumbnail"
    assert axial["metadata"] == f"{base}/series/{uid(1, 1)}/metadata"
    assert request(phantom.base + axial["frames"]).status == 200
    assert request(phantom.base + found["overlays"]).status == 200


def test_an_unchanged_manifest_is_not_sent_again(phantom: Viewing) -> None:
    first = phantom.get(f"/manifest/{uid(1)}")

    again = phantom.get(f"/manifest/{uid(1)}", if_none_match=first.headers["etag"])

    assert first.headers["cache-control"] == "private, no-cache"
    assert (again.status, again.body) == (304, b"")


def test_a_manifest_is_compressed_where_the_client_takes_that(
    phantom: Viewing,
) -> None:
    plain = phantom.get(f"/manifest/{uid(1)}")
    packed = phantom.get(f"/manifest/{uid(1)}", accept_encoding="gzip")

    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body


def test_a_manifest_changes_when_an_image_arrives(viewing: Viewing) -> None:
    viewing.archive.store_all(a_study())
    first = viewing.get(f"/manifest/{uid(1)}")

    viewing.archive.store_all([ct_slice(number=9)])
    second = viewing.get(f"/manifest/{uid(1)}", if_none_match=first.headers["etag"])

    assert second.status == 200
    assert second.json()["series"][0]["n_instances"] == 4


def test_why_there_is_no_volume_is_said(viewing: Viewing) -> None:
    viewing.archive.store_all(a_study(n_instances=2))

    (series,) = viewing.json(f"/manifest/{uid(1)}")["series"]

    assert series["volume"] is None
    assert series["not_a_volume"] == "only 2 parallel images at different positions"


def test_mixed_sizes_are_said(viewing: Viewing) -> None:
    viewing.archive.store_all([ct_slice(number=1), ct_slice(number=2, size=16)])

    (series,) = viewing.json(f"/manifest/{uid(1)}")["series"]

    assert not series["equal_sizes"]
    assert series["rows"] is None


def test_priors_are_earlier_studies_of_the_same_part_the_newest_first(
    viewing: Viewing,
) -> None:
    made = {
        1: ("20240301", "CHEST", "CT"),
        2: ("20230101", "CHEST", "CT"),
        3: ("20230601", "CHEST", "MR"),
        4: ("20230301", "KNEE", "CT"),
        5: ("20240302", "CHEST", "CT"),
        6: ("20220101", "CHEST", "CT"),
    }
    for seed, (date, part, modality) in made.items():
        viewing.archive.store_all(
            a_study(
                seed=seed,
                modality=modality,
                StudyDate=date,
                BodyPartExamined=part,
                PatientID="P",
                n_instances=1,
            )
        )
    viewing.archive.store_all(a_study(seed=7, StudyDate="20230101", n_instances=1))

    priors = viewing.json(f"/manifest/{uid(1)}")["priors"]

    assert [(one["study"], one["match"]) for one in priors] == [
        (uid(2), ["body_part", "modality"]),
        (uid(6), ["body_part", "modality"]),
        (uid(3), ["body_part"]),
    ]
    assert request(viewing.base + priors[0]["manifest"]).status == 200


def test_a_patient_id_that_looks_like_a_pattern_finds_nobody_else(
    viewing: Viewing,
) -> None:
    for seed, patient in ((1, "*"), (2, "A"), (3, "*"), (4, "?")):
        viewing.archive.store_all(
            a_study(
                seed=seed, PatientID=patient, n_instances=1, BodyPartExamined="CHEST"
            )
        )

    found = {
        seed: [one["study"] for one in viewing.json(f"/manifest/{uid(seed)}")["priors"]]
        for seed in (1, 3, 4)
    }

    assert found == {1: [], 3: [uid(1)], 4: []}


def test_without_a_patient_id_nobody_is_the_same_patient(viewing: Viewing) -> None:
    for seed in (1, 2):
        viewing.archive.store_all(a_study(seed=seed, PatientID="", n_instances=1))

    assert viewing.json(f"/manifest/{uid(2)}")["priors"] == []


def test_another_tenant_s_study_is_not_there(phantom: Viewing) -> None:
    answer = phantom.get(f"/manifest/{uid(1)}", x_tenant="elsewhere")
    unknown = phantom.get(f"/manifest/{uid(99)}")

    assert answer.status == unknown.status == 404
    assert answer.body == unknown.body


def test_a_malformed_uid_is_refused(phantom: Viewing) -> None:
    for bad in ("%00", "a%20b", "1" * 65, "..%2f..", "%E4%BA%92"):
        assert phantom.get(f"/manifest/{bad}").status in {400, 404}


def test_the_chest_ct_has_a_volume_key_images_and_graphics(chest: Viewing) -> None:
    found = chest.json(f"/manifest/{CHEST}")

    image = next(one for one in found["series"] if one["kind"] == "image")
    (key,) = found["key_objects"]
    assert image["volume"]["size"] == [512, 512, 64]
    assert image["volume"]["spacing"][2] == 5.0
    assert image["encoding"] == "stored"
    assert image["transfer_syntaxes"] == ["1.2.840.10008.1.2.4.80"]
    assert key["title"]["meaning"] == "Of Interest"
    assert len(key["images"]) == 6
    assert {one["series"] for one in key["images"]} == {image["series"]}
    assert found["has"] == {"seg": False, "sr": False, "pr": True, "rtstruct": False}
    assert "report" not in json.dumps(found)
