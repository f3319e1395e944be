"""Whole images of the corpus: every syntax renders, and as SimpleITK reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pacs.imaging.dataset import inflate, scan
from pacs.imaging.part10 import read_file_meta
from pacs.imaging.pool import Job, WorkerPool
from pacs.imaging.syntaxes import DEFLATED
from pacs.rendering.colour import colour_frame
from pacs.rendering.grayscale import chain_of
from pacs.rendering.header import read_header
from pacs.rendering.parameters import PNG, Wanted, Window
from pacs.rendering.pixels import read_frame
from storage.kernel.errors import ImagingError, InvalidInput
from storage.kernel.limits import GIB, Limits
from tests.support.corpus import CORPUS, files, needs_corpus
from tests.support.pictures import arguments, rendered

pytestmark = needs_corpus


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(Limits())
    yield made
    made.close()


#: No other decoder reads these either (see the corpus' README).
UNREADABLE = {
    "JPEG2000-embedded-sequence-delimiter.dcm",
    "nested_priv_SQ.dcm",  # one byte of pixels
}
#: SimpleITK mixes up the bytes of its segments; pydicom reads it as we do.
MISREAD = {"SC_rgb_rle_16bit.dcm"}
FOLDERS = ("syntaxes", "objects", "chest-dr", "bone-dr")
SAMPLES = ("chest-ct/lidc-idri-0001", "chest-ct/lidc-idri-0002", "brain-mr")


def has_pixels(path: Path) -> bool:
    data = path.read_bytes()
    try:
        meta = read_file_meta(data)
        if meta is None:
            return False
        body = data[meta.dataset_offset :]
        if meta.transfer_syntax_uid == DEFLATED:
            body = inflate(body, Limits())
        found = scan(body, 0, len(body), meta.transfer_syntax_uid, Limits())
    except ImagingError:
        return False
    return found.pixel is not None


def images() -> list[Path]:
    paths = [path for folder in FOLDERS for path in files(folder)]
    paths += [path for folder in SAMPLES for path in files(folder)[:3]]
    return [path for path in paths if has_pixels(path)]


def name_of(path: Path) -> str:
    return path.relative_to(CORPUS).as_posix()


@pytest.mark.parametrize("path", images(), ids=name_of)
def test_every_image_of_the_corpus_has_a_picture(path: Path) -> None:
    if path.name in UNREADABLE:
        with pytest.raises(ImagingError):
            rendered(path)
        return
    shown = rendered(path)
    assert shown.dtype == np.uint8
    assert shown.ndim == 2 or shown.shape[2] == 3


def shown_plainly(path: Path, window: Window | None) -> Any:
    """Return the pixels without overlays, shutters or a change of aspect."""
    given, payloads = arguments(path.read_bytes(), (1,), Wanted(PNG))
    header = read_header(payloads[0], given["header_syntax"])
    frame = read_frame(
        header, payloads[1], given["syntax"], GIB,
        pixel_tag=given["pixel_tag"], words=given["words"],
    )  # fmt: skip
    if frame.is_colour:
        return colour_frame(frame)
    if frame.photometric != "MONOCHROME2" or frame.bits_stored == 1:
        # SimpleITK turns MONOCHROME1 round and applies palettes by itself.
        return None
    return chain_of(header, frame, window).render(frame)


@pytest.mark.parametrize("path", images(), ids=name_of)
def test_pixels_are_those_that_simpleitk_reads(path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject_SetGlobalWarningDisplay(False)
    if path.name in UNREADABLE | MISREAD or shown_plainly(path, None) is None:
        pytest.skip("SimpleITK gives other values")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        read = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError:
        pytest.skip("SimpleITK cannot read it")
    if read.shape[-1] == 3 and read.ndim > 2:
        expected = read[0] if read.ndim == 4 else read
        shown = shown_plainly(path, None)
        if expected.dtype != np.uint8:
            expected = expected >> 8
    else:
        values = read[0].astype(np.float64)
        center, width = float(values.mean()), max(2.0, float(3 * values.std()))
        low, high = center - width / 2, center + width / 2
        filtered = sitk.IntensityWindowing(
            sitk.GetImageFromArray(values), low, high, 0, 255
        )
        expected = np.floor(sitk.GetArrayFromImage(filtered) + 0.5)
        shown = shown_plainly(path, Window(center, width, "linear-exact"))
    error = np.abs(shown.astype(int) - expected)

    # Rounding, and two implementations of lossy JPEG.
    assert error.max() <= (6 if read.shape[-1] == 3 else 1)
    assert error.mean() < 1


def test_one_image_in_many_lossless_syntaxes_is_one_picture() -> None:
    names = ("LittleEndian", "BigEndian", "Deflated", "RLE", "JPEGLSLossless",
             "JPEG2000LosslessOnly", "JPEGProcess14")  # fmt: skip
    same = [
        path
        for path in files("syntaxes")
        if path.name.startswith("CT_") and any(name in path.name for name in names)
    ]
    assert len(same) >= 9
    colours = [rendered(path) for path in same]
    # The RLE file is another slice's colour twin when it has three samples.
    grey = [one for one in colours if one.ndim == 2]
    assert len(grey) >= 8
    assert all((one == grey[0]).all() for one in grey)


def test_nine_ways_of_one_series_are_one_series() -> None:
    pictures = [rendered(path) for path in files("syntaxes/mr-nine-ways")]
    assert len(pictures) == 9
    assert len({one.shape for one in pictures}) == 1


@pytest.mark.parametrize("path", files("broken"), ids=lambda path: path.name)
def test_broken_objects_are_shown_or_refused_in_a_worker(
    pool: WorkerPool, path: Path
) -> None:
    try:
        given, payloads = arguments(path.read_bytes(), (1,), Wanted(PNG))
    except (ImagingError, AssertionError):
        return  # never stored, or without pixels
    job = Job("pacs.rendering.jobs:render", given, payloads)
    reason = ""
    try:
        assert pool.run(job).body.startswith(b"\x89PNG")
    except InvalidInput as error:
        reason = str(error)
    # In words of ours, not of a library that stumbled.
    assert "Error:" not in reason
