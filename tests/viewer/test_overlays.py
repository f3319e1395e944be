"""Overlays as plain JSON: masks, measurements, graphics, contours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from tests.support import corpus
from tests.support import overlays as made
from tests.support.archive import ADMIN
from tests.support.datasets import uid
from tests.support.viewing import Viewing, viewing_archive
from tests.support.volumes import Phantom

#: 35 pixels in a frame: frames of 1 bit begin in the middle of bytes.
SMALL = Phantom(shape=(5, 5, 7), spacing=(3.0, 1.5, 1.25))
MM = ("mm", "millimeter", "UCUM")


@pytest.fixture
def images(viewing: Viewing) -> list[Dataset]:
    """Return the images of a small phantom, stored, from the lowest to the highest."""
    datasets = SMALL.datasets(shuffled=False)
    viewing.archive.store_all(datasets)
    return datasets


def document(viewing: Viewing) -> Any:
    return viewing.json(f"/overlays/{uid(1)}")


def one_layer(viewing: Viewing) -> Any:
    found = document(viewing)
    assert found["problems"] == []
    (layer,) = found["layers"]
    return layer


def unpacked(mask: dict[str, Any], size: int) -> NDArray[Any]:
    """Return a mask as its runs say."""
    frame = np.zeros(size, np.int64)
    runs = mask["runs"]
    values = mask.get("values", [1] * (len(runs) // 2))
    for start, length, value in zip(runs[::2], runs[1::2], values, strict=True):
        assert not frame[start : start + length].any()
        frame[start : start + length] = value
    return frame


def random_masks(high: int) -> NDArray[Any]:
    masks = np.random.default_rng(7).integers(0, high, SMALL.shape)
    masks[2] = 0
    return masks


@pytest.mark.parametrize("syntax", ["native", made.DEFLATED_FRAMES])
def test_binary_masks_belong_to_their_images(
    viewing: Viewing, images: list[Dataset], syntax: str
) -> None:
    masks = random_masks(2)
    ds = made.segmentation(masks, images)
    file = made.stored_bytes(ds) if syntax == "native" else made.encoded(ds, syntax)
    viewing.archive.store(file)

    layer = one_layer(viewing)

    assert layer["kind"] == "seg"
    assert layer["type"] == "binary"
    assert layer["segments"][0]["label"] == "结节 1"
    assert layer["segments"][0]["type"] == {
        "value": "27925004", "scheme": "SCT", "meaning": "Nodule",
    }  # fmt: skip
    by_image = {mask["image"]: mask for mask in layer["masks"]}
    # The empty one is left out.
    assert len(layer["masks"]) == 4
    for k, image in enumerate(images):
        if k != 2:
            mask = by_image[image.SOPInstanceUID]
            assert (unpacked(mask, 35) == masks[k].reshape(-1)).all()
            assert mask["pixels"] == masks[k].sum()
            assert mask["segment"] == 1


@pytest.mark.parametrize("syntax", ["native", RLELossless, made.DEFLATED_FRAMES])
def test_fractions_keep_their_values(
    viewing: Viewing, images: list[Dataset], syntax: str
) -> None:
    masks = random_masks(4) * 80
    ds = made.segmentation(masks, images, kind="FRACTIONAL")
    file = made.stored_bytes(ds) if syntax == "native" else made.encoded(ds, syntax)
    viewing.archive.store(file)

    layer = one_layer(viewing)

    assert (layer["type"], layer["maximum"]) == ("fractional", 255)
    assert layer["fraction"] == "probability"
    frames = [unpacked(mask, 35) for mask in layer["masks"]]
    expected = [masks[k].reshape(-1) for k in (0, 1, 3, 4)]
    assert (np.array(frames) == np.array(expected)).all()


@pytest.mark.parametrize("syntax", ["native", RLELossless, made.DEFLATED_FRAMES])
def test_a_label_map_is_parted_into_its_segments(
    viewing: Viewing, images: list[Dataset], syntax: str
) -> None:
    masks = random_masks(4)
    ds = made.segmentation(masks, images, kind="LABELMAP")
    file = made.stored_bytes(ds) if syntax == "native" else made.encoded(ds, syntax)
    viewing.archive.store(file)

    layer = one_layer(viewing)

    assert [one["number"] for one in layer["segments"]] == [1, 2, 3]
    for mask in layer["masks"]:
        k = [image.SOPInstanceUID for image in images].index(mask["image"])
        expected = (masks[k] == mask["segment"]).reshape(-1)
        assert (unpacked(mask, 35) == expected).all()
    assert sum(mask["pixels"] for mask in layer["masks"]) == (masks > 0).sum()


def test_masks_that_name_no_image_find_it_by_place(
    viewing: Viewing, images: list[Dataset]
) -> None:
    ds = made.segmentation(random_masks(2), images, named=False)
    viewing.archive.store_all([ds])

    layer = one_layer(viewing)

    uids = [image.SOPInstanceUID for image in images]
    assert [mask["image"] for mask in layer["masks"]] == [uids[k] for k in (0, 1, 3, 4)]


def test_masks_beside_all_images_have_only_their_place(
    viewing: Viewing, images: list[Dataset]
) -> None:
    moved = [Dataset(image) for image in images]
    for image in moved:
        image.ImagePositionPatient = [500, 500, float(image.ImagePositionPatient[2])]
    viewing.archive.store_all([made.segmentation(random_masks(2), moved, named=False)])

    layer = one_layer(viewing)

    assert all("image" not in mask for mask in layer["masks"])
    assert layer["masks"][0]["position"][:2] == [500.0, 500.0]


def test_several_segments_of_one_image(viewing: Viewing, images: list[Dataset]) -> None:
    masks = random_masks(2)[[0, 1, 1]]
    ds = made.segmentation(masks, [images[0], images[0], images[3]], segments=[1, 2, 2])
    viewing.archive.store_all([ds])

    layer = one_layer(viewing)

    first, second = images[0].SOPInstanceUID, images[3].SOPInstanceUID
    found = [(mask["image"], mask["segment"]) for mask in layer["masks"]]
    assert found == [(first, 1), (first, 2), (second, 2)]


def test_a_thousand_frames(viewing: Viewing, images: list[Dataset]) -> None:
    masks = np.random.default_rng(1).integers(0, 2, (3000, 5, 7))
    ds = made.segmentation(masks, [images[n % 5] for n in range(3000)])
    viewing.archive.store_all([ds])

    layer = one_layer(viewing)

    assert len(layer["masks"]) == (masks.reshape(3000, -1).sum(axis=1) > 0).sum()
    assert sum(mask["pixels"] for mask in layer["masks"]) == masks.sum()


def test_limits_leave_out_what_is_too_much_and_say_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    limits = {"overlay_masks": 10, "overlay_points": 100}
    folder = tmp_path_factory.mktemp("limits")
    with viewing_archive(folder, limits=limits) as viewing:
        images = SMALL.datasets(shuffled=False)
        masks = np.ones((40, 5, 7), np.uint8)
        points = list(np.arange(400.0))
        viewing.archive.store_all(
            [
                *images,
                made.segmentation(masks, [images[n % 5] for n in range(40)]),
                made.report(
                    [
                        made.measurement_group(
                            made.in_image("POLYLINE", points, images[0]),
                            made.in_image("POINT", [1, 2], images[0]),
                        )
                    ]
                ),
            ]
        )

        found = document(viewing)

    seg, report = found["layers"]
    assert found["truncated"]
    assert len(seg["masks"]) == 10
    assert [shape["type"] for shape in report["groups"][0]["shapes"]] == ["point"]


def test_measurements_come_with_names_units_and_shapes(
    viewing: Viewing, images: list[Dataset]
) -> None:
    image = images[2]
    group = made.measurement_group(
        made.content("TEXT", made.code("112039", "Tracking ID"), TextValue="结节 1"),
        made.content("UIDREF", made.code("112040", "Tracking UID"), UID="1.2.3.4"),
        made.content(
            "CODE",
            made.code("121071", "Finding"),
            ConceptCodeSequence=[made.code("27925004", "Nodule", "SCT")],
        ),
        made.content(
            "CODE",
            made.code("363698007", "Finding Site", "SCT"),
            ConceptCodeSequence=[made.code("39607008", "Lung", "SCT")],
        ),
        made.number(
            7.25,
            made.code("103339001", "Long axis", "SCT"),
            made.code(MM[0], MM[1], MM[2]),
            ContentSequence=[
                made.content(
                    "CODE",
                    made.code("121401", "Derivation"),
                    ConceptCodeSequence=[made.code("373098007", "Mean", "SCT")],
                ),
                made.in_image("POLYLINE", [1.5, 2, 3, 4.25], image),
            ],
        ),
        made.content(
            "CODE",
            made.code("129719003", "Margin", "SCT"),
            ConceptCodeSequence=[made.code("129742005", "Spiculated", "SCT")],
        ),
        made.content("TEXT", made.code("121106", "Comment"), TextValue="复查 <3 月"),
        made.in_image("ELLIPSE", [0, 1, 4, 1, 2, 0, 2, 2], image),
    )
    viewing.archive.store_all([made.report([group])])

    layer = one_layer(viewing)

    assert layer["title"]["meaning"] == "Imaging Measurement Report"
    (found,) = layer["groups"]
    assert found["measurement_group"]
    assert found["tracking_id"] == "结节 1"
    assert found["tracking_uid"] == "1.2.3.4"
    assert found["finding"]["meaning"] == "Nodule"
    assert found["site"]["meaning"] == "Lung"
    (measured,) = found["measurements"]
    assert measured["value"] == 7.25
    assert measured["name"]["meaning"] == "Long axis"
    assert measured["unit"]["value"] == "mm"
    assert [one["value"]["meaning"] for one in measured["modifiers"]] == ["Mean"]
    assert [one["value"]["meaning"] for one in found["qualities"]] == ["Spiculated"]
    assert [one["text"] for one in found["texts"]] == ["复查 <3 月"]
    line, ellipse = found["shapes"]
    assert line["points"] == [[1.5, 2.0], [3.0, 4.25]]
    assert line["image"] == ellipse["image"] == image.SOPInstanceUID
    assert (line["type"], ellipse["type"]) == ("polyline", "ellipse")
    assert len(ellipse["points"]) == 4


def test_what_a_report_says_of_its_images_is_no_measurement(
    viewing: Viewing, images: list[Dataset]
) -> None:
    rows = made.number(
        5,
        made.code("110910", "Pixel Data Rows"),
        made.code("{pixels}", "pixels", "UCUM"),
    )
    library = made.content(
        "CONTAINER",
        made.code("111028", "Image Library"),
        ContinuityOfContent="SEPARATE",
        ContentSequence=[rows],
    )
    viewing.archive.store_all([made.report([library])])

    assert one_layer(viewing)["groups"] == []


def test_shapes_in_the_patient_are_given_in_the_image_they_lie_in(
    viewing: Viewing, images: list[Dataset]
) -> None:
    corners = [SMALL.position(3, *at) for at in ((0, 0), (0, 6), (4, 6))]
    points = [float(one) for corner in corners for one in corner]
    across = [float(one) for k in (0, 4) for one in SMALL.position(k, 1, 1)]
    group = made.measurement_group(
        made.in_patient("POLYGON", points, images[0]),
        made.in_patient("POLYLINE", across, images[0]),
    )
    viewing.archive.store_all([made.report([group])])

    polygon, line = one_layer(viewing)["groups"][0]["shapes"]

    assert polygon["space"] == "patient"
    (shown,) = polygon["images"]
    assert shown["image"] == images[3].SOPInstanceUID
    # Centres of pixels: (0.5, 0.5) is that of the first.
    assert np.array(shown["points"]) == pytest.approx(
        np.array([[0.5, 0.5], [6.5, 0.5], [6.5, 4.5]])
    )
    assert line["images"] == []
    assert len(line["points"]) == 2


def test_a_deep_and_endless_tree_is_cut_off(
    viewing: Viewing, images: list[Dataset]
) -> None:
    deep = made.in_image("POINT", [1, 1], images[0])
    for _ in range(25):
        deep = made.measurement_group(deep)
    wide = made.measurement_group(
        *(made.in_image("POINT", [n, 1], images[0]) for n in range(500))
    )
    viewing.archive.store_all([made.report([deep, wide])])

    layer = one_layer(viewing)

    assert sum(len(group["shapes"]) for group in layer["groups"]) == 501


def test_presentation_states_give_graphics_and_texts(
    viewing: Viewing, images: list[Dataset]
) -> None:
    viewing.archive.store_all([made.presentation(images[:2])])

    layer = one_layer(viewing)

    (circle,) = layer["graphics"]
    boxed, pointing = layer["texts"]
    assert layer["label"] == "LUNG"
    assert layer["description"] == "肺窗"
    assert (layer["rotation"], layer["flipped"]) == (90, True)
    assert layer["windows"] == [{"center": -600.0, "width": 1500.0}]
    assert layer["layers"] == [{"name": "MARKS", "order": 1, "rgb": [255, 0, 0]}]
    assert [one["image"] for one in layer["images"]] == [
        image.SOPInstanceUID for image in images[:2]
    ]
    assert circle["type"] == "circle"
    assert circle["points"] == [[10.5, 12.5], [14.5, 12.5]]
    assert circle["images"] == [{"image": images[0].SOPInstanceUID}]
    assert boxed["text"] == "结节 <b>\\5 mm"
    assert boxed["box"] == [[0.1, 0.2], [0.3, 0.4]]
    assert boxed["box_units"] == "display"
    assert pointing["anchor"] == [3.0, 4.0]


def test_contours_lie_on_the_image_they_name_or_the_one_they_are_in(
    viewing: Viewing, images: list[Dataset]
) -> None:
    def square(k: int) -> list[float]:
        corners = [(0, 0), (0, 4), (4, 4), (4, 0)]
        return [float(one) for at in corners for one in SMALL.position(k, *at)]

    viewing.archive.store_all(
        [
            made.structures(
                [(square(1), images[1]), (square(4), None)],
                str(images[0].FrameOfReferenceUID),
            )
        ]
    )

    layer = one_layer(viewing)

    assert layer["regions"] == [
        {
            "number": 4,
            "name": "GTV",
            "algorithm": "MANUAL",
            "type": "GTV",
            "rgb": [255, 0, 255],
        }
    ]
    for contour, image in zip(layer["contours"], (images[1], images[4]), strict=True):
        (shown,) = contour["images"]
        assert contour["type"] == "closed_planar"
        assert shown["image"] == image.SOPInstanceUID
        assert np.array(shown["points"]) == pytest.approx(
            np.array([[0.5, 0.5], [4.5, 0.5], [4.5, 4.5], [0.5, 4.5]]), abs=1e-3
        )


@pytest.mark.filterwarnings("ignore:.*cannot be written in an explicit:UserWarning")
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_long_contour_is_read_where_it_is_not_in_the_metadata(
    viewing: Viewing, images: list[Dataset], syntax: str
) -> None:
    """Values above 64 KiB are by reference in the metadata, and UN in explicit VR."""
    turns = np.linspace(0, 2 * np.pi, 4000)
    ring = np.stack((np.cos(turns), np.sin(turns), 0 * turns), 1) * 3
    points = (ring + SMALL.position(2, 2, 3)).reshape(-1).tolist()
    ds = made.structures([(points, images[2])], str(images[0].FrameOfReferenceUID))
    viewing.archive.store(made.stored_bytes(ds, syntax))

    layer = one_layer(viewing)

    assert len(layer["contours"][0]["points"]) == 4000
    assert layer["contours"][0]["points"][0] == pytest.approx(points[:3], abs=1e-3)


def test_an_object_that_cannot_be_read_is_named_and_the_others_come(
    viewing: Viewing, images: list[Dataset]
) -> None:
    short = made.segmentation(random_masks(2), images)
    short.PixelData = short.PixelData[:2]
    claims = made.segmentation(random_masks(2), images, series=61)
    claims.NumberOfFrames = 1_000_000_000
    bad = made.report([made.measurement_group()], series=60)
    shape = made.in_image("POLYLINE", [1, 2], images[0])
    shape.GraphicData = [1.0, 2.0, 3.0]
    bad.ContentSequence[0].ContentSequence[0].ContentSequence = Items([shape])
    viewing.archive.store_all([short, claims, bad, made.presentation(images[:1])])

    found = document(viewing)

    assert [layer["kind"] for layer in found["layers"]] == ["pr", "sr"]
    assert {one["instance"] for one in found["problems"]} == {
        short.SOPInstanceUID,
        claims.SOPInstanceUID,
        bad.SOPInstanceUID,
    }


def test_one_series_alone(viewing: Viewing, images: list[Dataset]) -> None:
    viewing.archive.store_all(
        [made.segmentation(random_masks(2), images), made.presentation(images[:1])]
    )

    found = viewing.json(f"/overlays/{uid(1)}/series/{uid(1, 52)}")

    assert [layer["kind"] for layer in found["layers"]] == ["pr"]
    assert viewing.get(f"/overlays/{uid(1)}/series/{uid(9, 9)}").status == 404


def test_overlays_are_sent_again_only_when_the_study_changed(
    viewing: Viewing, images: list[Dataset]
) -> None:
    viewing.archive.store_all([made.presentation(images[:1])])
    path = f"/overlays/{uid(1)}"
    first = viewing.get(path)

    same = viewing.get(path, if_none_match=first.headers["etag"])
    viewing.archive.store_all([made.segmentation(random_masks(2), images)])
    changed = viewing.get(path, if_none_match=first.headers["etag"])

    assert (same.status, same.body) == (304, b"")
    assert changed.status == 200
    assert len(changed.json()["layers"]) == 2


def test_another_tenant_s_overlays_are_not_there(
    viewing: Viewing, images: list[Dataset]
) -> None:
    assert viewing.get(f"/overlays/{uid(1)}", x_tenant="elsewhere").status == 404
    assert viewing.get(f"/overlays/{uid(99)}").status == 404


@corpus.needs_corpus
def test_every_overlay_object_of_the_corpus_is_read(viewing: Viewing) -> None:
    """Written by dcmqi, highdicom and others: each becomes a layer, none a problem."""
    wanted = {
        "liver": ("seg", 3),
        "seg": ("seg", 13),
        "seg_image_ct_binary": ("seg", 3),
        "seg_image_ct_binary_overlap": ("seg", 8),
        "seg_image_ct_true_fractional": ("seg", 3),
        "seg_image_sm_control_labelmap": ("seg", 20),
        "sr": ("sr", None),
        "sr_document": ("sr", None),
        "sr_document_with_multiple_groups": ("sr", None),
        "gsps-lung-window": ("pr", None),
    }
    found = {}
    for name in wanted:
        file = (corpus.CORPUS / "objects" / f"{name}.dcm").read_bytes()
        instance = viewing.archive.store(file)
        retrieve = viewing.archive.node.retrieve
        study = retrieve.find_instance(ADMIN, instance).study_instance_uid
        for layer in viewing.json(f"/overlays/{study}")["layers"]:
            if layer["instance"] == instance:
                masks = layer.get("masks")
                found[name] = (layer["kind"], None if masks is None else len(masks))

    assert found == wanted
