"""C-MOVE and C-GET against peers that we did not write."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import generate_frames
from pydicom.uid import (
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from pacs.imaging.codecs import DecodeSpec
from pacs.imaging.part10 import file_meta, read_file_meta
from storage.kernel.errors import DuplicateInstance, InvalidInput
from tests.support import dcmtk, dicom_peers
from tests.support.archive import ADMIN, Archive, archive
from tests.support.corpus import files, needs_corpus
from tests.support.datasets import (
    NATIVE_SYNTAXES,
    a_study,
    ct_slice,
    dataset_bytes,
    part10,
)
from tests.support.dicom_peers import PyScp, StoreScp
from tests.support.ports import free_port


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Archive]:
    with archive(tmp_path / "node") as made, made.listening():
        yield made


@pytest.fixture
def scp(tmp_path: Path) -> Iterator[StoreScp]:
    with StoreScp(tmp_path / "received", "+xa").running() as running:
        yield running


def move(node: Archive, *keys: str, root: str = "-S", to: str = "STORESCP") -> str:
    """Run movescu; return what it says."""
    arguments = [part for key in keys for part in ("-k", key)]
    return dcmtk.run(
        "movescu", "-v", root, "-aet", "MOVER", "-aec", node.aet, "-aem", to,
        "127.0.0.1", node.port, *arguments, check=False,
    ).stdout  # fmt: skip


def get(node: Archive, folder: Path, *keys: str, options: tuple[str, ...] = ()) -> str:
    """Run getscu; return what it says."""
    folder.mkdir(exist_ok=True)
    arguments = [part for key in keys for part in ("-k", key)]
    return dcmtk.run(
        "getscu", "-v", "-S", "+B", "-od", folder, *options, "-aec", node.aet,
        "127.0.0.1", node.port, *arguments, check=False,
    ).stdout  # fmt: skip


def body(file: bytes) -> bytes:
    """Return the data set of a file whose File Meta may lack its length."""
    meta = read_file_meta(file)
    assert meta is not None
    return file[meta.dataset_offset :]


def study(number: int) -> tuple[str, str]:
    return (
        "QueryRetrieveLevel=STUDY",
        f"StudyInstanceUID={ct_slice(seed=number).StudyInstanceUID}",
    )


def test_a_study_moves_byte_for_byte(node: Archive, scp: StoreScp) -> None:
    made = {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(n_series=2)}
    for file in made.values():
        node.store(file)
    node.add_peer(scp.title, scp.port)

    output = move(node, *study(1))

    assert "Success" in output
    received = scp.wait_for(6)
    assert {uid: dataset_bytes(file) for uid, file in received.items()} == {
        uid: dataset_bytes(file) for uid, file in made.items()
    }


def test_a_study_moves_back_to_who_asked(node: Archive, tmp_path: Path) -> None:
    made = a_study()
    node.store_all(made)
    port = free_port()
    node.add_peer("MOVER", port)
    folder = tmp_path / "back"
    folder.mkdir()

    dcmtk.run(
        "movescu", "-S", "-od", folder, "+P", port, "-aet", "MOVER",
        "-aec", node.aet, "-aem", "MOVER", "127.0.0.1", node.port,
        *(part for key in study(1) for part in ("-k", key)),
    )  # fmt: skip

    assert sorted(dataset_bytes(path.read_bytes()) for path in folder.iterdir()) == (
        sorted(dataset_bytes(part10(ds)) for ds in made)
    )


def test_a_patient_moves_whole(node: Archive, scp: StoreScp) -> None:
    node.store_all(a_study(seed=1, n_instances=2))
    node.store_all(a_study(seed=2, n_instances=2, PatientID="PID1"))
    node.add_peer(scp.title, scp.port)

    output = move(node, "QueryRetrieveLevel=PATIENT", "PatientID=PID1", root="-P")

    assert "Success" in output
    assert len(scp.wait_for(4)) == 4


def test_an_issuer_tells_patients_with_one_id_apart(
    node: Archive, scp: StoreScp
) -> None:
    node.store(part10(ct_slice(PatientID="P", IssuerOfPatientID="HOSPITAL-A")))
    [wanted] = node.store_all(
        [ct_slice(seed=2, PatientID="P", IssuerOfPatientID="HOSPITAL-B")]
    )
    node.add_peer(scp.title, scp.port)
    keys = ("QueryRetrieveLevel=PATIENT", "PatientID=P")

    move(node, *keys, "IssuerOfPatientID=HOSPITAL-B", root="-P")
    assert list(scp.wait_for(1)) == [wanted]

    move(node, *keys, "IssuerOfPatientID=", root="-P")
    assert len(scp.wait_for(2)) == 2


def test_a_study_is_got_byte_for_byte(node: Archive, tmp_path: Path) -> None:
    made = {str(ds.SOPInstanceUID): part10(ds) for ds in a_study(n_series=2)}
    for file in made.values():
        node.store(file)

    output = get(node, tmp_path / "got", *study(1))

    assert "Success" in output
    got = {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir()}
    assert sorted(map(dataset_bytes, got.values())) == sorted(
        map(dataset_bytes, made.values())
    )


@pytest.mark.parametrize("syntax", NATIVE_SYNTAXES, ids=lambda uid: uid.name)
def test_a_native_object_reaches_a_peer_that_takes_implicit_only(
    node: Archive, tmp_path: Path, syntax: str
) -> None:
    ds = ct_slice()
    node.store(part10(ds, syntax))
    with StoreScp(tmp_path / "implicit", "+xi").running() as scp:
        node.add_peer(scp.title, scp.port)

        output = move(node, *study(1))

        assert "Success" in output
        received = scp.wait_for(1)
    if syntax == ExplicitVRBigEndian:
        # pydicom writes pixel bytes as they are: they were big endian ones.
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").byteswap().tobytes()
    assert dataset_bytes(received[str(ds.SOPInstanceUID)]) == dataset_bytes(
        part10(ds, NATIVE_SYNTAXES[0])
    )


@pytest.mark.parametrize(
    "syntax", [JPEGLSLossless, JPEGLosslessSV1, JPEG2000Lossless, RLELossless]
)
def test_who_takes_nothing_native_is_sent_what_it_takes(
    node: Archive, syntax: str
) -> None:
    ds = ct_slice()
    node.store(part10(ds))
    contexts = [(str(ds.SOPClassUID), str(syntax))]

    got = dicom_peers.get(node.port, node.aet, {ds.StudyInstanceUID}, contexts)

    used, data = got[str(ds.SOPInstanceUID)]
    assert used == syntax
    head = file_meta(ds.SOPClassUID, ds.SOPInstanceUID, used)
    made = dcmread(io.BytesIO(head + data))
    (frame,) = generate_frames(made.PixelData, number_of_frames=1)
    spec = DecodeSpec(ds.Rows, ds.Columns, 1, 16, ds.BitsStored)
    assert node.node.decoders.decode(frame, used, spec) == ds.PixelData


@needs_corpus
def test_every_syntax_moves_and_is_got_byte_for_byte(node: Archive) -> None:
    stored: dict[str, tuple[str, bytes]] = {}
    studies, contexts = set(), set()
    for path in files("syntaxes"):
        file = path.read_bytes()
        with suppress(InvalidInput, DuplicateInstance):  # a few lack a study or a head
            uid = node.store(file)
            found = node.node.retrieve.find_instance(ADMIN, uid)
            stored[uid] = (found.transfer_syntax_uid, body(file))
            studies.add(found.study_instance_uid)
            contexts.add((found.sop_class_uid, found.transfer_syntax_uid))
    assert len({syntax for syntax, _ in stored.values()}) > 15
    keys = ("QueryRetrieveLevel=STUDY", "StudyInstanceUID=" + "\\".join(studies))
    with PyScp().running() as scp:
        node.add_peer(scp.title, scp.port)

        output = move(node, *keys, to=scp.title)

    assert "Success" in output
    moved = {
        one.instance_uid: (one.transfer_syntax_uid, one.dataset) for one in scp.received
    }
    assert moved == stored
    got = dicom_peers.get(node.port, node.aet, studies, sorted(contexts))
    assert got == stored
