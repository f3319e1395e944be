"""A real browser, and pages that may not complain."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.site import Site, served
from tests.support.populated import Made, many

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
LONG = (
    "胸部CT平扫加增强扫描及三维重建，含肺动脉及胸主动脉血管成像，"
    "扫描范围自胸廓入口至肾上腺水平"
)
#: Newest first, as the list shows them.
ODD = [
    Made(
        uid="1.2.826.9.1",
        patient_id="<img src=x onerror=alert(1)>",
        name="<script>alert(1)</script>^O'Brien",
        description='"><svg onload=alert(1)>',
        accession="A&B;'\"",
        study_date="20251231",
    ),
    Made(
        uid="1.2.826.9.2",
        patient_id="P-BIDI",
        name="\u202egnp.exe\u202c^A",
        description="عملية الصدر \u202e CT",
        study_date="20251230",
    ),
    Made(
        uid="1.2.826.9.3",
        patient_id="P-4BYTE",
        name="Ma^Ji=𠮷^野𡈽",
        description="𩸽 " + LONG,
        study_date="20251229",
        modalities=("CT", "PT", "SR", "SEG", "PR", "KO", "OT", "REG"),
    ),
    Made(
        uid="1.2.826.9.4." + "1" * 50,
        patient_id="P" * 64,
        name="W" * 64 + "^" + "V" * 60 + "=" + "王" * 60,
        description=LONG * 2,
        accession="9" * 16,
        study_date="20251228",
        birth_date="20251001",
        sex="F",
    ),
    Made(
        uid="1.2.826.9.5",
        patient_id="",
        name="",
        accession="",
        study_date=None,
        study_time=None,
        birth_date=None,
        sex="",
    ),
]
MANY = 130

Opener = Callable[..., Page]
# The page asks for news every five seconds; the machine may be busy.
expect.set_options(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield a browser; while it lives an event loop counts as running here."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the page is tested in Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-quic", "--no-first-run"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Yield a site with odd and ordinary studies, and some activity."""
    with served(tmp_path_factory.mktemp("full"), ODD + many(MANY)) as site:
        site.arrive((40, 0), (300, 3), (500, 10), (2000, 200))
        yield site


@pytest.fixture
def empty_site(tmp_path: Path) -> Iterator[Site]:
    with served(tmp_path) as site:
        yield site


@pytest.fixture
def complaints() -> list[str]:
    """What pages wrote to the console; a test that expects some clears it."""
    return []


@pytest.fixture
def open_page(browser: Browser, complaints: list[str]) -> Iterator[Opener]:
    """Yield a function that opens a page; it must not have complained at the end."""
    contexts = []

    def opened(url: str, **options: Any) -> Page:
        options.setdefault("viewport", DESKTOP)
        options.setdefault("locale", "zh-CN")
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
