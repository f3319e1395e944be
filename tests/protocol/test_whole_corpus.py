"""Every public image: sent by DCMTK's tools, found and returned by every door.

A data set that DCMTK writes anew is compared with the one the node was sent; what was
imported, with the file itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pynetdicom import AE, _config, build_context
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from pacs.imaging.part10 import read_file_meta
from pacs.imaging.syntaxes import EXPLICIT_VR_LE
from pacs.web.retrieve import NEVER
from storage.kernel.errors import MalformedObject
from tests.support import dcmtk, dicom_peers, finding
from tests.support.corpus import CORPUS, broken, files, needs_corpus
from tests.support.dicom_peers import PyScp, StoreScp
from tests.support.dicomweb import split
from tests.support.node import RunningNode

pytestmark = needs_corpus

#: What dcmsend cannot read or does not know, so that it never reaches a node.
UNSENT = 39
#: Why the node refuses what dcmsend does send: status, and what is wrong with it.
REFUSED = {
    "0xa900": {  # contradicts itself, or lacks what identifies it
        "broken/bad_sequence.dcm": "a SOP Instance UID that is none",
        "broken/own-no-study-uid.dcm": "no Study Instance UID",
        "broken/own-uid-leading-zero.dcm": "a UID component with a leading zero",
        "broken/own-uid-path-traversal.dcm": "a UID that is a path",
        "broken/own-uid-too-long.dcm": "a UID of more than 64 characters",
        "objects/CR-ModalitySequenceLUT.dcm": "a SOP Instance UID that is none",
        "syntaxes/JLSL_08_07_0_1F.dcm": "no Study Instance UID",
        "syntaxes/JPEGLSNearLossless_16.dcm": "no Study Instance UID",
        "syntaxes/SC_rgb_jls_lossy_line.dcm": "no Study Instance UID",
        "syntaxes/SC_rgb_jls_lossy_sample.dcm": "no Study Instance UID",
    },
    "0x0122": {"broken/explicit_VR-UN.dcm": "a SOP class that is none of storage"},
    "0xa700": {"broken/own-deflate-bomb.dcm": "inflates beyond the limit"},
    "0xc000": {"broken/own-deep-1200.dcm": "sequences nested 1200 deep"},
}
#: The same UID as a file with other content: whichever comes first is kept.
DUPLICATE = "0x0111"
#: storescu's option that proposes a transfer syntax.
OPTIONS = {
    "1.2.840.10008.1.2": "-xi", "1.2.840.10008.1.2.1": "-xe",
    "1.2.840.10008.1.2.2": "-xb", "1.2.840.10008.1.2.1.99": "-xd",
    "1.2.840.10008.1.2.4.50": "-xy", "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs", "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu", "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw", "1.2.840.10008.1.2.5": "-xr",
}  # fmt: skip
#: Retired syntaxes that storescp does not take: they come decoded.
UNKNOWN_TO_STORESCP = frozenset(
    f"1.2.840.10008.1.2.4.{number}" for number in (52, 53, 54, 55, 56)
)
AS_STORED = (("application/dicom", "*"),)


@dataclass
class Filled:
    """A node that was given the corpus."""

    node: RunningNode
    said: str = ""

    @cached_property
    def instances(self) -> dict[str, dict[str, Any]]:
        """SOP Instance UID to the QIDO-RS answer of every stored instance."""
        found = self.node.get(
            "/dicom-web/instances?limit=1000&includefield=00083002"
        ).json()
        return {one["00080018"]["Value"][0]: one for one in found}

    @cached_property
    def studies(self) -> list[str]:
        return sorted({self.value(uid, "0020000D") for uid in self.instances})

    def value(self, uid: str, tag: str) -> str:
        return str(self.instances[uid][tag]["Value"][0])

    @cached_property
    def stored(self) -> dict[str, tuple[str, bytes]]:
        """SOP Instance UID to transfer syntax and data set, by ``/api/v1``."""
        return {
            uid: parts(self.node.get(f"/api/v1/instances/{uid}/file").body)
            for uid in self.instances
        }

    @cached_property
    def contexts(self) -> list[tuple[str, str]]:
        return sorted(
            {
                (self.value(uid, "00080016"), syntax)
                for uid, (syntax, _) in self.stored.items()
            }
        )

    @cached_property
    def client(self) -> DICOMwebClient:
        return DICOMwebClient(self.node.dicomweb)


def parts(file: bytes) -> tuple[str, bytes]:
    """Return transfer syntax and data set of a Part 10 file."""
    meta = read_file_meta(file)
    assert meta is not None
    return meta.transfer_syntax_uid, file[meta.dataset_offset :]


@cache
def by_uid() -> dict[str, list[tuple[str, bytes]]]:
    """Return what the corpus files hold, by the UID in their meta information."""
    found = defaultdict(list)
    for path in (*files(), *broken()):
        data = path.read_bytes()
        try:
            meta = read_file_meta(data)
        except MalformedObject:
            continue
        if meta is not None:
            found[meta.sop_instance_uid].append(
                (meta.transfer_syntax_uid, data[meta.dataset_offset :])
            )
    return found


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """Yield a node that dcmsend gave the whole corpus, broken files included."""
    folder = tmp_path_factory.mktemp("sent")
    report = folder / "report.txt"
    node = RunningNode.start(folder)
    dcmtk.run(
        "dcmsend", "+sd", "+r", "-aec", node.aet, "--no-halt",
        "--create-report-file", report, "127.0.0.1", node.dimse_port, CORPUS,
        timeout=300, check=False,
    )  # fmt: skip
    yield Filled(node, report.read_text("utf-8"))
    node.stop()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """Yield a node that imported the whole corpus: it has each byte of the files."""
    folder = tmp_path_factory.mktemp("imported")
    node = RunningNode.start(folder)
    program = Path(sys.executable).with_name("huying")
    done = subprocess.run(
        [program, "import", CORPUS, "--data", node.data],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    yield Filled(node, done.stdout)
    node.stop()


@dataclass(frozen=True)
class Outcome:
    """What became of a file that dcmsend took."""

    uid: str
    status: str


def outcomes(report: str) -> dict[str, Outcome]:
    """Return what dcmsend reports, by path within the corpus."""
    found = {}
    for block in report.split("\n\n"):
        path = re.search(r"Filename\s*: (.*)", block)
        uid = re.search(r"SOP Instance\s*: (.*)", block)
        status = re.search(r"DIMSE Status\s*: (\S+)", block)
        if path and uid and status:
            name = Path(path[1]).resolve().relative_to(CORPUS.resolve())
            found[str(name)] = Outcome(uid[1], status[1])
    return found


def test_dcmsend_gets_an_answer_for_every_file(sent: Filled) -> None:
    outcome = outcomes(sent.said)
    answered = [path for path, one in outcome.items() if "0x" in one.status]
    refused: Mapping[str, set[str]] = defaultdict(set)
    for path in answered:
        refused[outcome[path].status].add(path)

    stored = refused["0x0000"] | refused["0xb007"]
    for status, reasons in REFUSED.items():
        assert refused[status] == set(reasons), status
    assert set(refused) <= {"0x0000", "0xb007", DUPLICATE, *REFUSED}
    uids = Counter(uid for uid, held in by_uid().items() for _ in held)
    for path in refused[DUPLICATE]:
        meta = read_file_meta((CORPUS / path).read_bytes())
        assert meta is not None
        assert uids[meta.sop_instance_uid] > 1, path
    assert len(files()) + len(broken()) - len(answered) == UNSENT
    inside = set()
    for path in stored:
        # The meta information of a few names another instance than the data set.
        with (CORPUS / path).open("rb") as stream:
            head = read_partial(stream, lambda tag, _vr, _length: tag > 0x00080018)
        inside.add(str(head.SOPInstanceUID))
    assert inside == set(sent.instances)
    assert sent.node.get("/readyz").status == 200


def test_storescu_sends_each_folder_in_the_syntaxes_of_its_files(
    sent: Filled, tmp_path: Path
) -> None:
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in files():
        try:
            meta = read_file_meta(path.read_bytes())
        except MalformedObject:
            continue
        if meta is not None and meta.transfer_syntax_uid in OPTIONS:
            folder = path.relative_to(CORPUS).parts[0]
            groups[folder, OPTIONS[meta.transfer_syntax_uid]].append(path)
    node = RunningNode.start(tmp_path / "storescu")
    try:
        for (_, option), paths in sorted(groups.items()):
            dcmtk.run(
                "storescu", "-nh", "-R", option, "-aec", node.aet,
                "127.0.0.1", node.dimse_port, *paths, check=False,
            )  # fmt: skip
        stored = Filled(node).stored
    finally:
        node.stop()

    # An option allows for uncompressed syntaxes too, so that DCMTK may choose another.
    same = {
        uid
        for uid, (syntax, _) in stored.items()
        if len(by_uid()[uid]) == 1 and sent.stored[uid][0] == syntax
    }
    assert len(stored) > 500
    assert len(same) > 480
    assert {uid: stored[uid] for uid in same} == {uid: sent.stored[uid] for uid in same}


@pytest.mark.parametrize("root", ["-P", "-S"], ids=["patient root", "study root"])
def test_findscu_finds_every_instance(sent: Filled, tmp_path: Path, root: str) -> None:
    def find(level: str, queries: list[dict[str, str]]) -> list[Any]:
        return finding.find(
            tmp_path / level,
            sent.node.dimse_port,
            sent.node.aet,
            root,
            [{"QueryRetrieveLevel": level, **keys} for keys in queries],
        )

    if root == "-P":
        everyone = find("PATIENT", [{"PatientID": "", "PatientName": ""}])
        # Neither can be a unique key (PS3.4 C.2.2.1.1): no value, or wild cards.
        ids = {str(one.PatientID or "") for one in everyone}
        usable = sorted(one for one in ids if one and not set(one) & set("*?"))
        studies = find(
            "STUDY", [{"PatientID": one, "StudyInstanceUID": ""} for one in usable]
        )
        missing = {
            uid
            for uid, one in sent.instances.items()
            if one["00100020"].get("Value", [""])[0] not in usable
        }
        assert len(missing) < 20
    else:
        studies, missing = (
            find("STUDY", [{"PatientID": "", "StudyInstanceUID": ""}]),
            set(),
        )
    above = ["PatientID"] if root == "-P" else []
    series = find(
        "SERIES",
        [
            {name: str(one[name].value) for name in (*above, "StudyInstanceUID")}
            | {"SeriesInstanceUID": ""}
            for one in studies
        ],
    )
    above += ["StudyInstanceUID", "SeriesInstanceUID"]
    owner = {str(one.StudyInstanceUID): one for one in studies}
    images = find(
        "IMAGE",
        [
            {
                name: str(
                    (one if name in one else owner[one.StudyInstanceUID])[name].value
                )
                for name in above
            }
            | {"SOPInstanceUID": ""}
            for one in series
        ],
    )

    assert {str(one.SOPInstanceUID) for one in images} == set(sent.instances) - missing


def test_file_gives_back_what_came(sent: Filled, imported: Filled) -> None:
    """The data set of each imported file; of DCMTK, unless it wrote another one."""
    held = by_uid()
    # By content: the UID of the meta information is not always that of the object.
    every = {found for same in held.values() for found in same}
    for uid, found in imported.stored.items():
        assert found in every, uid
    altered = sum(found not in every for found in sent.stored.values())

    assert len(imported.stored) >= len(sent.stored)
    assert altered < 0.2 * len(sent.stored)


@pytest.fixture(params=["sent", "imported"])
def filled(request: pytest.FixtureRequest) -> Filled:
    made: Filled = request.getfixturevalue(request.param)
    return made


def test_c_get_returns_every_instance_as_stored(filled: Filled) -> None:
    got = dicom_peers.get(
        filled.node.dimse_port, filled.node.aet, filled.studies, filled.contexts
    )

    assert got == filled.stored


def test_c_move_delivers_every_instance_as_stored(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else pynetdicom takes the classes that it knows only.
    monkeypatch.setattr(_config, "UNRESTRICTED_STORAGE_SERVICE", True)
    with PyScp().running() as scp:
        add_peer(filled.node, scp.title, scp.port)
        move(filled, scp.title)

    moved = {
        one.instance_uid: (one.transfer_syntax_uid, one.dataset) for one in scp.received
    }
    assert moved == filled.stored


def add_peer(node: RunningNode, title: str, port: int) -> None:
    body = f'{{"host": "127.0.0.1", "port": {port}}}'.encode()
    assert node.request("PUT", f"/api/v1/peers/{title}", body).status == 200


def move(filled: Filled, title: str) -> None:
    dcmtk.run(
        "movescu", "-S", "-aec", filled.node.aet, "-aem", title, "127.0.0.1",
        filled.node.dimse_port, "-k", "QueryRetrieveLevel=STUDY",
        "-k", "StudyInstanceUID=" + "\\".join(filled.studies), timeout=300,
    )  # fmt: skip


def test_movescu_to_storescp(sent: Filled, tmp_path: Path) -> None:
    options = ("+xa", "--promiscuous")
    with StoreScp(tmp_path / "received", *options, title="DCMTK").running() as scp:
        add_peer(sent.node, scp.title, scp.port)
        move(sent, scp.title)
        received = scp.files()

    assert received.keys() == sent.stored.keys()
    for uid, file in received.items():
        if sent.stored[uid][0] in UNKNOWN_TO_STORESCP:
            assert parts(file)[0] == EXPLICIT_VR_LE
        else:
            assert parts(file) == sent.stored[uid], uid


def test_getscu(sent: Filled, tmp_path: Path) -> None:
    """It takes explicit little endian; what has no decoder here does not come."""
    dcmtk.run(
        "getscu", "-S", "+B", "-od", tmp_path, "-aec", sent.node.aet,
        "127.0.0.1", sent.node.dimse_port, "-k", "QueryRetrieveLevel=STUDY",
        "-k", "StudyInstanceUID=" + "\\".join(sent.studies),
        timeout=300, check=False,
    )  # fmt: skip
    got = {}
    for path in tmp_path.iterdir():
        file = path.read_bytes()
        meta = read_file_meta(file)
        assert meta is not None
        got[meta.sop_instance_uid] = parts(file)

    plain = {
        uid for uid, (syntax, _) in sent.stored.items() if syntax == EXPLICIT_VR_LE
    }
    assert {syntax for syntax, _ in got.values()} == {EXPLICIT_VR_LE}
    assert len(sent.instances) - len(got) <= 5
    assert all(got[uid] == sent.stored[uid] for uid in plain & got.keys())


def test_wado_rs_returns_every_instance_as_stored(filled: Filled) -> None:
    accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
    n_same = 0
    for study in filled.studies:
        answer = filled.node.get(f"/dicom-web/studies/{study}", accept=accept)
        assert answer.status == 200, (study, answer.text)
        for _, file in split(answer):
            meta = read_file_meta(file)
            assert meta is not None
            stored = filled.stored[meta.sop_instance_uid]
            if stored[0] in NEVER:
                assert meta.transfer_syntax_uid == EXPLICIT_VR_LE
            else:
                assert parts(file) == stored
            n_same += 1

    assert n_same == len(filled.stored)


def test_dicomweb_client_finds_and_retrieves_everything(sent: Filled) -> None:
    client = sent.client
    studies = client.search_for_studies(get_remaining=True)
    found, retrieved = set(), set()
    for study in (one["0020000D"]["Value"][0] for one in studies):
        for series in client.search_for_series(study, get_remaining=True):
            uid = series["0020000E"]["Value"][0]
            instances = client.search_for_instances(study, uid, get_remaining=True)
            found |= {one["00080018"]["Value"][0] for one in instances}
        described = client.retrieve_study_metadata(study)
        datasets = client.retrieve_study(study, media_types=AS_STORED)
        assert len(datasets) == len(described)
        retrieved |= {str(one.SOPInstanceUID) for one in datasets}

    assert found == retrieved == set(sent.instances)


def references(attributes: Mapping[str, Any]) -> Iterator[str]:
    for element in attributes.values():
        if "BulkDataURI" in element:
            yield element["BulkDataURI"]
        if element["vr"] == "SQ":
            for item in element.get("Value", ()):
                yield from references(item)


def test_dicomweb_client_retrieves_frames_and_bulk_data(sent: Filled) -> None:
    client = sent.client
    n_frames = n_values = 0
    seen = set()
    damaged = {
        one.uid
        for path, one in outcomes(sent.said).items()
        if path.startswith("broken/")
    }
    for uid, one in sent.instances.items():
        study, series = (one[tag]["Value"][0] for tag in ("0020000D", "0020000E"))
        if series in seen:
            continue
        seen.add(series)
        metadata = client.retrieve_instance_metadata(study, series, uid)
        asked = f"{sent.node.dicomweb}/studies/{study}/series/{series}/metadata"
        for uri in references(metadata):
            address = urljoin(asked, uri)
            if sent.node.get(uri).status == 404:
                assert uri.endswith("7FE00010"), uri  # Pixel Data without a frame
                continue
            n_values += len(client.retrieve_bulkdata(address)) > 0
        if {"7FE00010", "00280010"} <= metadata.keys():
            if uid in damaged:
                continue
            frames = client.retrieve_instance_frames(
                study, series, uid, [1],
                media_types=(("application/octet-stream", "*"),),
            )  # fmt: skip
            n_frames += len(frames)

    assert n_frames > 50
    assert n_values > 50


def test_addresses_in_answers_lead_back(sent: Filled) -> None:
    studies = sent.node.get("/dicom-web/studies?limit=3").json()
    url = studies[0]["00081190"]["Value"][0]

    assert url.startswith(f"{sent.node.dicomweb}/studies/")
    assert sent.client.retrieve_study_metadata(url.rpartition("/")[2])


#: Of chinese-gb18030, -gbk, -iso2022-ir58, -utf8 and -gb18030-rare; what finds each.
CHINESE = {
    "SYN-CHN-001": ["张三", "三", "zhangsan", "zhang san", "san zhang", "Zhang^San",
                    "zhāng sān", "zhang1 san1", "zs"],
    "SYN-CHN-002": ["欧阳明", "欧阳", "ouyangming", "ouyang", "ming ouyang", "oym"],
    "SYN-CHN-003": ["王小东", "小东", "wangxiaodong", "xiaodong", "wáng xiǎodōng",
                    "wxd"],
    "SYN-CHN-004": ["李娜", "lina", "na li", "lǐ nà", "ln"],
    "SYN-CHN-005": ["王喆", "喆㙓", "𠮷", "wangzhe", "zhe"],
}  # fmt: skip
NAMES = [(key, name) for key, names in CHINESE.items() for name in names]
FIND = "1.2.840.10008.5.1.4.1.2.2.1"


@pytest.mark.parametrize(("patient", "name"), NAMES)
def test_chinese_names_are_found(sent: Filled, patient: str, name: str) -> None:
    """By QIDO-RS, by the page, and by C-FIND with fuzzy matching agreed."""
    qido = sent.node.get(
        f"/dicom-web/studies?fuzzymatching=true&PatientName={quote(name)}"
    )
    page = sent.node.get(f"/api/v1/study-list?text={quote(name)}")

    assert qido.status == 200
    assert patient in [one["00100020"]["Value"][0] for one in qido.json()]
    assert patient in page.text
    assert patient in fuzzy_find(sent.node, name)


def fuzzy_find(node: RunningNode, name: str) -> set[str]:
    """C-FIND with pynetdicom, fuzzy matching of names agreed (PS3.4 C.5.2.1)."""
    extended = SOPClassExtendedNegotiation()
    extended.sop_class_uid = FIND
    extended.service_class_application_information = b"\x00\x00\x01"
    association = AE("FINDER").associate(
        "127.0.0.1", node.dimse_port, [build_context(FIND)], ae_title=node.aet,
        ext_neg=[extended],
    )  # fmt: skip
    assert association.is_established
    wanted = Dataset()
    wanted.SpecificCharacterSet = "ISO_IR 192"
    wanted.QueryRetrieveLevel = "STUDY"
    wanted.PatientName = name
    wanted.PatientID = ""
    answers = list(association.send_c_find(wanted, FIND))
    association.release()
    assert answers[-1][0].Status == 0x0000
    return {str(ds.PatientID) for _, ds in answers if ds is not None}
