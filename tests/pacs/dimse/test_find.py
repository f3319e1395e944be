"""C-FIND over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.command import CommandField
from storage.kernel.limits import Limits
from tests.support import dcmtk
from tests.support.datasets import a_study, dataset_bytes, part10, uid
from tests.support.dimse import (
    CT,
    EXPLICIT,
    PATIENT_FIND,
    STUDY_FIND,
    DimseNode,
    RawPeer,
    find_rq,
    message,
)

ONLY_FIND = "1.2.840.10008.5.1.4.1.2.3.1"


def fill(node: DimseNode, *studies: list[Dataset]) -> None:
    """Store data sets through the front door."""
    with RawPeer(node.port) as peer:
        peer.associate()
        for study in studies:
            for ds in study:
                body = dataset_bytes(part10(ds))
                assert peer.store(ds.SOPInstanceUID, body)[cmd.STATUS] in {0, 0xB007}
        peer.release()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DimseNode]:
    """Yield a node with three studies; limits small enough to reach."""
    limits = Limits(find_results=100, matching_wildcards=4)
    with DimseNode(tmp_path_factory.mktemp("node"), limits=limits) as node:
        fill(
            node,
            a_study(seed=1, n_series=2, n_instances=2, size=4),
            a_study(seed=2, n_instances=3, size=4, PatientName="Müller^Zoë"),
            a_study(
                seed=3,
                size=4,
                RequestAttributesSequence=[
                    _item(ScheduledProcedureStepID="SPS1", RequestedProcedureID="RP1")
                ],
            ),
        )
        yield node


def _item(**values: str) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def query(level: str | None, **keys: Any) -> Dataset:
    ds = Dataset()
    if level is not None:
        ds.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(ds, keyword, value)
    return ds


def find(
    node: DimseNode,
    keys: Dataset,
    *,
    model: str = STUDY_FIND,
    syntax: str = ExplicitVRLittleEndian,
    extended: bytes | None = None,
) -> list[tuple[Dataset, Dataset | None]]:
    """Return what pynetdicom gets: statuses with their data sets."""
    ae = AE("FINDER")
    ae.add_requested_context(model, syntax)
    items = []
    if extended is not None:
        item = SOPClassExtendedNegotiation()
        item.sop_class_uid = model
        item.service_class_application_information = extended
        items.append(item)
    association = ae.associate("127.0.0.1", node.port, ae_title="HUYING", ext_neg=items)
    assert association.is_established
    try:
        return list(association.send_c_find(keys, model))
    finally:
        association.release()


def matches(
    found: list[tuple[Dataset, Dataset | None]], *, pending: int = 0xFF00
) -> list[Dataset]:
    """Return the identifiers; the last status must be success."""
    assert found[-1][0].Status == 0
    assert {one[0].Status for one in found[:-1]} <= {pending}
    return [one[1] for one in found if one[1] is not None]


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian],
    ids=lambda one: one.name,
)
def test_studies_are_found_in_each_syntax(filled: DimseNode, syntax: str) -> None:
    found = matches(
        find(
            filled,
            query(
                "STUDY",
                PatientID="PID1",
                PatientName="",
                StudyDate="",
                ModalitiesInStudy="",
                NumberOfStudyRelatedInstances="",
                StudyInstanceUID="",
            ),
            syntax=syntax,
        )
    )

    [study] = found
    assert study.QueryRetrieveLevel == "STUDY"
    assert study.RetrieveAETitle == "HUYING"
    assert study.PatientID == "PID1"
    assert str(study.PatientName) == "Test1^Case=测试^1"
    assert study.SpecificCharacterSet == "ISO_IR 192"
    assert study.ModalitiesInStudy == "CT"
    assert study.NumberOfStudyRelatedInstances == 4
    assert study.StudyInstanceUID == uid(1)


def test_every_level_of_both_roots(filled: DimseNode) -> None:
    cases = [
        (PATIENT_FIND, query("PATIENT", PatientID="", PatientName=""), 3),
        (PATIENT_FIND, query("STUDY", PatientID="PID1", StudyInstanceUID=""), 1),
        (STUDY_FIND, query("STUDY", StudyInstanceUID=""), 3),
        (STUDY_FIND, query("SERIES", StudyInstanceUID=uid(1), Modality=""), 2),
        (
            STUDY_FIND,
            query(
                "IMAGE",
                StudyInstanceUID=uid(1),
                SeriesInstanceUID=uid(1, 1),
                SOPInstanceUID="",
                Rows=None,
            ),
            2,
        ),
        (ONLY_FIND, query("PATIENT", PatientID="PID1"), 1),
    ]
    for model, keys, wanted in cases:
        assert len(matches(find(filled, keys, model=model))) == wanted


def test_binary_keys_match_and_return(filled: DimseNode) -> None:
    keys = query("IMAGE", StudyInstanceUID=uid(1), SeriesInstanceUID=uid(1, 1), Rows=4)
    keys.SOPInstanceUID = ""

    found = matches(find(filled, keys, syntax=ExplicitVRBigEndian))

    assert [one.Rows for one in found] == [4, 4]
    keys.Rows = 5
    assert matches(find(filled, keys, syntax=ExplicitVRBigEndian)) == []


def test_unknown_keys_come_back_empty_with_ff01(filled: DimseNode) -> None:
    keys = query("STUDY", StudyInstanceUID=uid(1), EthnicGroup="", Modality="")
    keys.add_new(0x00091001, "LO", "")

    [found] = matches(find(filled, keys), pending=0xFF01)

    assert found.EthnicGroup == ""
    assert found.Modality == ""
    assert not found[0x00091001].value


def test_request_attributes_are_matched_and_returned(filled: DimseNode) -> None:
    def ask(step: str) -> list[Dataset]:
        item = _item(ScheduledProcedureStepID=step, RequestedProcedureID="")
        keys = query(
            "SERIES", StudyInstanceUID=uid(3), RequestAttributesSequence=[item]
        )
        return matches(find(filled, keys))

    [series] = ask("SPS1")
    [item] = series.RequestAttributesSequence
    assert (item.ScheduledProcedureStepID, item.RequestedProcedureID) == ("SPS1", "RP1")
    assert ask("SPS2") == []


def test_sequences_that_are_not_known_come_back_empty(filled: DimseNode) -> None:
    keys = query(
        "STUDY",
        StudyInstanceUID=uid(1),
        ProcedureCodeSequence=[_item(CodeValue="1", CodingSchemeDesignator="X")],
    )

    [found] = matches(find(filled, keys), pending=0xFF01)

    assert list(found.ProcedureCodeSequence) == []


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("", "ISO_IR 192"),
        ("ISO_IR 192", "ISO_IR 192"),
        ("GB18030", "GB18030"),
        ("GBK", "GBK"),
        ("ISO_IR 100", "ISO_IR 192"),
    ],
)
def test_the_character_set_is_the_one_asked_for_if_all_of_it_fits(
    filled: DimseNode, asked: str, answered: str
) -> None:
    keys = query("STUDY", StudyInstanceUID=uid(1), PatientName="")
    keys.SpecificCharacterSet = asked.split("\\")

    [found] = matches(find(filled, keys))

    declared = found.SpecificCharacterSet
    declared = declared if isinstance(declared, str) else "\\".join(declared)
    assert declared == answered
    assert str(found.PatientName) == "Test1^Case=测试^1"


def test_latin_names_go_out_in_latin_1(filled: DimseNode) -> None:
    keys = query("STUDY", StudyInstanceUID=uid(2), PatientName="")
    keys.SpecificCharacterSet = "ISO_IR 100"

    [found] = matches(find(filled, keys), pending=0xFF00)

    assert found.PatientName.original_string == "Müller^Zoë".encode("latin-1")


def test_hanzi_go_out_with_the_code_extensions_of_gb_2312(filled: DimseNode) -> None:
    keys = query("STUDY", StudyInstanceUID=uid(1), PatientName="")
    keys.SpecificCharacterSet = ["", "ISO 2022 IR 58"]

    [found] = matches(find(filled, keys))

    assert list(found.SpecificCharacterSet) == ["", "ISO 2022 IR 58"]
    raw = found.PatientName.original_string
    assert raw == b"Test1^Case=\x1b$)A" + "测试".encode("gb2312") + b"^1"


def test_japanese_names_go_out_with_code_extensions(tmp_path: Path) -> None:
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    with DimseNode(tmp_path) as node:
        fill(node, a_study(seed=4, n_instances=1, size=4, PatientName=name))
        keys = query("STUDY", StudyInstanceUID=uid(4), PatientName="")
        keys.SpecificCharacterSet = ["", "ISO 2022 IR 87"]

        [found] = matches(find(node, keys))

    assert list(found.SpecificCharacterSet) == ["", "ISO 2022 IR 87"]
    assert str(found.PatientName) == name


def test_an_unknown_character_set_is_answered_in_utf_8(filled: DimseNode) -> None:
    with RawPeer(filled.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)),))
        keys = text_keys(
            SpecificCharacterSet="ISO_IR 999",
            QueryRetrieveLevel="STUDY",
            PatientName="",
            StudyInstanceUID=uid(1),
        )
        peer.request(1, find_rq(), keys)
        _, raw = peer.read_message()

    elements = identifier.read(raw, EXPLICIT, filled.limits)
    assert elements[0x00080005] == b"ISO_IR 192"
    assert elements[0x00100010] == "Test1^Case=测试^1 ".encode()


def test_keys_are_read_in_their_character_set(filled: DimseNode) -> None:
    keys = query("STUDY", PatientName="*测试*", StudyInstanceUID="")
    keys.SpecificCharacterSet = "GB18030"

    assert {one.StudyInstanceUID for one in matches(find(filled, keys))} == {
        uid(1),
        uid(3),
    }


def test_relational_queries_work_when_negotiated(filled: DimseNode) -> None:
    keys = query("IMAGE", SOPInstanceUID=uid(1, 2, 1))

    refused = find(filled, keys)
    found = matches(find(filled, keys, extended=b"\x01\x01\x01\x00"))

    assert refused[-1][0].Status == 0xA900
    assert [one.SeriesInstanceUID for one in found] == [uid(1, 2)]


def test_fuzzy_matching_works_when_negotiated(filled: DimseNode) -> None:
    keys = query("STUDY", PatientName="zoe muller", StudyInstanceUID="")

    assert matches(find(filled, keys)) == []
    found = matches(find(filled, keys, extended=b"\x00\x00\x01"))
    assert [one.StudyInstanceUID for one in found] == [uid(2)]


def test_dcmtk_finds(filled: DimseNode, tmp_path: Path) -> None:
    done = dcmtk.run(
        "findscu", "-S", "-aec", "HUYING", "-X", "-od", tmp_path,
        "-k", "QueryRetrieveLevel=STUDY", "-k", "PatientName",
        "-k", "StudyInstanceUID", "127.0.0.1", filled.port,
    )  # fmt: skip

    found = [dcmread(path) for path in sorted(tmp_path.glob("*.dcm"))]
    assert {one.StudyInstanceUID for one in found} == {uid(1), uid(2), uid(3)}, done


def test_a_list_of_ten_thousand_uids_is_answered(filled: DimseNode) -> None:
    uids = [f"1.2.3.{number}" for number in range(10_000)] + [uid(2)]

    keys = query("STUDY", StudyInstanceUID=uids)
    found = matches(find(filled, keys, syntax=ImplicitVRLittleEndian))

    assert [one.StudyInstanceUID for one in found] == [uid(2)]


def raw_find(node: DimseNode, keys: bytes) -> dict[int, cmd.Value]:
    with RawPeer(node.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)),))
        peer.request(1, find_rq(), keys)
        response = peer.read_response()
        peer.release()
        return response


def text_keys(**keys: str) -> bytes:
    """Return an identifier that nothing has checked."""
    elements = [(tag_for_keyword(name) or 0, value) for name, value in keys.items()]
    return identifier.write(
        [(tag, dictionary_VR(tag).encode(), value) for tag, value in sorted(elements)],
        EXPLICIT,
    )


@pytest.mark.parametrize(
    ("keys", "status", "offending"),
    [
        ({"PatientID": "1"}, 0xA900, 0x00080052),
        ({"QueryRetrieveLevel": "FRAME"}, 0xA900, 0x00080052),
        ({"QueryRetrieveLevel": "PATIENT"}, 0xA900, 0x00080052),
        (
            {"QueryRetrieveLevel": "SERIES", "SeriesInstanceUID": ""},
            0xA900,
            0x0020000D,
        ),
        ({"QueryRetrieveLevel": "STUDY", "StudyDate": "-"}, 0xA900, 0x00080020),
        ({"QueryRetrieveLevel": "STUDY", "PatientID": "*a*b*c*d*e*"}, 0xC001, None),
    ],
    ids=["no level", "unknown level", "above root", "no study", "date", "wildcards"],
)
def test_b19_a_wrong_identifier_names_the_element(
    filled: DimseNode, keys: dict[str, str], status: int, offending: int | None
) -> None:
    response = raw_find(filled, text_keys(**keys))

    assert response[cmd.STATUS] == status
    assert response[cmd.COMMENT]
    if offending is not None:
        raw = cmd.tags(offending).decode("latin-1")
        assert response[cmd.OFFENDING] == raw.rstrip("\0 ")


@pytest.mark.parametrize("raw", [b"", b"\x01", b"garbage!" * 4], ids=len)
def test_an_identifier_that_cannot_be_read_is_refused(
    filled: DimseNode, raw: bytes
) -> None:
    assert cmd.number(raw_find(filled, raw), cmd.STATUS) in {0xA900, 0xC000}


def test_b22_ranges_reversed_match_nothing(filled: DimseNode) -> None:
    keys = query("STUDY", StudyDate="20251231-20250101", StudyInstanceUID="")

    assert matches(find(filled, keys)) == []


def many(node: DimseNode, number: int) -> None:
    """Store `number` instances of one series."""
    fill(node, a_study(seed=9, n_instances=number, size=2))


def test_b21_more_matches_than_allowed_end_with_a700(tmp_path: Path) -> None:
    with DimseNode(tmp_path, limits=Limits(find_results=10)) as node:
        many(node, 12)
        keys = query("IMAGE", StudyInstanceUID=uid(9), SeriesInstanceUID=uid(9, 1))
        keys.SOPInstanceUID = ""

        found = find(node, keys)

    assert [one[0].Status for one in found] == [0xFF00] * 10 + [0xA700]


def cancel_rq(message_id: int) -> bytes:
    return message(
        1,
        {
            cmd.FIELD: CommandField.C_CANCEL_RQ,
            cmd.RESPONDED_ID: message_id,
            cmd.DATASET_TYPE: cmd.NO_DATASET,
        },
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DimseNode]:
    """Yield a node with more matches than fit one batch."""
    with DimseNode(tmp_path_factory.mktemp("full")) as node:
        many(node, 120)
        yield node


def all_images() -> bytes:
    return identifier.write(
        [
            (0x00080018, b"UI", ""),
            (0x00080052, b"CS", "IMAGE"),
            (0x0020000D, b"UI", uid(9)),
            (0x0020000E, b"UI", uid(9, 1)),
        ],
        EXPLICIT,
    )


@pytest.mark.parametrize(
    ("before", "behind", "final"),
    [
        (b"", cancel_rq(7), 0xFE00),
        (b"", cancel_rq(7) * 2, 0xFE00),
        (b"", cancel_rq(8), 0x0000),
        (cancel_rq(7), b"", 0x0000),
    ],
    ids=["in time", "twice", "wrong id", "before"],
)
def test_b18_cancel(full: DimseNode, before: bytes, behind: bytes, final: int) -> None:
    with RawPeer(full.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)),))
        peer.send(before, message(1, find_rq(message_id=7), all_images()), behind)
        statuses = []
        while True:
            statuses.append(peer.read_response()[cmd.STATUS])
            if statuses[-1] != 0xFF00:
                break
        peer.send(cancel_rq(7))
        peer.release()

    assert statuses[-1] == final
    assert (len(statuses) == 121) == (final == 0)
    # Nothing answers a cancel: it is not counted with the status of another message.
    assert ("C-CANCEL", 0) in full.recorder.messages
    assert ("C-CANCEL", 0xFE00) not in full.recorder.messages


def test_b15_a_message_id_that_is_in_use_is_0210(full: DimseNode) -> None:
    again = message(1, find_rq(message_id=7), all_images())

    with RawPeer(full.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)),))
        peer.send(again, again)
        statuses = [peer.read_response()[cmd.STATUS] for _ in range(122)]
        peer.release()

    assert sorted(set(statuses)) == [0, 0x0210, 0xFF00]


def test_another_request_waits_its_turn(full: DimseNode) -> None:
    with RawPeer(full.port) as peer:
        peer.associate(((1, STUDY_FIND, (EXPLICIT,)), (3, CT, (EXPLICIT,))))
        peer.send(
            message(1, find_rq(message_id=1), all_images()),
            message(1, find_rq(message_id=2), all_images()),
        )
        answers = [peer.read_response() for _ in range(242)]
        peer.release()

    assert [one[cmd.RESPONDED_ID] for one in answers] == [1] * 121 + [2] * 121
