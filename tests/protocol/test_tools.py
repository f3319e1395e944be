"""Clients and servers that others wrote, against a whole node: one round with each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import dcmtk, web
from tests.support.datasets import a_study, dataset_bytes, part10, uid
from tests.support.dicom_peers import StoreScp
from tests.support.node import RunningNode
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "node.pem", folder / "node.key"
    subprocess.run(
        [  # noqa: S607
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(made),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return made, key


@pytest.fixture(scope="module")
def tls_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory,
    certificate: tuple[Path, Path],
    tls_port: int,
) -> Iterator[RunningNode]:
    made, key = certificate
    running = RunningNode.start(
        tmp_path_factory.mktemp("node"),
        dimse__tls__port=tls_port,
        dimse__tls__certificate=made,
        dimse__tls__key=key,
        dimse__tls__client_ca=made,
    )
    yield running
    running.stop()


def write(folder: Path, seed: int) -> dict[str, bytes]:
    folder.mkdir()
    files = {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(seed=seed)}
    for name, file in files.items():
        (folder / f"{name}.dcm").write_bytes(file)
    return files


def kept(node: RunningNode, files: dict[str, bytes]) -> bool:
    return all(
        dataset_bytes(node.get(f"/api/v1/instances/{name}/file").body)
        == dataset_bytes(file)
        for name, file in files.items()
    )


def pynetdicom(name: str, *arguments: object) -> str:
    """Run one of pynetdicom's applications; return what it says."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_applications_of_pynetdicom(node: RunningNode, tmp_path: Path) -> None:
    files = write(tmp_path / "sent", 201)
    peer = ("127.0.0.1", node.dimse_port, "-aec", node.aet)
    keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={uid(201)}")

    pynetdicom("echoscu", *peer)
    pynetdicom("storescu", *peer, tmp_path / "sent", "-r", "-cx")
    found = pynetdicom("findscu", *peer, "-S", *keys, "-k", "PatientID=")
    (tmp_path / "got").mkdir()
    pynetdicom("getscu", *peer, "-S", *keys, "-od", tmp_path / "got")
    port = free_port()
    assert node.run("peer", "add", "MOVED", "127.0.0.1", port).returncode == 0
    (tmp_path / "moved").mkdir()
    pynetdicom(
        "movescu", *peer, "-S", *keys, "-aem", "MOVED", "--store", "--store-port",
        port, "-od", tmp_path / "moved",
    )  # fmt: skip

    assert kept(node, files)
    assert "PID201" in found
    assert len(list((tmp_path / "got").iterdir())) == len(files)
    assert len(list((tmp_path / "moved").iterdir())) == len(files)


def test_dcmtk_over_tls_both_ways(
    node: RunningNode, certificate: tuple[Path, Path], tls_port: int, tmp_path: Path
) -> None:
    made, key = certificate
    tls = ("+tls", key, made, "+cf", made)
    named = ("-aet", "node")  # a verified certificate must name who calls
    files = write(tmp_path / "sent", 202)

    dcmtk.run("echoscu", *tls, *named, "-aec", node.aet, "127.0.0.1", tls_port)
    dcmtk.run(
        "storescu", *tls, *named, "+sd", "-aec", node.aet, "127.0.0.1", tls_port,
        tmp_path / "sent",
    )  # fmt: skip
    assert kept(node, files)
    without = dcmtk.run("echoscu", "+tla", "-ic", "127.0.0.1", tls_port, check=False)
    assert without.returncode != 0

    scp = StoreScp(tmp_path / "received", *map(str, tls), title="SECURE")
    with scp.running():
        assert node.run(
            "peer", "add", "SECURE", "127.0.0.1", scp.port, "--tls"
        ).returncode == 0  # fmt: skip
        sent = node.run("send", "SECURE", uid(202))
        assert sent.returncode == 0, sent.stderr
        assert len(scp.wait_for(len(files))) == len(files)


def test_orthanc_over_dicomweb_both_ways(
    node: RunningNode, orthanc: Orthanc, tmp_path: Path
) -> None:
    """Its plugin stores to us, searches here, and retrieves what we hold."""
    orthanc.clear()
    orthanc.add_dicomweb_server("huying", f"{node.dicomweb}/")
    files = {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(seed=203)}
    for file in files.values():
        orthanc.rest("POST", "/instances", file)
    [study] = orthanc.rest("GET", "/studies")

    orthanc.rest(
        "POST", "/dicom-web/servers/huying/stow",
        {"Resources": [study], "Synchronous": True},
    )  # fmt: skip
    assert kept(node, files)
    found = orthanc.rest(
        "POST", "/dicom-web/servers/huying/qido",
        {"Uri": "/studies", "Arguments": {"PatientID": "PID203"}},
    )  # fmt: skip
    orthanc.clear()
    orthanc.rest(
        "POST", "/dicom-web/servers/huying/retrieve",
        {"Resources": [{"Study": uid(203)}], "Synchronous": True},
    )  # fmt: skip

    assert uid(203) in str(found)
    assert len(orthanc.rest("GET", "/instances")) == len(files)
    series = uid(203, 1)
    answer = web.request(
        f"{orthanc.http}/dicom-web/studies/{uid(203)}/series/{series}/metadata"
    )
    assert len(answer.json()) == len(files)


def test_orthanc_stores_finds_and_moves(node: RunningNode, orthanc: Orthanc) -> None:
    orthanc.clear()
    orthanc.add_modality("huying", node.aet, node.dimse_port)
    assert node.run(
        "peer", "add", orthanc.aet, "127.0.0.1", orthanc.dimse_port
    ).returncode == 0  # fmt: skip
    files = {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(seed=204)}
    for file in files.values():
        orthanc.rest("POST", "/instances", file)
    orthanc.rest("POST", "/modalities/huying/store", orthanc.rest("GET", "/studies"))
    assert kept(node, files)

    orthanc.clear()
    query = orthanc.rest(
        "POST", "/modalities/huying/query",
        {"Level": "Study", "Query": {"PatientID": "PID204"}},
    )["ID"]  # fmt: skip
    assert orthanc.rest("GET", f"/queries/{query}/answers") == ["0"]
    orthanc.rest(
        "POST", f"/queries/{query}/answers/0/retrieve",
        {"TargetAet": orthanc.aet, "Synchronous": True},
    )  # fmt: skip

    wait_until(
        lambda: len(orthanc.rest("GET", "/instances")) == len(files), "the images"
    )


def test_a_dicomdir_of_dcmmkdir_is_imported(node: RunningNode, tmp_path: Path) -> None:
    files = {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(seed=205)}
    for number, file in enumerate(files.values()):
        (tmp_path / f"IM{number}").write_bytes(file)
    dcmtk.run(
        "dcmmkdir", "+D", tmp_path / "DICOMDIR", "+id", tmp_path,
        *(f"IM{number}" for number in range(len(files))),
    )  # fmt: skip

    done = node.run("import", tmp_path / "DICOMDIR")

    assert f"stored {len(files)}," in done.stdout, done.stderr
    assert kept(node, files)
