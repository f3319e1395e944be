"""Who may import whom. The tables are the rule; the tests only read them."""

from __future__ import annotations

import ast
import importlib
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "storage": set[str](),
    "pacs": {"storage"},
    "xds": {"storage"},
    "ai": {"storage"},
    "viewer": {"storage"},
    "gateway": {"storage", "pacs", "xds", "ai", "viewer"},
}

#: Inside a package, by folder: whose modules a folder must not import.
LAYERS = {
    "pacs/domain": {
        "pacs.services", "pacs.repository", "pacs.dimse", "pacs.web",
    },
    "pacs/imaging": {
        "pacs.services", "pacs.repository", "pacs.dimse", "pacs.web",
    },
    "pacs/rendering": {
        "pacs.services", "pacs.repository", "pacs.dimse", "pacs.web",
    },
    "pacs/repository": {"pacs.services", "pacs.dimse", "pacs.web"},
    "pacs/services": {"pacs.dimse.server", "pacs.dimse.association", "pacs.web"},
    "pacs/dimse": {"pacs.web", "pacs.repository"},
    "pacs/web": {"pacs.dimse", "pacs.repository"},
    "storage/kernel": {
        "storage.db", "storage.packs", "storage.objects", "storage.jobs",
        "storage.outbox", "storage.group",
    },
    "storage/packs": {"storage.db", "storage.jobs", "storage.outbox"},
    "storage/objects": {"storage.db", "storage.jobs", "storage.outbox"},
    "storage/db": {"storage.packs", "storage.jobs"},
}  # fmt: skip

#: Libraries that only these places may import.
CONFINED = {
    "fastapi": ("pacs/web/", "gateway/", "viewer/"),
    "starlette": ("pacs/web/", "gateway/", "viewer/"),
    "uvicorn": ("gateway/",),
    "typer": (
        "gateway/audit_cli.py",
        "gateway/cli.py",
        "gateway/dicom_cli.py",
        "gateway/identity/commands.py",
        "gateway/options.py",
    ),
    "rich": ("gateway/",),
    "dbos": ("storage/jobs/runner.py",),
    "minio": ("storage/objects/",),
    "alembic": ("storage/db/",),
    "PIL": ("pacs/rendering/",),
    "imagecodecs": ("pacs/imaging/", "pacs/rendering/", "gateway/doctor.py"),
    "pynetdicom": (),
    "pytest": (),
    "tests": (),
}

#: Libraries that these places must do without.
WITHOUT = {
    "storage/kernel": {"sqlalchemy", "pydicom", "numpy"},
    "storage/packs": {"sqlalchemy", "pydicom"},
    "storage/objects": {"sqlalchemy", "pydicom"},
    "pacs/domain": {"sqlalchemy", "pydicom", "structlog"},
    "pacs/imaging": {"sqlalchemy"},
    "pacs/repository": {"pydicom"},
}

MAX_LINES = 700

MODULES = sorted(
    path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of what `path` imports, absolute and relative."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_below(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    found = {name.split(".")[0] for name in imports(path)} & MAY_IMPORT.keys()

    assert found <= MAY_IMPORT[package] | {package}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_layers_inside_a_package_point_downwards(path: Path) -> None:
    forbidden: set[str] = set()
    for folder, places in LAYERS.items():
        if name_of(path).startswith(f"{folder}/"):
            forbidden |= places

    assert not [name for name in imports(path) if is_below(name, forbidden)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imports(path)}
    strayed = {
        library
        for library, places in CONFINED.items()
        if library in libraries and not name_of(path).startswith(places)
    }
    for folder, names in WITHOUT.items():
        if name_of(path).startswith(f"{folder}/"):
            strayed |= names & libraries

    assert not strayed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_climbs_out_of_its_folder(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    levels = [n.level for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]

    assert max(levels, default=0) <= 1


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_all_packages_lie_in_one_folder() -> None:
    parents = {
        Path(str(importlib.import_module(name).__file__)).parents[1]
        for name in MAY_IMPORT
    }

    assert parents == {ROOT}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_say_what_they_are_and_that_they_are_typed(package: str) -> None:
    init = ROOT / package / "__init__.py"

    assert ast.get_docstring(ast.parse(init.read_text("utf-8")))
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize("package", ["ai", "xds"])
def test_a_package_that_has_nothing_yet_is_only_its_docstring(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    body = ast.parse(modules[0].read_text("utf-8")).body

    assert len(modules) == 1
    assert len(body) == 1


#: Modules of distributions that are called otherwise.
_OTHER_NAMES = {"argon2_cffi": "argon2", "backports.zstd": "backports", "pillow": "PIL"}


def test_every_dependency_is_imported() -> None:
    """All but two, which uvicorn loads by name."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    declared = {
        line.split(">=")[0].split("[")[0].replace("-", "_")
        for line in table["project"]["dependencies"]
    }
    imported = {name.split(".")[0] for path in MODULES for name in imports(path)}

    declared = {_OTHER_NAMES.get(one, one) for one in declared}
    assert declared - imported <= {"httptools", "uvloop"}
