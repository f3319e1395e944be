"""The page of a whole node: what is sent to it appears, and can be fetched again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from playwright.sync_api import expect

from tests.e2e.conftest import Opener
from tests.support import dcmtk
from tests.support.datasets import a_study, part10
from tests.support.node import RunningNode


def test_the_first_study_by_the_command_the_page_gives(
    node: RunningNode, open_page: Opener, tmp_path: Path
) -> None:
    images = a_study(seed=1, n_series=2, n_instances=3)
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number}.dcm").write_bytes(part10(image))
    page = open_page(node.http)
    name, *arguments = shlex.split(page.locator(".state code").inner_text())
    assert arguments[-1] == "./dicom"

    dcmtk.run(name, *arguments[:-1], folder)

    expect(page.locator(".opener")).to_have_text("测试1")
    expect(page.locator(".study .c-images")).to_have_text("6")
    expect(page.locator("#in-minute")).to_contain_text(re.compile(r"^6 "))
    expect(page.locator("#n-instances")).to_have_text("6")
    page.locator(".opener").click()
    expect(page.locator(".panel tbody tr")).to_have_count(2)
    download, metadata = page.locator(".panel a").all()
    with page.expect_download() as saved:
        download.click()
    body = saved.value.path().read_bytes()
    assert [image for image in images if image.PixelData not in body] == []
    with page.expect_download() as saved:
        metadata.click()
    assert saved.value.path().read_text("utf-8").count('"00080018"') == len(images)
