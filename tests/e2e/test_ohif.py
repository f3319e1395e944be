"""A foreign viewer shows corpus studies from our DICOMweb, in a real browser."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support import web
from tests.support.corpus import files, needs_corpus
from tests.support.dicomweb import multipart
from tests.support.node import RunningNode
from tests.support.ohif import NotToBeHad, Viewer, fetch, viewer

#: What is opened, and the parts of it that are sent.
STUDIES = {
    "ct": "chest-ct/lungpetctdx-A0001",
    "dr": "chest-dr",
    "mr": "brain-mr/tumour-PGBM-001-T1post",
}
SIDE = 96

pytestmark = [pytest.mark.slow, needs_corpus, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return fetch(tmp_path_factory.mktemp("ohif"))
    except NotToBeHad as missing:
        pytest.skip(f"no OHIF to test with: {missing}")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    running = RunningNode.start(tmp_path_factory.mktemp("node"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def ohif(pages: Path, node: RunningNode) -> Iterator[Viewer]:
    with viewer(pages, node.http_port) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a browser that draws WebGL without a graphics card."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("OHIF is tested in Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox", "--disable-quic", "--no-first-run",
                "--use-gl=angle", "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
            ],
        )  # fmt: skip
        yield made
        made.close()


def sent(node: RunningNode, name: str) -> list[pydicom.Dataset]:
    """Store the objects of a study; return them."""
    found = files(STUDIES[name])
    if name == "dr":
        found = [path for path in found if path.name.startswith("001")]
    body, headers = multipart([path.read_bytes() for path in found])
    answer = web.request(
        f"{node.dicomweb}/studies", method="POST", body=body, headers=headers
    )
    assert answer.status in {200, 202}, answer.text
    return [pydicom.dcmread(path) for path in found]


def small(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a picture as a few standardised values."""
    picture = Image.fromarray(grey.astype(np.float32), mode="F")
    values = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), float)
    values = values - values.mean()
    return np.asarray(values / (values.std() or 1.0))


def windowed(array: np.ndarray[Any, Any], ds: pydicom.Dataset) -> Any:
    """Return an image as its first window shows it (PS3.3 C.11.2.1.2)."""
    slope = float(ds.get("RescaleSlope", 1) or 1)
    values = array * slope + float(ds.get("RescaleIntercept", 0) or 0)
    if "WindowCenter" not in ds:
        return values
    centre = float(np.atleast_1d(ds.WindowCenter)[0])
    width = float(np.atleast_1d(ds.WindowWidth)[0])
    shown = np.clip(values, centre - width / 2, centre + width / 2)
    return -shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown


def shown(page: Page, ratio: float) -> np.ndarray[Any, Any]:
    """Return the middle of the viewport, where an image of that ratio is."""
    box = page.locator(".cornerstone-canvas").first
    picture = Image.open(io.BytesIO(box.screenshot())).convert("L")
    width, height = picture.size
    wide = min(width, height * ratio)
    high = wide / ratio
    left, top = (width - wide) / 2, (height - high) / 2
    cut = picture.crop((round(left), round(top), round(left + wide), round(top + high)))
    return np.asarray(cut, float)


@pytest.mark.parametrize("name", STUDIES)
def test_ohif_shows_a_study(
    name: str, node: RunningNode, ohif: Viewer, browser: Browser, tmp_path: Path
) -> None:
    objects = sent(node, name)
    study = objects[0].StudyInstanceUID
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    errors: list[str] = []
    try:
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{ohif.url}/viewer?StudyInstanceUIDs={study}")
        page.locator(".cornerstone-canvas").first.wait_for(timeout=60_000)
        expected = [small(windowed(_pixels(ds, node), ds)) for ds in objects]
        ratio = objects[0].Columns / objects[0].Rows
        likeness = -1.0
        for _ in range(60):
            page.wait_for_timeout(500)
            skip = page.get_by_text("Skip all")
            if skip.count():
                skip.first.click()
            seen = small(shown(page, ratio))
            likeness = max(float((seen * one).mean()) for one in expected)
            if likeness > 0.9:
                break
        page.screenshot(path=tmp_path / f"{name}.png")
        assert likeness > 0.9, f"the viewport is not like the image: {likeness:.2f}"
    finally:
        context.close()
    assert errors == []
    assert [one for one in ohif.asked if one.status >= 400] == []
    assert any("/frames/" in one.path for one in ohif.asked)


def _pixels(ds: pydicom.Dataset, node: RunningNode) -> np.ndarray[Any, Any]:
    """Return the samples of an object, by way of the node's own frames."""
    path = (
        f"/studies/{ds.StudyInstanceUID}/series/{ds.SeriesInstanceUID}"
        f"/instances/{ds.SOPInstanceUID}/frames/1"
    )
    accept = "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
    answer = web.request(node.dicomweb + path, headers={"Accept": accept})
    assert answer.status == 200, answer.text
    kind = f"<{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"
    return np.frombuffer(answer.body, kind).reshape(ds.Rows, ds.Columns)


def test_ohif_lists_the_studies(
    node: RunningNode, ohif: Viewer, browser: Browser
) -> None:
    sent(node, "dr")
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        page = context.new_page()
        page.goto(ohif.url)
        page.get_by_text("XR CHEST").first.wait_for(timeout=60_000)
    finally:
        context.close()
