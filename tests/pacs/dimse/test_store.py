"""C-STORE over real sockets: what arrives is what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage

from pacs.dimse import command as cmd
from storage.kernel.limits import KIB, Limits
from storage.kernel.settings import DuplicatePolicy, SyncPolicy
from tests.support import dcmtk
from tests.support.datasets import (
    NATIVE_SYNTAXES,
    a_study,
    ct_slice,
    dataset_bytes,
    part10,
)
from tests.support.dimse import (
    CT,
    EXPLICIT,
    DimseNode,
    RawPeer,
    message,
    pdv,
    store_rq,
)

SMALL = Limits(memory_instance_bytes=64 * KIB, pdu_bytes=16 * KIB)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DimseNode]:
    with DimseNode(tmp_path) as made:
        yield made


@pytest.fixture
def small(tmp_path: Path) -> Iterator[DimseNode]:
    """Yield a node with whom 64 KiB are a large object."""
    with DimseNode(tmp_path, limits=SMALL) as made:
        yield made


def test_pynetdicom_stores_a_study(node: DimseNode) -> None:
    study = a_study(n_series=2, n_instances=3)
    ae = AE("SENDER")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", node.port, ae_title="HUYING")
    files = [dcmread(BytesIO(part10(ds))) for ds in study]
    statuses = [association.send_c_store(one).Status for one in files]
    association.release()

    assert statuses == [0] * 6
    assert node.uids() == sorted(ds.SOPInstanceUID for ds in study)


@pytest.mark.parametrize("syntax", NATIVE_SYNTAXES, ids=lambda uid: uid.name)
def test_bytes_are_kept_as_received(node: DimseNode, syntax: str) -> None:
    ds = ct_slice()
    body = dataset_bytes(part10(ds, syntax))

    with RawPeer(node.port) as peer:
        peer.associate(((1, CT, (syntax,)),))
        response = peer.store(ds.SOPInstanceUID, body)
        peer.release()

    assert response[cmd.STATUS] == 0
    assert response[cmd.RESPONDED_ID] == 1
    assert response[cmd.AFFECTED_INSTANCE] == ds.SOPInstanceUID
    assert node.dataset(ds.SOPInstanceUID) == body


@pytest.mark.parametrize("fragment", [2, 254, 4096, 16 * KIB - 6])
def test_fragments_of_any_size_make_the_same_bytes(
    small: DimseNode, fragment: int
) -> None:
    ds = ct_slice()
    body = dataset_bytes(part10(ds))

    with RawPeer(small.port) as peer:
        peer.associate()
        assert peer.store(ds.SOPInstanceUID, body, fragment=fragment)[cmd.STATUS] == 0

    assert small.dataset(ds.SOPInstanceUID) == body


def test_fragments_may_share_a_pdu(node: DimseNode) -> None:
    ds = ct_slice(size=8)
    body = dataset_bytes(part10(ds))
    command = message(1, store_rq(ds.SOPInstanceUID))
    parts = [pdv(1, 0, body[:100]), pdv(1, 0, b""), pdv(1, 2, body[100:])]
    content = b"".join(one[6:] for one in (command, *parts))

    with RawPeer(node.port) as peer:
        peer.associate()
        peer.send(command[:2] + len(content).to_bytes(4, "big") + content)
        assert peer.read_response()[cmd.STATUS] == 0

    assert node.dataset(ds.SOPInstanceUID) == body


def test_bytes_that_arrive_one_by_one_are_put_together(node: DimseNode) -> None:
    ds = ct_slice(size=2)
    body = dataset_bytes(part10(ds))
    raw = message(1, store_rq(ds.SOPInstanceUID), body[:300], body[300:])

    with RawPeer(node.port) as peer:
        peer.associate()
        for at in range(len(raw)):
            peer.send(raw[at : at + 1])
        assert peer.read_response()[cmd.STATUS] == 0

    assert node.dataset(ds.SOPInstanceUID) == body


def test_requests_may_be_sent_ahead(node: DimseNode) -> None:
    study = a_study(n_instances=20, size=8)
    raw = b"".join(
        message(
            1,
            store_rq(ds.SOPInstanceUID, message_id=number),
            dataset_bytes(part10(ds)),
        )
        for number, ds in enumerate(study, 1)
    )

    with RawPeer(node.port) as peer:
        peer.associate()
        peer.send(raw)
        answers = [peer.read_response() for _ in study]
        peer.release()

    assert [one[cmd.RESPONDED_ID] for one in answers] == list(range(1, 21))
    assert {one[cmd.STATUS] for one in answers} == {0}
    assert len(node.uids()) == 20


@pytest.mark.parametrize("size", [178, 179, 180, 181, 182, 512])
def test_large_objects_go_through_the_spool(small: DimseNode, size: int) -> None:
    ds = ct_slice(size=size)
    body = dataset_bytes(part10(ds))

    with RawPeer(small.port) as peer:
        peer.associate()
        assert peer.store(ds.SOPInstanceUID, body, fragment=16_000)[cmd.STATUS] == 0
        peer.release()

    assert small.dataset(ds.SOPInstanceUID) == body
    assert small.partial_files() == []


@pytest.mark.parametrize("options", [(), ("-xi",), ("-xb",)], ids=str)
def test_dcmtk_stores(
    node: DimseNode, tmp_path: Path, options: tuple[str, ...]
) -> None:
    syntax = {
        "-xi": ImplicitVRLittleEndian,
        "-xb": ExplicitVRBigEndian,
    }.get(options[0] if options else "", ExplicitVRLittleEndian)
    study = a_study(n_instances=3)
    folder = tmp_path / "files"
    folder.mkdir()
    for number, ds in enumerate(study):
        (folder / f"{number}.dcm").write_bytes(part10(ds, syntax))

    dcmtk.run(
        "storescu",
        "-aec",
        "HUYING",
        *options,
        "+sd",
        "127.0.0.1",
        node.port,
        folder,
    )

    assert node.uids() == sorted(ds.SOPInstanceUID for ds in study)


def test_the_same_instance_again_is_a_success(node: DimseNode) -> None:
    ds = ct_slice()
    body = dataset_bytes(part10(ds))

    with RawPeer(node.port) as peer:
        peer.associate()
        statuses = [peer.store(ds.SOPInstanceUID, body)[cmd.STATUS] for _ in range(3)]

    assert statuses == [0, 0, 0]
    assert node.uids() == [ds.SOPInstanceUID]


def test_other_content_under_a_uid_we_hold_is_0111(node: DimseNode) -> None:
    first, second = ct_slice(), ct_slice(SeriesDescription="other")
    bodies = [dataset_bytes(part10(ds)) for ds in (first, second)]

    with RawPeer(node.port) as peer:
        peer.associate()
        statuses = [
            peer.store(first.SOPInstanceUID, body)[cmd.STATUS] for body in bodies
        ]

    assert statuses == [0, 0x0111]
    assert node.dataset(first.SOPInstanceUID) == bodies[0]


def test_other_content_replaces_where_the_policy_says_so(tmp_path: Path) -> None:
    first, second = ct_slice(), ct_slice(SeriesDescription="other")
    bodies = [dataset_bytes(part10(ds)) for ds in (first, second)]

    with DimseNode(tmp_path, duplicates=DuplicatePolicy.IF_CHANGED) as node:
        with RawPeer(node.port) as peer:
            peer.associate()
            for body in bodies:
                assert peer.store(first.SOPInstanceUID, body)[cmd.STATUS] == 0
        assert node.dataset(first.SOPInstanceUID) == bodies[1]


def test_what_deserves_a_second_look_is_b007(node: DimseNode) -> None:
    ds = ct_slice(PatientID=None)

    with RawPeer(node.port) as peer:
        peer.associate()
        response = peer.store(ds.SOPInstanceUID, dataset_bytes(part10(ds)))

    assert response[cmd.STATUS] == 0xB007
    assert response[cmd.COMMENT] == "Patient ID is missing"
    assert node.uids() == [ds.SOPInstanceUID]


@pytest.mark.parametrize(
    ("claimed", "body", "status"),
    [
        ("1.2.3", None, 0xA900),
        ("1.02.3", None, 0xA900),
        ("", None, 0xA900),
        (None, b"not a data set", 0xC000),
        (None, b"", 0xC000),
    ],
    ids=["other UID", "illegal UID", "no UID", "garbage", "empty"],
)
def test_a_refusal_names_status_and_reason_and_the_association_goes_on(
    node: DimseNode, claimed: str | None, body: bytes | None, status: int
) -> None:
    ds = ct_slice()
    good = dataset_bytes(part10(ds))
    uid = ds.SOPInstanceUID if claimed is None else claimed

    with RawPeer(node.port) as peer:
        peer.associate()
        response = peer.store(uid, good if body is None else body)
        assert response[cmd.STATUS] == status
        assert response[cmd.COMMENT]
        assert node.uids() == []
        assert peer.store(ds.SOPInstanceUID, good)[cmd.STATUS] == 0
        peer.release()

    assert node.uids() == [ds.SOPInstanceUID]


def test_a_refused_large_object_is_read_and_dropped(small: DimseNode) -> None:
    ds = ct_slice(size=512)
    body = dataset_bytes(part10(ds))

    with RawPeer(small.port) as peer:
        peer.associate()
        response = peer.store("1.02", body)
        assert response[cmd.STATUS] == 0xA900
        assert peer.store(ds.SOPInstanceUID, body)[cmd.STATUS] == 0

    assert small.uids() == [ds.SOPInstanceUID]
    assert small.partial_files() == []


def test_a_full_disk_is_a700_and_leaves_nothing(tmp_path: Path) -> None:
    ds = ct_slice(size=512)
    body = dataset_bytes(part10(ds))

    with DimseNode(tmp_path, limits=SMALL, min_free_bytes=1 << 60) as node:
        with RawPeer(node.port) as peer:
            peer.associate()
            response = peer.store(ds.SOPInstanceUID, body)
            peer.release()
        assert response[cmd.STATUS] == 0xA700
        assert node.uids() == []
        assert node.partial_files() == []


def test_a_class_that_is_not_that_of_the_context_is_0122(node: DimseNode) -> None:
    ds = ct_slice(modality="MR")

    with RawPeer(node.port) as peer:
        peer.associate()
        response = peer.store(
            ds.SOPInstanceUID,
            dataset_bytes(part10(ds)),
            class_uid=str(ds.SOPClassUID),
        )

    assert response[cmd.STATUS] == 0x0122
    assert node.uids() == []


def test_private_storage_classes_are_kept(node: DimseNode) -> None:
    private = "1.2.826.0.1.3680043.10.1999.99.1"
    ds = ct_slice(SOPClassUID=private)

    with RawPeer(node.port) as peer:
        peer.associate(((1, private, (EXPLICIT,)),))
        response = peer.store(
            ds.SOPInstanceUID, dataset_bytes(part10(ds)), class_uid=private
        )

    assert response[cmd.STATUS] == 0
    assert node.uids() == [ds.SOPInstanceUID]


def test_a_release_flushes_what_the_policy_left_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ds = ct_slice()

    with DimseNode(tmp_path, sync=SyncPolicy.ASSOCIATION) as node:
        flushed: list[list[str]] = []
        monkeypatch.setattr(node.ingest, "flush", lambda: flushed.append(node.uids()))
        with RawPeer(node.port) as peer:
            peer.associate()
            peer.store(ds.SOPInstanceUID, dataset_bytes(part10(ds)))
            assert flushed == []
            peer.release()
            assert flushed == [[ds.SOPInstanceUID]]


def test_arrivals_belong_to_the_tenant_of_the_called_ae(tmp_path: Path) -> None:
    ds = ct_slice()
    with DimseNode(tmp_path, our_aes={"HUYING": "default", "EAST": "east"}) as node:
        for called in ("HUYING", "EAST"):
            with RawPeer(node.port) as peer:
                peer.associate(called=called)
                response = peer.store(ds.SOPInstanceUID, dataset_bytes(part10(ds)))
                assert response[cmd.STATUS] == 0
                peer.release()
        assert node.uids() == [ds.SOPInstanceUID] * 2
