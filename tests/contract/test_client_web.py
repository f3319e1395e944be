"""A client that others wrote: dicomweb-client stores, finds and retrieves."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom import Dataset, dcmread

from tests.support.datasets import a_study, part10, uid
from tests.support.dicomweb import WebArchive, web_archive


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebArchive]:
    with web_archive(tmp_path_factory.mktemp("client")) as served:
        yield served


@pytest.fixture(scope="module")
def client(web: WebArchive) -> DICOMwebClient:
    return DICOMwebClient(url=web.dicomweb)


@pytest.fixture(scope="module")
def study(client: DICOMwebClient) -> list[Dataset]:
    files = [part10(ds) for ds in a_study(n_series=2, n_instances=2)]
    made: list[Dataset] = [dcmread(io.BytesIO(file)) for file in files]
    answer = client.store_instances(made)
    assert len(answer.ReferencedSOPSequence) == len(made)
    assert "FailedSOPSequence" not in answer
    return made


def test_what_it_stored_it_finds(client: DICOMwebClient, study: list[Dataset]) -> None:
    (found,) = client.search_for_studies(search_filters={"PatientID": "PID1"})
    instances = client.search_for_instances(uid(1), uid(1, 1))

    assert found["0020000D"]["Value"] == [uid(1)]
    assert len(instances) == 2


def test_it_retrieves_instances(client: DICOMwebClient, study: list[Dataset]) -> None:
    whole = client.retrieve_study(uid(1))
    series = client.retrieve_series(uid(1), uid(1, 2))
    one = client.retrieve_instance(uid(1), uid(1, 1), uid(1, 1, 1))

    assert [ds.SOPInstanceUID for ds in whole] == [ds.SOPInstanceUID for ds in study]
    assert len(series) == 2
    assert one.PixelData == study[0].PixelData
    assert one.PatientName == study[0].PatientName


def test_it_retrieves_metadata(client: DICOMwebClient, study: list[Dataset]) -> None:
    of_study = client.retrieve_study_metadata(uid(1))
    of_series = client.retrieve_series_metadata(uid(1), uid(1, 1))
    of_one = client.retrieve_instance_metadata(uid(1), uid(1, 1), uid(1, 1, 1))

    assert len(of_study) == 4
    assert of_series[0] == of_one
    assert Dataset.from_json(of_one, lambda _: b"").PatientID == "PID1"


def test_it_retrieves_frames(client: DICOMwebClient, study: list[Dataset]) -> None:
    where = (uid(1), uid(1, 1), uid(1, 1, 1), [1])

    for media_types in (
        None,
        (("application/octet-stream", "1.2.840.10008.1.2.1"),),
        (("application/octet-stream", "*"),),
    ):
        (frame,) = client.retrieve_instance_frames(*where, media_types=media_types)
        assert frame == study[0].PixelData


def test_it_retrieves_bulk_data(
    client: DICOMwebClient, web: WebArchive, study: list[Dataset]
) -> None:
    metadata = client.retrieve_instance_metadata(uid(1), uid(1, 1), uid(1, 1, 1))

    (data,) = client.retrieve_bulkdata(web.url + metadata["7FE00010"]["BulkDataURI"])

    assert data == study[0].PixelData
