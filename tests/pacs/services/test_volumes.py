"""What is read into a volume: the values of its images, whatever form they have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813  its own name for it
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.uid import ExplicitVRBigEndian

from pacs.rendering.reslice import Preset
from pacs.services.volumes import Drawn, PlaneRequest, VolumeService
from storage.kernel.errors import DependencyDown, NotFound, TooLarge
from storage.kernel.types import Actor, TenantId
from tests.support import corpus
from tests.support.archive import ADMIN, Archive, archive
from tests.support.datasets import NATIVE_SYNTAXES, part10, uid
from tests.support.volumes import Phantom

PHANTOM = Phantom(shape=(6, 12, 14), spheres=(((0, 0, 0), 6.0, 300.0),))


@pytest.fixture
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    with archive(tmp_path_factory.mktemp("volumes")) as made:
        yield made


def volumes(stored: Archive) -> VolumeService:
    return stored.node.views.volumes


def values_of(drawn: Drawn) -> NDArray[Any]:
    facts = drawn.facts
    shape = (facts["rows"], facts["columns"])
    raw = np.frombuffer(drawn.body, "<i2").reshape(shape)
    return np.asarray(raw * facts["slope"] + facts["intercept"])


def planes(
    stored: Archive, study: str = "", series: str = "", stack: int = 0
) -> NDArray[Any]:
    """Return all voxels, drawn plane by plane where they are."""
    study, series = study or uid(1), series or uid(1, 1)
    service = volumes(stored)
    grid = service.describe(ADMIN, study, series, stack=stack).stack.grid
    right = np.array(grid.column_step) / grid.spacing[2]
    down = np.array(grid.row_step) / grid.spacing[1]
    found = []
    for offset in grid.offsets:
        origin = np.array(grid.origin) + np.array(grid.along) * offset
        drawn = service.draw_plane(
            ADMIN,
            study,
            series,
            PlaneRequest(
                preset=None,
                right=tuple(right.tolist()),
                down=tuple(down.tolist()),
                origin=tuple(origin.tolist()),
                spacing=grid.spacing[1:],
                rows=grid.shape[1],
                columns=grid.shape[2],
                interpolation="nearest",
                format="int16",
            ),
            stack=stack,
        )
        found.append(values_of(drawn))
    return np.array(found)


@pytest.mark.parametrize("syntax", NATIVE_SYNTAXES)
def test_every_native_syntax(stored: Archive, syntax: str) -> None:
    for ds in PHANTOM.datasets():
        if syntax == ExplicitVRBigEndian:
            # Written as they are: the writer does not know the size of samples.
            ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        stored.store(part10(ds, syntax))

    assert (planes(stored) == PHANTOM.voxels()).all()


def test_other_bits_of_a_sample_do_not_count(stored: Archive) -> None:
    """Overlays in the upper bits, as old devices stored them."""
    voxels = PHANTOM.voxels()
    for k, ds in enumerate(PHANTOM.datasets(shuffled=False)):
        ds.PixelRepresentation = 1
        ds.BitsStored, ds.HighBit = 12, 11
        ds.RescaleIntercept = 0
        low = voxels[k].astype(np.int32) & 0x0FFF
        noise = np.random.default_rng(k).integers(0, 16, low.shape) << 12
        ds.PixelData = (low | noise).astype("<u2").tobytes()
        stored.store(part10(ds))

    assert (planes(stored) == voxels).all()


def test_padding_is_no_value_of_its_own(stored: Archive) -> None:
    for ds in PHANTOM.datasets():
        pixels = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns).copy()
        pixels = pixels.astype("<i2")
        pixels[0] = -2000
        ds.PixelRepresentation = 1
        ds.BitsStored, ds.HighBit = 16, 15
        ds.add_new(0x00280120, "SS", -2000)
        ds.PixelData = pixels.tobytes()
        stored.store(part10(ds))

    found = planes(stored)

    assert (found[:, 0] == -1000).all()
    assert (found[:, 1:] == PHANTOM.voxels()[:, 1:]).all()


def test_slopes_of_their_own_give_values_that_are_not_whole(stored: Archive) -> None:
    expected = []
    for k, ds in enumerate(PHANTOM.datasets(shuffled=False)):
        ds.RescaleSlope, ds.RescaleIntercept = f"{0.25 + k * 0.1:.2f}", "-3.5"
        pixels = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns)
        expected.append(pixels * (0.25 + k * 0.1) - 3.5)
        stored.store(part10(ds))

    found = planes(stored)

    facts = volumes(stored).describe(ADMIN, uid(1), uid(1, 1))
    assert facts.dtype == "<f4"
    assert np.abs(found - np.array(expected)).max() < 0.51


def test_bytes(stored: Archive) -> None:
    expected = []
    for k, ds in enumerate(PHANTOM.datasets(shuffled=False)):
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit = 7
        ds.RescaleIntercept = 0
        pixels = np.full((ds.Rows, ds.Columns), 40 * k, np.uint8)
        expected.append(pixels)
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OB"
        stored.store(part10(ds))

    assert (planes(stored) == np.array(expected)).all()


def test_a_plane_with_too_few_pixels_stops_the_volume(stored: Archive) -> None:
    datasets = PHANTOM.datasets()
    datasets[2].PixelData = datasets[2].PixelData[:100]
    stored.store_all(datasets)

    with pytest.raises(NotFound):
        volumes(stored).draw_plane(ADMIN, uid(1), uid(1, 1), PlaneRequest())
    assert volumes(stored).kept() == 0


def test_a_second_picture_reads_nothing(
    stored: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.store_all(PHANTOM.datasets())
    service = volumes(stored)
    service.draw_plane(ADMIN, uid(1), uid(1, 1), PlaneRequest())

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(stored.node.retrieve, "open_frames", refuse)
    drawn = service.draw_plane(ADMIN, uid(1), uid(1, 1), PlaneRequest("coronal"))

    assert drawn.media_type == "image/png"


def test_too_much_memory_names_its_limit(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    limits = {"render_bytes": 64 << 20, "volume_bytes": 1 << 20}
    with archive(tmp_path_factory.mktemp("small"), limits=limits) as made:
        made.store_all(PHANTOM.datasets())
        large = PlaneRequest(rows=2048, columns=2048, format="int16")
        with pytest.raises(TooLarge, match="render_bytes"):
            volumes(made).draw_plane(ADMIN, uid(1), uid(1, 1), large)


def test_a_picture_that_takes_too_long_is_given_up(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with archive(
        tmp_path_factory.mktemp("slow"), limits={"render_seconds": 0.2}
    ) as made:
        made.store_all(PHANTOM.datasets())
        service = volumes(made)
        # The first one may take the time that a process needs to start.
        service.draw_plane(ADMIN, uid(1), uid(1, 1), PlaneRequest())
        slow = PlaneRequest(rows=2000, columns=2000, thickness=100.0)
        with pytest.raises(DependencyDown, match="not finished"):
            service.draw_plane(ADMIN, uid(1), uid(1, 1), slow)
        service.draw_plane(ADMIN, uid(1), uid(1, 1), PlaneRequest())


def decoded(ds: Dataset) -> NDArray[Any]:
    """Return the pixels of an image by codecs of this test's own choice."""
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return np.asarray(ds.pixel_array)
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    found = np.asarray(imagecodecs.imread(frame))
    if ds.PixelRepresentation and found.dtype.kind == "u":
        shift = 16 - ds.BitsStored
        found = (found.astype(np.uint16) << shift).view(np.int16) >> shift
    return found


def itk_image(datasets: Sequence[Dataset]) -> Any:
    """Return a series as SimpleITK holds it, sorted by position."""
    first = datasets[0]
    right, down = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(right, down)
    datasets = sorted(
        datasets,
        key=lambda ds: float(np.dot(np.array(ds.ImagePositionPatient, float), normal)),
    )
    positions = [np.array(ds.ImagePositionPatient, float) for ds in datasets]
    step = float(np.linalg.norm(positions[-1] - positions[0])) / (len(positions) - 1)
    values = [
        decoded(ds).astype(np.float32) * float(ds.get("RescaleSlope", 1))
        + float(ds.get("RescaleIntercept", 0))
        for ds in datasets
    ]
    image: Any = sitk.GetImageFromArray(np.array(values, np.float32))
    rows, columns = map(float, first.PixelSpacing)
    image.SetOrigin([float(one) for one in positions[0]])
    image.SetSpacing((columns, rows, step))
    image.SetDirection(np.stack((right, down, normal), 1).reshape(-1).tolist())
    return image


SERIES = (
    "chest-ct/lungpetctdx-A0001",
    "chest-ct/lidc-idri-0001",
    "chest-ct/lidc-idri-0003",
    "brain-mr/normal-3d-T1",
    "brain-mr/tumour-PGBM-001-T1post",
)


@corpus.needs_corpus
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("folder", SERIES)
def test_planes_of_the_corpus_equal_those_of_another_program(
    stored: Archive, folder: str
) -> None:
    """JPEG-LS, JPEG 2000, JPEG lossless; axial, oblique; CT, MR; four planes each."""
    paths = corpus.files(folder)
    for path in paths:
        stored.store(path.read_bytes())
    datasets = [pydicom.dcmread(path) for path in paths]
    study, series = datasets[0].StudyInstanceUID, datasets[0].SeriesInstanceUID
    image = itk_image(datasets)
    library: Any = sitk

    for right, down in (
        ((1, 0, 0), (0, 1, 0)),
        ((1, 0, 0), (0, 0, -1)),
        ((0, 1, 0), (0, 0, -1)),
        ((0.8, 0.6, 0.0), (-0.36, 0.48, 0.8)),
    ):
        drawn = volumes(stored).draw_plane(
            ADMIN,
            study,
            series,
            PlaneRequest(
                preset=None, right=right, down=down, spacing=(1.7, 1.3), format="int16"
            ),
        )
        facts = drawn.facts
        normal = np.cross(facts["orientation"][:3], facts["orientation"][3:])
        axes = np.stack((facts["orientation"][:3], facts["orientation"][3:], normal), 1)
        other = sitk.GetArrayFromImage(
            library.Resample(
                image,
                (facts["columns"], facts["rows"], 1),
                library.Transform(),
                sitk.sitkLinear,
                list(facts["position"]),
                (facts["spacing"][1], facts["spacing"][0], 1.0),
                axes.reshape(-1).tolist(),
                -9999.0,
            )
        )[0]
        raw = np.frombuffer(drawn.body, "<i2").reshape(other.shape)
        known = (raw != facts["outside"]) & (other > -9998)
        mine = raw * facts["slope"] + facts["intercept"]
        assert known.mean() > 0.05
        assert ((raw != facts["outside"]) != (other > -9998)).mean() < 0.01
        # Half a value of rounding; positions of files are rounded to micrometres.
        allowed = 0.51 * facts["slope"] + 0.01 * np.ptp(other[known])
        assert np.abs(mine - other)[known].max() < allowed
        assert np.abs(mine - other)[known].mean() < 0.4


@corpus.needs_corpus
@pytest.mark.filterwarnings("ignore")
def test_both_stacks_of_an_enhanced_image(stored: Archive) -> None:
    """Magnitude and phase at the same 32 positions, in one multi-frame object."""
    path = corpus.CORPUS / "objects" / "IM_0027_fMAP.dcm"
    stored.store(path.read_bytes())
    ds = pydicom.dcmread(path)
    frames = ds.pixel_array.astype(float)
    per_frame = ds.PerFrameFunctionalGroupsSequence

    for stack in (0, 1):
        facts = volumes(stored).describe(
            ADMIN, ds.StudyInstanceUID, ds.SeriesInstanceUID, stack=stack
        )
        found = planes(stored, ds.StudyInstanceUID, ds.SeriesInstanceUID, stack)
        assert found.shape == (32, 64, 64)
        assert facts.stack.of == 2
        for k, number in enumerate(facts.frames):
            rescale = per_frame[number - 1].PixelValueTransformationSequence[0]
            slope = float(rescale.RescaleSlope)
            expected = frames[number - 1] * slope + float(rescale.RescaleIntercept)
            assert np.abs(found[k] - expected).max() <= 0.51 * max(1.0, slope)


def test_of_a_study_in_two_institutions_the_own_copy_is_shown(
    stored: Archive,
) -> None:
    """Both are never stacked into one volume."""
    near, far = TenantId("near"), TenantId("far")
    roles = ADMIN.roles
    for tenant, planes_kept in ((near, 4), (far, 6)):
        owner = Actor(tenant, "modality", roles=roles)
        stored.store_all(PHANTOM.datasets()[:planes_kept], actor=owner)
    both = frozenset({near, far})

    counts = {}
    for tenant, readable in ((near, both), (far, both), (TenantId("third"), both)):
        actor = Actor(tenant, "doctor", readable=readable, roles=roles)
        facts = stored.node.views.catalogue.facts(actor, uid(1))
        counts[tenant] = (facts.tenant, facts.series[0].n_instances)

    assert counts == {near: (near, 4), far: (far, 6), "third": (far, 6)}
    alone = Actor(TenantId("third"), "doctor", roles=roles)
    with pytest.raises(NotFound):
        stored.node.views.catalogue.facts(alone, uid(1))


def test_facts_are_json(stored: Archive) -> None:
    stored.store_all(PHANTOM.datasets())
    presets: tuple[Preset, ...] = ("axial", "coronal")
    for preset, slab in product(presets, (None, 5.0)):
        drawn = volumes(stored).draw_plane(
            ADMIN, uid(1), uid(1, 1), PlaneRequest(preset, thickness=slab)
        )
        assert json.loads(json.dumps(dict(drawn.facts)))["unit"] == "HU"
