"""Servers and settings that several suites share."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from storage.kernel.settings import Objects
from tests.support import postgres as postgresql
from tests.support import process, seaweed
from tests.support.node import RunningNode
from tests.support.orthanc import Orthanc
from tests.support.seaweed import SeaweedFS

#: What makes a test slow: a server of its own, or its place.
SLOW_FIXTURES = frozenset({"postgres", "seaweedfs", "orthanc", "node", "shared_node"})
SLOW_FOLDERS = frozenset({"e2e", "fault", "protocol"})
SLOW_PARAMS = frozenset({"postgresql", "s3"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves to `make test`."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        wanted: set[str] = set(getattr(item, "fixturenames", ()))
        callspec = getattr(item, "callspec", None)
        params = getattr(callspec, "params", {}).values()
        engines = any(isinstance(one, str) and one in SLOW_PARAMS for one in params)
        if folder in SLOW_FOLDERS or wanted & SLOW_FIXTURES or engines:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the nodes of a failed test have written."""
    report = yield
    if report.failed:
        for node in RunningNode.alive:
            report.sections.append((f"node {node.data}", process.tail(node.log)))
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Yield the address of a PostgreSQL server."""
    with postgresql.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of an empty database, one engine after the other."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'index.db'}"
        return
    with postgresql.empty_database(request.getfixturevalue("postgres")) as url:
        yield url


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[SeaweedFS]:
    """Yield an S3 service; each `objects()` of it has a bucket of its own."""
    with seaweed.running() as server:
        yield server


@pytest.fixture(params=["files", "s3"])
def object_store_settings(request: pytest.FixtureRequest) -> Objects:
    """Return settings for an empty object store, one kind after the other.

    The files store lives in the data folder.
    """
    if request.param == "files":
        return Objects()
    made: SeaweedFS = request.getfixturevalue("seaweedfs")
    return made.objects()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    """Yield an empty node of one test's own."""
    made = RunningNode.start(tmp_path / "node")
    yield made
    made.stop()


@pytest.fixture(scope="session")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """Yield a node that tests share: they look only at studies of their own."""
    made = RunningNode.start(tmp_path_factory.mktemp("shared-node"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Yield Orthanc; a test clears what it finds there."""
    made = Orthanc(tmp_path_factory.mktemp("orthanc"))
    made.start()
    yield made
    made.stop()
