"""The locks hold versions and hashes of everything declared, and no addresses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements-dev.lock")
PINNED = re.compile(r"^([a-z0-9-]+)==([^ ]+)", re.MULTILINE)


def pinned(lock: str) -> set[tuple[str, str]]:
    return set(PINNED.findall((ROOT / lock).read_text("utf-8")))


def declared(*, development: bool) -> set[str]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(table["dependencies"])
    if development:
        lines += table["optional-dependencies"]["dev"]
    names = (re.split(r"[^A-Za-z0-9.-]", line)[0] for line in lines)
    return {name.lower().replace(".", "-") for name in names}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8")

    assert "://" not in text
    assert not re.search(r"^\s*--(?!hash=sha256:)", text, re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS)
def test_everything_pinned_has_a_hash(lock: str) -> None:
    text = (ROOT / lock).read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if PINNED.match(line)]

    assert len(lines) > 20
    assert all("--hash=sha256:" in line for line in lines)


def test_everything_declared_is_pinned() -> None:
    assert declared(development=False) <= {name for name, _ in pinned(LOCKS[0])}
    assert declared(development=True) <= {name for name, _ in pinned(LOCKS[1])}


def test_what_is_tested_is_what_runs() -> None:
    assert pinned(LOCKS[0]) <= pinned(LOCKS[1])
