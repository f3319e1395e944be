"""Archives behind the viewer's endpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import corpus
from tests.support.viewing import Viewing, viewing_archive
from tests.support.volumes import Phantom


@pytest.fixture
def viewing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    """Yield an empty archive."""
    with viewing_archive(tmp_path_factory.mktemp("viewing")) as made:
        yield made


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    """Yield an archive with a phantom as study 1: series 1 axial, series 2 sagittal."""
    with viewing_archive(tmp_path_factory.mktemp("phantom")) as made:
        made.archive.store_all(Phantom().datasets(series=1))
        made.archive.store_all(Phantom("sagittal").datasets(series=2))
        yield made


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    """Yield an archive with the corpus chest CT and the objects made over it."""
    if not corpus.CORPUS.is_dir():
        pytest.skip("no corpus of public images")
    with viewing_archive(tmp_path_factory.mktemp("chest")) as made:
        for path in corpus.files("chest-ct/lungpetctdx-A0001"):
            made.archive.store(path.read_bytes())
        for name in ("gsps-lung-window", "kos-of-interest", "kos-manifest-xdsi"):
            path = corpus.CORPUS / "objects" / f"{name}.dcm"
            made.archive.store(path.read_bytes())
        yield made
