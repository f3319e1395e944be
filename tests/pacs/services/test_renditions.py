"""HTJ2K beside what was received: made, served, and gone with the instance."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from gateway.app import open_objects
from pacs.imaging import encoders
from pacs.imaging.codecs import DecoderPool, DecodeSpec
from pacs.imaging.encoders import HTJ2K_LOSSLESS, HTJ2K_LOSSLESS_RPCL
from storage.kernel.errors import DependencyDown, LostRace, NotFound
from storage.kernel.settings import DuplicatePolicy, Objects, Settings
from storage.objects.protocol import ObjectStore
from tests.support.datasets import ct_slice, uid
from tests.support.lifecycle import DAY, Life, admin, content, lives

STUDY, SERIES = uid(1), uid(1, 1)
SPEC = DecodeSpec(32, 32, 1, 16, 16)
WORK = {"tenant": "default", "study": STUDY, "series": SERIES}


@pytest.fixture
def objects(tmp_path: Path, object_store_settings: Objects) -> ObjectStore:
    return open_objects(Settings(data=tmp_path, objects=object_store_settings))


@pytest.fixture
def life(tmp_path: Path, database_url: str, objects: ObjectStore) -> Iterator[Life]:
    yield from lives(
        tmp_path, database_url, objects, duplicates=DuplicatePolicy.IF_CHANGED
    )


#: For what does not depend on engine or store.
ON_ONE = [
    pytest.mark.parametrize("database_url", ["sqlite"], indirect=True),
    pytest.mark.parametrize("object_store_settings", ["files"], indirect=True),
]


def once(test: Callable[..., None]) -> Callable[..., None]:
    for mark in ON_ONE:
        test = mark(test)
    return test


def arrive(life: Life, *numbers: int) -> None:
    for number in numbers:
        life.store(ct_slice(number=number))
    life.settle_all()


def kept(life: Life) -> list[str]:
    return [info.key for info in life.objects.list("renditions/")]


def pixels(number: int) -> bytes:
    return bytes(ct_slice(number=number).PixelData)


def frame(life: Life, number: int, syntax: str = HTJ2K_LOSSLESS_RPCL) -> bytes:
    return life.retrieve.frame(life.located(uid(1, 1, number)), 1, syntax).data


def refuse(*_: object) -> None:
    raise DependencyDown("no encoder")


def test_frames_of_a_settled_series_are_kept_and_what_came_stays(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(life, 1, 2, 3)
    before = {n: life.bytes_of(uid(1, 1, n)) for n in (1, 2, 3)}

    assert life.encode_all() == 3

    monkeypatch.setattr("pacs.services.frames.encoded_frame", refuse)
    for number in (1, 2, 3):
        stored = life.located(uid(1, 1, number))
        for syntax in (HTJ2K_LOSSLESS, HTJ2K_LOSSLESS_RPCL):
            (form,) = life.retrieve.frame_forms(stored, (1,), syntax)
            data = life.retrieve.frame(stored, 1, syntax).data
            assert form.length == len(data)
            encoders.check_rpcl(data)
            assert life.decoders.decode(data, syntax, SPEC) == pixels(number)
        assert life.bytes_of(uid(1, 1, number)) == before[number]
        assert before[number] == content(ct_slice(number=number))
        with pytest.raises(DependencyDown):
            frame(life, number, str(JPEGLSLossless))
    assert len(kept(life)) == 1
    assert life.encode_all() == 0


@once
def test_many_frames_are_kept_in_their_order(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.random.default_rng(1).integers(0, 999, (40, 32, 32)).astype("<u2")
    life.store(ct_slice(NumberOfFrames=40, PixelData=array.tobytes()))
    life.settle_all()
    assert life.encode_all() == 1
    monkeypatch.setattr("pacs.services.frames.encoded_frame", refuse)

    stored = life.located(uid(1, 1, 1))

    numbers = [40, 1, 17]
    forms = life.retrieve.frame_forms(stored, numbers, HTJ2K_LOSSLESS)
    for number, form in zip(numbers, forms, strict=True):
        data = b"".join(form.chunks())
        assert len(data) == form.length
        assert life.decoders.decode(data, HTJ2K_LOSSLESS, SPEC) == (
            array[number - 1].tobytes()
        )


@once
def test_only_what_gains_is_encoded(life: Life) -> None:
    def wrapped(seed: int, data: bytes, syntax: str) -> None:
        ds = ct_slice(seed=seed)
        ds.PixelData = encapsulate([data])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        life.store(ds, syntax=syntax)

    spec = encoders.EncodeSpec(32, 32, 1, 16, 16, False, "MONOCHROME2")
    array = np.frombuffer(pixels(1), "<u2").reshape(32, 32)
    wrapped(1, encoders.encode(JPEGLSLossless, array, spec), str(JPEGLSLossless))
    wrapped(2, b"\xff\xd8lossy", str(JPEGBaseline8Bit))
    wrapped(3, encoders.encode(HTJ2K_LOSSLESS, array, spec), HTJ2K_LOSSLESS)
    # Nonsense is skipped, and does not keep the others from being encoded.
    wrapped(4, b"nonsense" * 20, str(RLELossless))
    life.store(ct_slice(seed=5, PixelData=None, Rows=None, Columns=None))
    life.settle_all()

    assert life.encode_all() == 1

    assert len(kept(life)) == 1
    assert life.decoders.decode(frame(life, 1), HTJ2K_LOSSLESS, SPEC) == pixels(1)
    assert life.rows("SELECT n_instances FROM rendition") == [(1,)]


def test_a_deleted_instance_takes_the_rendition_with_it(life: Life) -> None:
    arrive(life, 1, 2)
    life.encode_all()
    assert life.renditions.tick() == 0

    life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))

    assert life.renditions.tick() == 1
    assert kept(life) == []
    assert life.rows("SELECT id FROM rendition") == []
    # What is left is encoded when asked for, and kept again from the next settling.
    assert life.decoders.decode(frame(life, 2), HTJ2K_LOSSLESS, SPEC) == pixels(2)
    life.settle_all()
    assert life.encode_all() == 1
    assert len(kept(life)) == 1


@once
def test_replaced_content_is_never_served_from_the_old_rendition(life: Life) -> None:
    arrive(life, 1)
    life.encode_all()
    other = bytes(2048)

    life.store(ct_slice(number=1, PixelData=other))

    assert life.decoders.decode(frame(life, 1), HTJ2K_LOSSLESS, SPEC) == other
    assert life.renditions.tick() == 1
    assert kept(life) == []


@once
def test_a_change_while_encoding_leaves_nothing(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(life, 1, 2)
    put = life.objects.put_file

    def slow(*args: object) -> object:
        life.deletion.delete(admin(), STUDY, SERIES, uid(1, 1, 1))
        return put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(life.objects, "put_file", slow)

    with pytest.raises(LostRace):
        life.renditions.make(WORK)

    assert kept(life) == []
    assert life.rows("SELECT id FROM rendition") == []


@once
def test_work_that_was_killed_is_removed_after_a_day(
    life: Life, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arrive(life, 1)

    def killed(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("pacs.repository.renditions.finish", killed)
    with pytest.raises(KeyboardInterrupt):
        life.renditions.make(WORK)
    monkeypatch.undo()
    left = tmp_path / ".rendition-left.tmp"
    left.touch()
    os.utime(left, (1, 1))
    assert len(kept(life)) == 1
    assert life.renditions.tick() == 0

    life.clock.turn(DAY + 1)

    assert life.renditions.tick() == 1
    assert kept(life) == []
    assert life.renditions.make(WORK)["instances"] == 1
    assert not left.exists()


def test_a_damaged_or_lost_rendition_is_encoded_again(
    life: Life, objects: ObjectStore, tmp_path: Path
) -> None:
    arrive(life, 1)
    life.encode_all()
    (key,) = kept(life)
    info = objects.stat(key)
    assert info is not None
    bad = tmp_path / "bad"
    bad.write_bytes(bytes(info.size))
    objects.put_file(key, bad, hashlib.sha256(bytes(info.size)).hexdigest())
    assert life.decoders.decode(frame(life, 1), HTJ2K_LOSSLESS, SPEC) == pixels(1)
    objects.delete(key)
    assert life.decoders.decode(frame(life, 1), HTJ2K_LOSSLESS, SPEC) == pixels(1)


@once
def test_frames_that_are_not_there_are_not_found(life: Life) -> None:
    arrive(life, 1)
    life.encode_all()

    with pytest.raises(NotFound):
        life.retrieve.frame(life.located(uid(1, 1, 1)), 2, HTJ2K_LOSSLESS)


@once
def test_a_store_that_is_down_costs_nothing(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(life, 1)

    def down(*_: object) -> None:
        raise DependencyDown("objects")

    monkeypatch.setattr(life.objects, "stat", down)
    with pytest.raises(DependencyDown):
        life.renditions.make(WORK)

    assert life.rows("SELECT id FROM rendition") == []


@once
def test_the_pool_is_not_needed_for_what_is_kept(life: Life) -> None:
    arrive(life, 1)
    life.encode_all()

    life.decoders.close()
    data = frame(life, 1)
    life.decoders = DecoderPool(life.decoders.limits)

    assert life.decoders.decode(data, HTJ2K_LOSSLESS, SPEC) == pixels(1)
