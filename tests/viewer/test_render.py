"""Pictures of volumes over HTTP: what comes, what is refused, what a death costs."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
from PIL import Image

from pacs.imaging.pool import Answer, Job, WorkerPool
from tests.support.datasets import a_study, uid
from tests.support.viewing import Viewing, viewing_archive
from tests.support.volumes import Phantom
from tests.support.waiting import wait_until
from tests.support.web import Response
from viewer.endpoints import MAX_WAITING, ROOM
from viewer.views import PRESET

AXIAL = {"study": uid(1), "series": uid(1, 1)}
SAGITTAL = {"study": uid(1), "series": uid(1, 2)}


def picture(answer: Response) -> Any:
    assert answer.status == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.body)))


def raw(answer: Response) -> tuple[Any, dict[str, Any]]:
    """Return values and facts of an int16 answer; outside is NaN."""
    assert answer.status == 200, answer.text
    facts = json.loads(answer.headers["x-picture"])
    stored = np.frombuffer(answer.body, "<i2").reshape(facts["rows"], facts["columns"])
    values = stored * facts["slope"] + facts["intercept"]
    values[stored == facts["outside"]] = np.nan
    return values, facts


@pytest.mark.parametrize("ref", [AXIAL, SAGITTAL])
def test_values_are_in_hounsfield_units_where_the_headers_say(
    phantom: Viewing, ref: dict[str, Any]
) -> None:
    orientation = "axial" if ref is AXIAL else "sagittal"
    made = Phantom(orientation)
    middle = made.centre()

    answer = phantom.render(
        {
            **ref,
            "plane": "coronal",
            "through": [float(one) for one in middle],
            "format": "int16",
            "spacing": 1.0,
        },
    )

    values, facts = raw(answer)
    assert facts["unit"] == "HU"
    assert facts["orientation"] == [1, 0, 0, 0, 0, -1]
    row = round((facts["position"][2] - middle[2]) / facts["spacing"][0])
    column = round((middle[0] - facts["position"][0]) / facts["spacing"][1])
    assert values[row, column] == 300
    assert np.nanmin(values) == -1000


def test_an_oblique_plane_goes_through_the_point_that_was_asked_for(
    phantom: Viewing,
) -> None:
    made = Phantom()
    small = made.centre() + np.array(made.spheres[1][0])
    right, down = np.array([0.6, 0.8, 0.0]), np.array([0.0, 0.0, -1.0])
    origin = small - right * 10 - down * 10

    answer = phantom.render(
        {
            **AXIAL,
            "plane": {
                "right": right.tolist(),
                "down": down.tolist(),
                "origin": origin.tolist(),
            },
            "width": 41,
            "height": 41,
            "spacing": [0.5, 0.5],
            "format": "int16",
        },
    )

    values, facts = raw(answer)
    assert (facts["rows"], facts["columns"]) == (41, 41)
    assert values[20, 20] == 1000
    assert values[0, 0] == -1000


@pytest.mark.parametrize(
    ("mode", "expected"), [("mip", 1000), ("minip", -1000), ("average", None)]
)
def test_slabs(phantom: Viewing, mode: str, expected: float | None) -> None:
    answer = phantom.render(
        {
            **AXIAL,
            "slab": {"thickness": 40, "mode": mode},
            "format": "int16",
        },
    )

    values, facts = raw(answer)
    assert facts["thickness"] == 40
    if expected is None:
        assert -1000 < np.nanmax(values) < 1000
    elif mode == "mip":
        assert np.nanmax(values) == expected
    else:
        assert np.nanmin(values) == expected


@pytest.mark.parametrize(
    ("form", "media"),
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")],
)
def test_windowed_pictures_in_every_format(
    phantom: Viewing, form: str, media: str
) -> None:
    answer = phantom.render(
        {
            **AXIAL,
            "format": form,
            "quality": 95,
            "width": 64,
            "height": 64,
            "window": {"center": 0, "width": 2000},
        },
    )

    shown = picture(answer)
    shown = shown[..., 0] if shown.ndim == 3 else shown
    assert answer.headers["content-type"] == media
    assert answer.headers["cache-control"] == "no-store"
    # -1000 HU is black, 300 HU is (300 + 0.5) / 1999 + 0.5 of white.
    assert shown[2, 32] <= 6
    assert int(shown[32, 32]) == pytest.approx(166, abs=4)


def test_the_window_of_the_images_is_the_default(phantom: Viewing) -> None:
    answer = phantom.render(AXIAL)

    assert json.loads(answer.headers["x-picture"])["window"] == [40.0, 400.0]


def test_inverted_turns_light_and_dark_but_not_what_is_outside(
    phantom: Viewing,
) -> None:
    asked = {**AXIAL, "plane": "coronal", "width": 100, "height": 300, "spacing": 1}
    plain = picture(phantom.render(asked)).astype(int)
    inverted = picture(phantom.render({**asked, "invert": True})).astype(int)

    inside = plain + inverted == 255
    assert inside.any()
    assert (plain[~inside] == 0).all()
    assert (inverted[~inside] == 0).all()
    assert (plain[0] == 0).all()


def test_a_volume_rendering_shows_the_spheres(phantom: Viewing) -> None:
    answer = phantom.render(
        {
            **AXIAL,
            "kind": "volume",
            "preset": "bone",
            "width": 96,
            "height": 96,
            "zoom": 1.2,
        },
    )

    shown = picture(answer)
    assert shown.shape == (96, 96, 3)
    assert shown[48, 48].max() > 60
    assert shown[2].max() == 0


GOOD_PLANE = {"right": [1, 0, 0], "down": [0, 1, 0]}
BAD: list[tuple[dict[str, Any], int]] = [
    ({"plane": "diagonal"}, 400),
    ({"plane": {"right": [0, 0, 0], "down": [0, 1, 0]}}, 400),
    ({"plane": {"right": [1, 0, 0], "down": [1, 1, 0]}}, 400),
    ({"plane": {"right": [1, 0], "down": [0, 1, 0]}}, 400),
    ({"plane": {"right": [1, 0, 0]}}, 400),
    ({"plane": {"right": [1e300, 0, 0], "down": [0, 1, 0]}}, 400),
    ({"plane": {"right": ["x", 0, 0], "down": [0, 1, 0]}}, 400),
    ({"plane": {**GOOD_PLANE, "origin": [1e30, 0, 0]}, "width": 8, "height": 8}, 400),
    ({"plane": {**GOOD_PLANE, "origin": [0, 0, 0]}}, 400),
    ({"plane": GOOD_PLANE, "position": 3}, 400),
    ({"width": 10**9}, 400),
    ({"width": 0}, 400),
    ({"width": -5}, 400),
    ({"width": 1.5}, 400),
    ({"width": "100"}, 400),
    ({"width": 8192, "height": 8192}, 413),
    ({"spacing": 0}, 400),
    ({"spacing": -1}, 400),
    ({"spacing": 0.001}, 413),
    ({"spacing": [1]}, 400),
    ({"slab": {"thickness": 0}}, 400),
    ({"slab": {"thickness": -1}}, 400),
    ({"slab": {"thickness": 1e12}}, 400),
    ({"slab": {"thickness": 5, "mode": "sum"}}, 400),
    ({"slab": {"thickness": 2000}, "width": 2000, "height": 2000}, 413),
    ({"window": {"center": 0, "width": 0}}, 400),
    ({"window": {"center": 0}}, 400),
    ({"position": 1e9}, 400),
    ({"interpolation": "magic"}, 400),
    ({"format": "tiff"}, 400),
    ({"format": "jpeg", "quality": 0}, 400),
    ({"format": "jpeg", "quality": 101}, 400),
    ({"kind": "hologram"}, 400),
    ({"kind": "volume", "preset": "nonsense"}, 400),
    ({"kind": "volume", "preset": "../../etc"}, 400),
    ({"kind": "volume", "preset": "bone", "plane": "axial"}, 400),
    ({"kind": "volume", "preset": "bone", "format": "int16"}, 400),
    ({"kind": "volume", "preset": "bone", "zoom": 0}, 400),
    ({"kind": "volume", "preset": "bone", "step": 1e-9}, 400),
    ({"kind": "volume", "preset": "bone", "elevation": 91}, 400),
    ({"kind": "volume", "preset": "bone", "width": 2048, "height": 2048,
      "step": 0.25}, 413),
    ({"preset": "bone"}, 400),
    ({"stack": 1}, 422),
    ({"stack": -1}, 400),
    ({"stack": 10**9}, 400),
    ({"study": "1 2"}, 400),
    ({"series": uid(9, 9)}, 404),
    ({"study": uid(9)}, 404),
    ({"extra": 1}, 400),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "status"), BAD, ids=lambda one: str(one)[:60])
def test_bad_requests_are_named_and_cost_nothing(
    phantom: Viewing, changed: dict[str, Any], status: int
) -> None:
    pids = phantom.views.volumes.pids()
    kept = phantom.views.volumes.kept()

    answer = phantom.render({**AXIAL, **changed})

    assert answer.status == status, answer.text
    assert answer.json()["detail"]
    # No process was needed, and no volume was read for it.
    assert phantom.views.volumes.pids() == pids
    assert phantom.views.volumes.kept() == kept


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"study": NaN}',
        b"\xff\xfe",
        b'{"plane":' * 5000,
        b'{"window": {"center": Infinity, "width": 1}}',
        b'{"spacing": 1e999}',
    ],
)
def test_bodies_that_are_no_json_are_refused(phantom: Viewing, body: bytes) -> None:
    assert phantom.render(AXIAL, body).status == 400


def test_a_body_too_long_is_refused(phantom: Viewing) -> None:
    assert phantom.render(AXIAL, b'{"a": "' + b"x" * 70_000).status == 413


def test_what_is_no_volume_is_said(viewing: Viewing) -> None:
    viewing.archive.store_all(a_study(n_instances=2))

    answer = viewing.render({"study": uid(1), "series": uid(1, 1)})

    assert answer.status == 422
    assert answer.json()["code"] == "input.not_a_volume"
    assert "only 2 parallel images" in answer.json()["detail"]


def test_the_geometry_of_a_volume_alone(phantom: Viewing) -> None:
    found = phantom.json(f"/series/{uid(1, 1)}/volume?study={uid(1)}")

    assert found["size"] == [40, 32, 20]
    low, high = found["bounds"]
    assert low == pytest.approx([-30.625, 11.25, 98.5])
    assert high == pytest.approx([19.375, 59.25, 158.5])


def test_a_volume_is_drawn_by_a_preset_for_any_unit_unless_one_is_named(
    phantom: Viewing,
) -> None:
    asked = {**AXIAL, "kind": "volume", "width": 48, "height": 48}

    drawn = picture(phantom.render(asked))

    assert (drawn == picture(phantom.render({**asked, "preset": PRESET}))).all()
    assert (drawn != picture(phantom.render({**asked, "preset": "bone"}))).any()


def test_a_worker_that_is_killed_costs_one_request(phantom: Viewing) -> None:
    asked = {
        **AXIAL,
        "kind": "volume",
        "preset": "bone",
        "width": 1024,
        "height": 1024,
        "step": 0.25,
    }
    assert phantom.render(AXIAL).status == 200
    (pid,) = phantom.views.volumes.pids()
    answers: list[Response] = []
    asking = threading.Thread(target=lambda: answers.append(phantom.render(asked)))
    asking.start()
    wait_until(lambda: not phantom.views.volumes.pids(), "the worker to be at work")

    os.kill(pid, signal.SIGKILL)
    asking.join()

    assert answers[0].status == 503
    assert phantom.render(AXIAL).status == 200
    assert phantom.views.volumes.pids() != [pid]


def test_a_client_that_leaves_stops_its_picture(
    phantom: Viewing, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = json.dumps(
        {
            "kind": "volume",
            "preset": "soft",
            "width": 1400,
            "height": 1400,
            "step": 0.25,
        }
    ).encode()
    assert phantom.render(AXIAL).status == 200
    pids = phantom.views.volumes.pids()
    address = urlsplit(phantom.base)
    drawn: list[int] = []
    answered = WorkerPool.run

    def run(pool: WorkerPool, job: Job) -> Answer:
        answer = answered(pool, job)
        drawn.append(len(answer.body))
        return answer

    monkeypatch.setattr(WorkerPool, "run", run)

    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(
            b"POST /api/v1/viewer/render?%s HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: %d\r\n\r\n%s"
            % (urlencode(AXIAL).encode(), len(asked), asked)
        )
        wait_until(lambda: not phantom.views.volumes.pids(), "the worker to be busy")

    # The same process is free again; no other had to be started, nothing was drawn.
    wait_until(lambda: phantom.views.volumes.pids() == pids, "the worker to be free")
    assert drawn == []
    assert phantom.render(AXIAL).status == 200
    assert len(drawn) == 1


def test_a_flood_is_told_to_come_back_and_holds_nobody_else(phantom: Viewing) -> None:
    asked = {
        **AXIAL,
        "kind": "volume",
        "preset": "soft",
        "width": 300,
        "height": 300,
        "step": 0.5,
    }
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(phantom.render(asked).status))
        for _ in range(int(ROOM.total_tokens) + MAX_WAITING + 10)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: 503 in statuses, "the first to be sent away")

    assert phantom.get(f"/manifest/{uid(1)}").status == 200
    # The manifest came before the pictures that had been asked for earlier.
    assert statuses.count(200) < int(ROOM.total_tokens) + MAX_WAITING

    for thread in threads:
        thread.join()
    assert statuses.count(503) >= 5
    assert statuses.count(200) + statuses.count(503) == len(threads)


def test_volumes_are_kept_within_their_limit(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    size = 20 * 32 * 40 * 2
    settings = {"pacs": {"volume_cache_bytes": 1 << 20}}
    with viewing_archive(tmp_path_factory.mktemp("kept"), **settings) as made:
        for seed in range(1, 31):
            made.archive.store_all(Phantom().datasets(seed=seed))
        for seed in range(1, 31):
            ref = {"study": uid(seed), "series": uid(seed, 1)}
            assert made.render(ref).status == 200
            assert made.views.volumes.kept() <= 1 << 20
        assert made.views.volumes.kept() == (1 << 20) // size * size


def test_a_volume_beyond_the_limit_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = {"limits": {"volume_bytes": 1 << 20}}
    phantom = Phantom(shape=(40, 128, 128))
    with viewing_archive(tmp_path_factory.mktemp("large"), **settings) as made:
        made.archive.store_all(phantom.datasets())
        answer = made.render(AXIAL)
    assert answer.status == 413
    assert "volume_bytes" in answer.json()["detail"]


def test_pictures_of_a_changed_series_show_the_change(viewing: Viewing) -> None:
    datasets = Phantom().datasets(shuffled=False)
    viewing.archive.store_all(datasets[:10])
    first = raw(viewing.render({**AXIAL, "format": "int16"}))[1]
    viewing.archive.store_all(datasets[10:])

    second = raw(viewing.render({**AXIAL, "format": "int16"}))[1]
    whole = viewing.json(f"/series/{uid(1, 1)}/volume?study={uid(1)}")

    assert whole["size"][2] == 20
    assert first["position"] != second["position"]
