"""A closed node as its operators run it: commands beside several web processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.identity.sessions import CACHE_SECONDS
from tests.support.accounts import Browser
from tests.support.node import RunningNode
from tests.support.waiting import wait_until

NEW = "Other#horse-8"
STUDIES = "/dicom-web/studies"


@pytest.fixture
def closed_node(tmp_path: Path) -> Iterator[RunningNode]:
    made = RunningNode.start(
        tmp_path / "node",
        open=False,
        identity__hash_memory_kib=8,
        identity__hash_passes=1,
        http__workers=2,
    )
    yield made
    made.stop()


def printed_password(node: RunningNode, *words: str) -> str:
    done = node.run(*words)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^password +(\S+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return found[1]


def of_all_processes(browser: Browser, path: str) -> set[int]:
    """Return the statuses of requests that reach each process."""
    return {browser.get(path).status for _ in range(24)}


@pytest.mark.slow
def test_rights_are_taken_from_all_processes(closed_node: RunningNode) -> None:
    assert b"huying init" in closed_node.log_bytes()
    printed_password(closed_node, "init")
    assert closed_node.run("init").returncode == 1
    given = printed_password(
        closed_node, "user", "add", "wang", "--role", "radiologist"
    )
    browser = Browser(closed_node.http)
    assert browser.log_in("wang", given).status == 200
    body = {"present": given, "password": NEW}
    changed = browser.post("/api/v1/me/password", body)
    assert changed.status == 200, changed.text
    # A session is good in every process, not only where it began.
    assert of_all_processes(browser, STUDIES) == {204}
    token = closed_node.run("token", "add", "ris", "--role", "device").stdout.strip()
    machine = Browser(closed_node.http, headers={"Authorization": f"Bearer {token}"})
    assert of_all_processes(machine, STUDIES) == {204}

    assert closed_node.run("user", "disable", "wang").returncode == 0
    assert closed_node.run("token", "revoke", "ris").returncode == 0

    for one in (browser, machine):
        wait_until(
            lambda one=one: of_all_processes(one, STUDIES) == {401},  # type: ignore[misc]
            "all processes to know",
            seconds=3 * CACHE_SECONDS,
        )
    assert Browser(closed_node.http).log_in("wang", NEW).status == 401


@pytest.mark.slow
def test_a_restart_keeps_sessions_and_locks(closed_node: RunningNode) -> None:
    given = printed_password(
        closed_node, "user", "add", "wang", "--role", "radiologist"
    )
    browser = Browser(closed_node.http)
    browser.log_in("wang", given)
    browser.post("/api/v1/me/password", {"present": given, "password": NEW})
    for _ in range(5):
        Browser(closed_node.http).log_in("nobody", "wrong")

    closed_node.restart()

    assert browser.get(STUDIES).status == 204
    assert Browser(closed_node.http).log_in("nobody", "wrong").status == 429
