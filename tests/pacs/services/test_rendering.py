"""The rendering service: what it keeps, what it chooses, what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from sqlalchemy import func, select

from pacs.imaging.pool import Answer, Job
from pacs.rendering.parameters import GIF, JPEG, PNG, Viewport, Wanted, Window
from pacs.repository.tables import Thumbnail
from pacs.services.rendering import KEY_OBJECT_SELECTION, RenderService
from storage.kernel.errors import TooLarge, Unsupported
from storage.kernel.limits import Limits
from storage.kernel.types import DEFAULT_TENANT, Actor, TenantId
from tests.support.datasets import a_study, ct_slice, part10, uid
from tests.support.dicomweb import Archive, WebArchive
from tests.support.wado import keep

ACTOR = Actor(TenantId(DEFAULT_TENANT), "test")


class Workers:
    """Counts the jobs of real workers."""

    def __init__(self, archive: Archive) -> None:
        self.jobs: list[Job] = []
        self._archive = archive

    def run(self, job: Job) -> Answer:
        self.jobs.append(job)
        return self._archive.decoders.run(job)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    made = Archive(tmp_path)
    yield made
    made.close()


def store(archive: Archive, *datasets: Dataset) -> None:
    for ds in datasets:
        keep(WebArchive(archive, ""), part10(ds))


def service(archive: Archive, cache_bytes: int = 0) -> tuple[RenderService, Workers]:
    workers: Any = Workers(archive)
    made = RenderService(
        retrieve=archive.retrieve, workers=workers, cache_bytes=cache_bytes
    )
    return made, workers


def test_a_picture_that_is_asked_for_again_is_not_made_again(archive: Archive) -> None:
    store(archive, ct_slice(seed=1))
    (found,) = archive.retrieve.instances(ACTOR, uid(1))
    render, workers = service(archive, 1 << 20)

    first = render.picture(found, [1], Wanted(PNG))
    again = render.picture(found, [1], Wanted(PNG))
    other = render.picture(found, [1], Wanted(PNG, window=Window(0, 10)))

    assert again == first
    assert other.body != first.body
    assert len(workers.jobs) == 2
    for _ in range(2):
        service(archive)[0].picture(found, [1], Wanted(PNG))
    plain, workers = service(archive)
    for _ in range(2):
        plain.picture(found, [1], Wanted(PNG))
    assert len(workers.jobs) == 2


def test_pictures_are_kept_within_their_bytes(archive: Archive) -> None:
    store(archive, ct_slice(seed=1))
    (found,) = archive.retrieve.instances(ACTOR, uid(1))
    render, workers = service(archive, 40_000)
    windows = [Wanted(JPEG, window=Window(0, width)) for width in range(10, 60)]
    for wanted in windows:
        render.picture(found, [1], wanted)
    render.picture(found, [1], windows[-1])
    assert len(workers.jobs) == 50
    render.picture(found, [1], windows[0])
    assert len(workers.jobs) == 51
    assert render._pictures._bytes <= 40_000  # noqa: SLF001


def test_only_the_wanted_frame_is_read(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.zeros((5000, 16, 16), np.uint8) + np.arange(5000)[:, None, None] % 251
    ds = ct_slice(seed=2, size=16, NumberOfFrames=5000, BitsAllocated=8, BitsStored=8)
    ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 7, 0, 0
    ds.WindowCenter, ds.WindowWidth = 128, 256
    ds.PixelData = frames.astype(np.uint8).tobytes()
    store(archive, ds)
    (found,) = archive.retrieve.instances(ACTOR, uid(2))
    read: list[int] = []
    original = archive.reader.read

    def counted(key: str, offset: int, length: int) -> bytes:
        read.append(length)
        return original(key, offset, length)

    monkeypatch.setattr(archive.reader, "read", counted)
    render, workers = service(archive)
    render.picture(found, [4321], Wanted(PNG))

    assert sum(read) < 256 + 4096
    job = workers.jobs[0]
    payloads = job.payloads() if callable(job.payloads) else job.payloads
    assert bytes(payloads[1]) == bytes([4320 % 251]) * 256


def test_an_animation_is_bounded_before_a_frame_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(tmp_path, Limits(rendered_pixels=2048))
    ds = ct_slice(seed=2, size=16, NumberOfFrames=40, PixelData=bytes(40 * 512))
    store(archive, ds)
    (found,) = archive.retrieve.instances(ACTOR, uid(2))
    render, workers = service(archive)
    small = Wanted(GIF, viewport=Viewport(2, 2))

    assert render.picture(found, range(1, 17), small).media_type == GIF
    with pytest.raises(TooLarge) as caught:
        render.picture(found, range(1, 18), small)

    assert caught.value.limit == "rendered_pixels"
    assert len(workers.jobs) == 1
    archive.close()


def test_attributes_that_are_too_long_are_not_read(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(archive, ct_slice(seed=1))
    (found,) = archive.retrieve.instances(ACTOR, uid(1))
    monkeypatch.setattr("pacs.services.rendering.MAX_HEADER", 100)
    for ask in (
        lambda: archive.render.picture(found, [1], Wanted(PNG)),
        lambda: archive.render.document(found, "text/html"),
        lambda: archive.render.target(ACTOR, found),
    ):
        with pytest.raises(Unsupported):
            ask()


def test_the_largest_series_of_images_stands_for_a_study(archive: Archive) -> None:
    few = [ct_slice(seed=1, series=1, number=n) for n in (1, 2)]
    many = [ct_slice(seed=1, series=2, number=n) for n in range(1, 6)]
    masks = [ct_slice(seed=1, series=3, number=n, Modality="SEG") for n in range(1, 9)]
    store(archive, *few, *many, *masks)
    every = archive.retrieve.instances(ACTOR, uid(1))
    chosen, number = archive.render.representative(ACTOR, every)
    assert (chosen.sop_instance_uid, number) == (uid(1, 2, 3), 1)


def key_object(seed: int, image: str) -> Dataset:
    ds = ct_slice(seed=seed, series=9, PixelData=None, Rows=None, Columns=None)
    ds.SOPClassUID, ds.Modality, ds.ValueType = KEY_OBJECT_SELECTION, "KO", "CONTAINER"
    reference = Dataset()
    reference.ReferencedSOPInstanceUID = image
    item = Dataset()
    item.ValueType, item.ReferencedSOPSequence = "IMAGE", [reference]
    ds.ContentSequence = [item]
    return ds


def test_a_key_image_stands_for_its_study(archive: Archive) -> None:
    store(archive, *a_study(seed=1, n_series=2, n_instances=3))
    store(archive, key_object(1, uid(1, 1, 1)))
    every = archive.retrieve.instances(ACTOR, uid(1))
    chosen, _ = archive.render.representative(ACTOR, every)
    assert chosen.sop_instance_uid == uid(1, 1, 1)
    # A key image that is not here stands for nothing.
    store(archive, *a_study(seed=2, n_series=1, n_instances=3))
    store(archive, key_object(2, uid(7, 7, 7)))
    every = archive.retrieve.instances(ACTOR, uid(2))
    chosen, _ = archive.render.representative(ACTOR, every)
    assert chosen.sop_instance_uid == uid(2, 1, 2)


def test_what_has_no_image_has_no_representative(archive: Archive) -> None:
    store(archive, key_object(3, uid(3, 1, 1)))
    every = archive.retrieve.instances(ACTOR, uid(3))
    with pytest.raises(Unsupported):
        archive.render.representative(ACTOR, every)


def kept(archive: Archive) -> int:
    with archive.database.read() as connection:
        count = select(func.count()).select_from(Thumbnail)
        return int(connection.execute(count).scalar_one())


def test_thumbnails_are_as_many_as_series_and_go_with_their_instances(
    archive: Archive,
) -> None:
    store(archive, *a_study(seed=1, n_series=3, n_instances=3))
    assert archive.thumbnails.prepare(uid(1), DEFAULT_TENANT) == 3
    assert archive.thumbnails.prepare(uid(1), DEFAULT_TENANT) == 3
    assert kept(archive) == 3
    one = archive.thumbnails.representative(ACTOR, uid(1), uid(1, 2))
    assert (one.instance.sop_instance_uid, one.frame_number) == (uid(1, 2, 2), 1)
    assert one.kept is not None

    with archive.database.write() as connection:
        connection.exec_driver_sql(
            "DELETE FROM instance WHERE sop_instance_uid = ?", (uid(1, 2, 2),)
        )
    assert kept(archive) == 2
    one = archive.thumbnails.representative(ACTOR, uid(1), uid(1, 2))
    assert one.instance.sop_instance_uid == uid(1, 2, 3)
    assert one.kept is None


def test_a_series_that_grows_gets_another_thumbnail(archive: Archive) -> None:
    store(archive, *a_study(seed=1, n_series=1, n_instances=1))
    archive.thumbnails.prepare(uid(1), DEFAULT_TENANT)
    for number in range(2, 6):
        store(archive, ct_slice(seed=1, number=number))
    # What was kept does not count any more.
    one = archive.thumbnails.representative(ACTOR, uid(1))
    assert (one.instance.sop_instance_uid, one.kept) == (uid(1, 1, 3), None)
    archive.thumbnails.prepare(uid(1), DEFAULT_TENANT)
    assert kept(archive) == 1


def test_what_cannot_be_rendered_gets_no_thumbnail(archive: Archive) -> None:
    store(archive, ct_slice(seed=1, BitsStored=99))
    assert archive.thumbnails.prepare(uid(1), DEFAULT_TENANT) == 0
    assert archive.thumbnails.prepare(uid(99), DEFAULT_TENANT) == 0


def test_a_thumbnail_is_the_picture_it_would_be_on_demand(archive: Archive) -> None:
    store(archive, *a_study(seed=1, n_series=1, n_instances=3))
    archive.thumbnails.prepare(uid(1), DEFAULT_TENANT)
    one = archive.thumbnails.representative(ACTOR, uid(1))
    wanted = archive.thumbnails.wanted()
    now = archive.render.picture(one.instance, [one.frame_number], wanted)
    assert one.kept == now
