"""What C-MOVE and C-GET identifiers select, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.client import Address, RemoteAssociation, Reply, connect, propose
from pacs.dimse.command import CommandField
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from storage.kernel.types import Actor, TenantId
from tests.support.archive import TIMEOUTS, Archive, archive
from tests.support.datasets import a_study, uid
from tests.support.dicom_peers import PyScp

_Q = "1.2.840.10008.5.1.4.1.2"
PATIENT, STUDY, BOTH = f"{_Q}.1.2", f"{_Q}.2.2", f"{_Q}.3.2"
LEVEL, PATIENT_ID = 0x00080052, 0x00100020
STUDY_UID, SERIES_UID, INSTANCE_UID = 0x0020000D, 0x0020000E, 0x00080018
CHARSET = 0x00080005
VRS = {
    LEVEL: b"CS", PATIENT_ID: b"LO", CHARSET: b"CS",
    STUDY_UID: b"UI", SERIES_UID: b"UI", INSTANCE_UID: b"UI",
}  # fmt: skip
A, B = uid(1), uid(2)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    folder: Path = tmp_path_factory.mktemp("selection")
    with archive(folder) as made, made.listening():
        made.store_all(a_study(seed=1, n_series=2, n_instances=2))
        made.store_all(a_study(seed=2, n_instances=3, PatientID="PID1"))
        made.store_all(a_study(seed=3, n_instances=1, PatientID="张三"))
        other = Actor(TenantId("other"), "test")
        made.store_all(a_study(seed=4, n_instances=2), actor=other)
        yield made


@pytest.fixture(scope="module")
def scp(node: Archive) -> Iterator[PyScp]:
    with PyScp().running() as running:
        node.add_peer(running.title, running.port)
        yield running


def asking(node: Archive, *models: str, title: str = "ASKER") -> RemoteAssociation:
    return connect(
        Address("127.0.0.1", node.port, node.aet),
        title,
        propose([(model, (EXPLICIT_VR_LE,)) for model in models]),
        timeouts=TIMEOUTS,
    )


def keys(level: str, **values: str | bytes) -> dict[int, str | bytes]:
    tags = {
        "patient": PATIENT_ID, "study": STUDY_UID, "series": SERIES_UID,
        "instance": INSTANCE_UID, "charset": CHARSET,
    }  # fmt: skip
    return {LEVEL: level, **{tags[name]: value for name, value in values.items()}}


def move(node: Archive, model: str, wanted: dict[int, str | bytes]) -> Reply:
    raw = identifier.write(
        [(tag, VRS[tag], wanted[tag]) for tag in sorted(wanted)], EXPLICIT_VR_LE
    )
    with asking(node, model) as association:
        number = association.request(
            association.offer(model).context_id,
            {
                cmd.AFFECTED_CLASS: model,
                cmd.FIELD: CommandField.C_MOVE_RQ,
                cmd.PRIORITY: 0,
                cmd.MOVE_DESTINATION: "PYSCP",
            },
            (raw,),
        )
        while True:
            reply = association.response(number)
            if reply.status != 0xFF00:
                return reply


@pytest.mark.parametrize(
    ("model", "wanted", "count"),
    [
        (STUDY, keys("STUDY", study=A), 4),
        (STUDY, keys("STUDY", study=f"{A}\\{B}"), 7),
        (STUDY, keys("SERIES", study=A, series=uid(1, 2)), 2),
        (STUDY, keys("SERIES", study=A, series=f"{uid(1, 1)}\\{uid(1, 2)}"), 4),
        (STUDY, keys("IMAGE", study=A, series=uid(1, 2), instance=uid(1, 2, 1)), 1),
        (STUDY, keys("SERIES", study=B, series=uid(1, 2)), 0),
        (STUDY, keys("STUDY", study="1.2.3.4"), 0),
        (STUDY, keys("STUDY", study=uid(4)), 0),
        (PATIENT, keys("PATIENT", patient="PID1"), 7),
        (PATIENT, keys("PATIENT", patient="张三".encode(), charset="ISO_IR 192"), 1),
        (
            PATIENT,
            keys("PATIENT", patient="张三".encode("gb18030"), charset="GB18030"),
            1,
        ),
        (PATIENT, keys("STUDY", patient="PID1", study=A), 4),
        (PATIENT, keys("STUDY", patient="PID9", study=A), 0),
        (BOTH, keys("STUDY", patient="PID1", study=B), 3),
    ],
    ids=lambda one: one if isinstance(one, str) else None,
)
def test_what_is_selected(
    node: Archive, scp: PyScp, model: str, wanted: dict[int, str | bytes], count: int
) -> None:
    scp.received.clear()

    reply = move(node, model, wanted)

    assert reply.status == 0x0000
    assert cmd.number(reply.command, cmd.COMPLETED) == count
    assert cmd.REMAINING not in reply.command
    assert len(scp.received) == count


@pytest.mark.parametrize(
    ("model", "wanted", "offending"),
    [
        (STUDY, {STUDY_UID: A}, LEVEL),
        (STUDY, keys("NONSENSE", study=A), LEVEL),
        (STUDY, keys("PATIENT", patient="PID1"), LEVEL),
        (BOTH, keys("SERIES", patient="PID1", study=A, series=uid(1, 1)), LEVEL),
        (STUDY, keys("STUDY"), STUDY_UID),
        (STUDY, keys("STUDY", study=""), STUDY_UID),
        (STUDY, keys("STUDY", study="*"), STUDY_UID),
        (STUDY, keys("STUDY", study="1" * 65), STUDY_UID),
        (STUDY, keys("SERIES", series=uid(1, 1)), STUDY_UID),
        (STUDY, keys("SERIES", study=f"{A}\\{B}", series=uid(1, 1)), STUDY_UID),
        (STUDY, keys("IMAGE", study=A, instance=uid(1, 1, 1)), SERIES_UID),
        (PATIENT, keys("PATIENT", patient="PID1\\PID2"), PATIENT_ID),
        (PATIENT, keys("PATIENT", patient="PID?"), PATIENT_ID),
        (PATIENT, keys("STUDY", study=A), PATIENT_ID),
    ],
)
def test_what_selects_nothing_is_refused_with_the_element(
    node: Archive,
    scp: PyScp,
    model: str,
    wanted: dict[int, str | bytes],
    offending: int,
) -> None:
    reply = move(node, model, wanted)

    assert reply.status == 0xA900
    group, element = divmod(offending, 0x10000)
    raw = group.to_bytes(2, "little") + element.to_bytes(2, "little")
    assert str(reply.command[cmd.OFFENDING]).encode("latin-1") == raw.rstrip(b"\0 ")


def test_a_broken_identifier_is_not_understood(node: Archive, scp: PyScp) -> None:
    with asking(node, STUDY) as association:
        for raw in (b"\xff" * 20, b""):
            number = association.request(
                association.offer(STUDY).context_id,
                {
                    cmd.AFFECTED_CLASS: STUDY,
                    cmd.FIELD: CommandField.C_MOVE_RQ,
                    cmd.PRIORITY: 0,
                    cmd.MOVE_DESTINATION: "PYSCP",
                },
                (raw,),
            )
            assert association.response(number).status == 0xC000


def test_who_may_only_store_may_not_retrieve(tmp_path: Path) -> None:
    with archive(tmp_path, open=False) as node, node.listening():
        node.add_peer("ASKER", 0, host="", may=frozenset({"store"}))
        node.add_peer("PYSCP", 104)
        assert move(node, STUDY, keys("STUDY", study=A)).status == 0x0124


def test_the_last_syntax_is_implicit(node: Archive) -> None:
    """An identifier in Implicit VR selects the same."""
    raw = identifier.write(
        [(LEVEL, b"CS", "STUDY"), (STUDY_UID, b"UI", "1.2.3.4")], IMPLICIT_VR_LE
    )
    with connect(
        Address("127.0.0.1", node.port, node.aet),
        "ASKER",
        propose([(STUDY, (IMPLICIT_VR_LE,))]),
        timeouts=TIMEOUTS,
    ) as association:
        counts = list(association.move(association.offer(STUDY), "PYSCP", raw))

    assert [one.status for one in counts] == [0x0000]
