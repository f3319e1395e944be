"""WADO-RS over HTTP: metadata and conditions (PS3.18 10.4.1.1.2, RFC 9110 13)."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from xml.etree import ElementTree as ET

import pytest
from backports import zstd

from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import WebArchive, split
from tests.support.wado import (
    DOC,
    IMAGE,
    JSON,
    MULTI,
    SERIES,
    STUDY,
    VIDEO,
    get,
    keep,
    wado_archive,
)
from tests.support.web import Response


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with wado_archive(tmp_path_factory.mktemp("wado")) as served:
        yield served


def named(answer: Response) -> list[str]:
    return [item["00080018"]["Value"][0] for item in answer.json()]


def test_metadata_of_a_series_come_in_order(web: WebArchive) -> None:
    answer = get(web, f"/studies/{STUDY}/series/{SERIES}/metadata")

    assert answer.headers["content-type"] == JSON
    assert named(answer) == [uid(1, 1, n) for n in (1, 2, 3)]
    (first, *_) = answer.json()
    assert first["00100010"]["Value"] == [
        {"Alphabetic": "Test1^Case", "Ideographic": "测试^1"}
    ]
    assert first["7FE00010"] == {
        "vr": "OW", "BulkDataURI": f"/dicom-web{IMAGE}/bulkdata/7FE00010",
    }  # fmt: skip


def test_metadata_are_sent_compressed_to_who_takes_it(web: WebArchive) -> None:
    path = f"/studies/{STUDY}/series/{SERIES}/metadata"

    plain = get(web, path, accept_encoding="gzip;q=0, identity")
    packed = get(web, path, accept_encoding="br, gzip")

    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(packed.body) == plain.body
    assert packed.headers["etag"] != plain.headers["etag"]


@pytest.mark.parametrize(
    ("asked", "coding"),
    [
        ("gzip, deflate, br, zstd", "zstd"),
        ("zstd;q=0.5, gzip", "gzip"),
        ("x-gzip", "gzip"),
        ("*", "zstd"),
        ("*, zstd;q=0", "gzip"),
        ("identity, gzip;q=0.5", None),
        ("gzip;q=nonsense", None),
        ("br", None),
        ("", None),
    ],
)
def test_text_comes_in_the_coding_a_client_likes_best(
    web: WebArchive, asked: str, coding: str | None
) -> None:
    series = f"/studies/{STUDY}/series/{SERIES}"
    for path in (
        f"{series}/metadata",
        f"{series}/bundle",
        f"/studies/{STUDY}/metadata",
        f"{IMAGE}/metadata",
        f"/studies/{STUDY}/instances?includefield=all",
    ):
        plain = get(web, path, accept_encoding="identity")
        answer = get(web, path, accept_encoding=asked)

        assert answer.headers.get("content-encoding") == coding, path
        assert "Accept-Encoding" in answer.headers["vary"]
        if coding == "gzip":
            assert gzip.decompress(answer.body) == plain.body
        elif coding == "zstd":
            reader = zstd.ZstdDecompressor()
            assert reader.decompress(answer.body) == plain.body
        if coding and "etag" in plain.headers:
            assert answer.headers["etag"] != plain.headers["etag"]


def test_pixels_are_never_coded(web: WebArchive) -> None:
    for path in (f"{IMAGE}/frames/1", IMAGE, f"{IMAGE}/bulkdata/7FE00010"):
        answer = get(web, path, accept_encoding="gzip, zstd")
        assert "content-encoding" not in answer.headers


def test_a_bundle_has_metadata_and_where_frames_end(web: WebArchive) -> None:
    path = f"/studies/{STUDY}/series/{SERIES}"

    answer = get(web, f"{path}/bundle")

    bundle = answer.json()
    assert bundle["metadata"] == get(web, f"{path}/metadata").json()
    for number, entry in enumerate(bundle["frames"], start=1):
        version = entry.pop("version")
        assert re.fullmatch("[0-9a-f]{32}", version)
        assert entry == {
            "sop_instance_uid": uid(1, 1, number),
            "transfer_syntax_uid": "1.2.840.10008.1.2.1",
            "frames": 1,
            "length": 2048,
        }
    tag = answer.headers["etag"]
    assert get(web, f"{path}/bundle", if_none_match=tag).status == 304
    for seed, expected in (
        (MULTI, {"frames": 2, "length": 70}),
        (VIDEO, {"frames": 1, "length": 46}),
        (DOC, {"frames": 0}),
    ):
        other = f"/studies/{uid(seed)}/series/{uid(seed, 1)}/bundle"
        (entry,) = get(web, other).json()["frames"]
        assert expected.items() <= entry.items()
        assert ("length" in entry) == ("length" in expected)
    assert get(web, f"/studies/{uid(99)}/series/{uid(99, 1)}/bundle").status == 404


def test_metadata_of_a_study_are_those_of_its_series(web: WebArchive) -> None:
    answer = get(web, f"/studies/{STUDY}/metadata")

    assert named(answer) == [uid(1, s, n) for s in (1, 2) for n in (1, 2, 3)]


def test_metadata_of_an_instance_are_an_array_of_one(web: WebArchive) -> None:
    answer = get(web, f"{IMAGE}/metadata")

    assert (
        answer.json()
        == get(web, f"/studies/{STUDY}/series/{SERIES}/metadata").json()[:1]
    )


def test_metadata_can_be_xml(web: WebArchive) -> None:
    for path in (f"{IMAGE}/metadata", f"/studies/{STUDY}/series/{SERIES}/metadata"):
        answer = get(web, path, 'multipart/related; type="application/dicom+xml"')

        headers, body = split(answer)[0]
        assert headers["content-type"] == "application/dicom+xml"
        assert ET.fromstring(body).tag.endswith("NativeDicomModel")  # noqa: S314


def test_c16_new_instances_give_new_metadata_and_a_new_tag(web: WebArchive) -> None:
    paths = (f"/studies/{uid(60)}/series/{uid(60, 1)}/metadata",
             f"/studies/{uid(60)}/metadata")  # fmt: skip
    for number in (1, 2):
        keep(web, part10(ct_slice(seed=60, number=number)))
        for path in paths:
            answer = get(web, path)
            assert len(answer.json()) == number
            tag = answer.headers["etag"]
            assert get(web, path, if_none_match=tag).status == 304
            assert get(web, path, if_none_match='"old"').status == 200
    keep(web, part10(ct_slice(seed=60, number=3)))
    for path in paths:
        assert get(web, path, if_none_match=tag).status == 200


def test_metadata_can_be_prepared(web: WebArchive) -> None:
    for series in (1, 2):
        keep(web, part10(ct_slice(seed=61, series=series)))

    assert web.archive.retrieve.prepare_metadata(uid(61), "default") == 2
    assert web.archive.retrieve.prepare_metadata(uid(61), "other") == 0


@pytest.mark.parametrize("path", [f"{IMAGE}", f"{IMAGE}/frames/1", f"{IMAGE}/metadata"])
@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"x", {tag}', 304),
        ("*", 304),
        ('"x"', 200),
        ("", 200),
    ],
)
def test_c16_what_the_client_has_is_304(
    web: WebArchive, path: str, condition: str, status: int
) -> None:
    first = get(web, path)

    answer = get(web, path, if_none_match=condition.format(tag=first.headers["etag"]))

    assert answer.status == status
    assert answer.headers["etag"] == first.headers["etag"]
    if status == 304:
        assert answer.body == b""


def test_c16_if_modified_since_compares_times(web: WebArchive) -> None:
    modified = get(web, IMAGE).headers["last-modified"]

    assert get(web, IMAGE, if_modified_since=modified).status == 304
    early = "Mon, 01 Jan 2001 00:00:00 GMT"
    assert get(web, IMAGE, if_modified_since=early).status == 200
    assert get(web, IMAGE, if_modified_since="nonsense").status == 200
