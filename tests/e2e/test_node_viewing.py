"""The viewer's endpoints of a whole node: its gate, its processes, its audit."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tests.support.datasets import part10, uid
from tests.support.dicomweb import multipart
from tests.support.node import RunningNode
from tests.support.volumes import Phantom
from tests.support.waiting import wait_until

SEED = 7301
STUDY, SERIES = uid(SEED), uid(SEED, 1)
V1 = "/api/v1/viewer"
RENDER = f"{V1}/render?study={STUDY}&series={SERIES}"


def workers_of(node: RunningNode) -> list[int]:
    """Return the processes that draw or decode for the node's web processes."""
    found = []
    for child in psutil.Process(node.pid).children(recursive=True):
        try:
            if "pacs.imaging.worker" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


def test_a_study_is_shown_without_a_page(node: RunningNode) -> None:
    files = [part10(ds) for ds in Phantom().datasets(seed=SEED)]
    assert node.request("POST", "/dicom-web/studies", *multipart(files)).status == 200

    manifest = node.request("GET", f"{V1}/manifest/{STUDY}").json()
    (series,) = manifest["series"]
    thumbnail = node.request("GET", series["thumbnail"])
    frames = node.request("GET", series["frames"])
    drawn = node.request(
        "POST", RENDER, json.dumps({"plane": "coronal", "width": 64}).encode()
    )
    ahead = node.request("POST", f"{V1}/prefetch?study={STUDY}")

    assert series["volume"]["size"] == [40, 32, 20]
    assert thumbnail.status == 200
    assert frames.body.startswith(b"HYFRAMES")
    assert len(frames.body) > 20 * 32 * 40 * 2
    shown = np.asarray(Image.open(io.BytesIO(drawn.body)))
    assert shown.shape[1] == 64
    assert shown.max() > shown.min()
    assert ahead.status == 202


def test_killed_workers_cost_no_more_than_a_request(node: RunningNode) -> None:
    files = [part10(ds) for ds in Phantom().datasets(seed=SEED)]
    node.request("POST", "/dicom-web/studies", *multipart(files))
    for _ in range(4):
        assert node.request("POST", RENDER, b"{}").status == 200

    before = workers_of(node)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not set(workers_of(node)) & set(before), "them to be dead")
    answers = {node.request("POST", RENDER, b"{}").status for _ in range(6)}

    assert before
    assert answers == {200}
    assert node.request("GET", "/readyz").status == 200


def test_nothing_is_left_when_the_node_stops(tmp_path: Path) -> None:
    made = RunningNode.start(tmp_path)
    try:
        files = [part10(ds) for ds in Phantom().datasets(seed=SEED)]
        made.request("POST", "/dicom-web/studies", *multipart(files))
        assert made.request("POST", RENDER, b"{}").status == 200
        workers = workers_of(made)
    finally:
        made.stop()

    assert workers
    wait_until(
        lambda: not [pid for pid in workers if psutil.pid_exists(pid)],
        "the workers to end with the node",
    )


def test_the_audit_names_what_was_rendered(node: RunningNode) -> None:
    files = [part10(ds) for ds in Phantom().datasets(seed=SEED)]
    node.request("POST", "/dicom-web/studies", *multipart(files))
    assert node.request("POST", RENDER, b"{}").status == 200
    assert node.request("POST", f"{V1}/prefetch?study={STUDY}").status == 202

    found = node.request("GET", f"/api/v1/audit?study={STUDY}&limit=100").json()
    named = [
        (one["study_uid"], one["series_uid"])
        for one in found["records"]
        if one["action"] == "get"
    ]

    assert (STUDY, SERIES) in named
    assert (STUDY, "") in named
