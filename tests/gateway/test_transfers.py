"""What ``huying import``, ``send`` and ``peer`` leave in the audit, on both engines."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner, Result

from gateway import cli, sending
from storage.audit import AuditEvent, AuditTrail
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.errors import DependencyDown
from tests.support.auditing import records, verified
from tests.support.datasets import a_study, ct_slice, part10
from tests.support.dicom_peers import PyScp

Huying = Callable[..., Result]
STUDIES = [str(ct_slice(seed=seed).StudyInstanceUID) for seed in (1, 2)]
#: The studies of `files`: of these, so many instances.
COUNTS = dict(zip(STUDIES, (3, 2), strict=True))


@pytest.fixture
def data(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a node whose index is on one engine, then the other."""
    monkeypatch.setenv("HUYING_DATABASE__URL", database_url)
    monkeypatch.setenv("HUYING_PACKS__MIN_FREE_BYTES", "0")
    folder = tmp_path / "data"
    folder.mkdir()
    migrate.upgrade(database_url)
    return folder


@pytest.fixture
def huying(data: Path) -> Huying:
    def run(*arguments: object) -> Result:
        words = [*map(str, arguments), "--data", str(data)]
        return CliRunner().invoke(cli.app, words)

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    made = [*a_study(seed=1, n_instances=3), *a_study(seed=2, n_instances=2)]
    for number, ds in enumerate(made):
        (folder / f"{number}.dcm").write_bytes(part10(ds))
    return folder


def recorded(data: Path, database_url: str, *actions: str) -> list[dict[str, Any]]:
    """Return the records of these actions; all of them are ours, in a whole chain."""
    database = Database(database_url)
    found = [row._asdict() for row in records(database)]
    assert verified(database, data / "audit").is_clean
    database.close()
    chosen = [one for one in found if one["action"] in actions]
    for one in chosen:
        assert (one["actor"], one["door"], one["roles"]) == (
            f"cli:{getpass.getuser()}", "cli", "system",
        )  # fmt: skip
        one["detail"] = orjson.loads(one["detail"])
    return chosen


def test_an_import_is_recorded_by_study_with_its_end(
    data: Path, huying: Huying, files: Path, database_url: str
) -> None:
    (files / "bad.dcm").write_bytes(part10(ct_slice())[:200])

    assert huying("import", files, "--tenant", "city-a").exit_code == 1
    (files / "bad.dcm").unlink()
    assert huying("import", files / "0.dcm", "--tenant", "city-a").exit_code == 0

    began, again = recorded(data, database_url, "import")
    assert began["tenant"] == "city-a"
    assert began["detail"] == {"named": 1, "paths": [str(files)]}
    assert again["detail"]["paths"] == [str(files / "0.dcm")]
    stored = recorded(data, database_url, "store")
    counts: dict[tuple[str, str], int] = {}
    for one in stored:
        key = one["study_uid"], one["detail"]["result"]
        counts[key] = counts.get(key, 0) + one["count"]
    assert counts == {
        (STUDIES[0], "stored"): 3, (STUDIES[1], "stored"): 2,
        (STUDIES[0], "duplicate"): 1,
    }  # fmt: skip
    ended, well = recorded(data, database_url, "import.end")
    assert (ended["outcome"], ended["reason"]) == ("error", "1 files rejected")
    told = {name: ended["detail"][name] for name in ("stored", "duplicate", "rejected")}
    assert told == {"stored": 5, "duplicate": 0, "rejected": 1}
    assert (well["outcome"], well["detail"]["duplicate"]) == ("allow", 1)
    assert max(one["sequence"] for one in stored) < well["sequence"]


def test_an_import_ends_where_it_cannot_be_recorded(
    huying: Huying, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(_trail: AuditTrail, _event: AuditEvent) -> None:
        raise DependencyDown("audit: down")

    with monkeypatch.context() as patch:
        patch.setattr(AuditTrail, "record_now", down)
        assert isinstance(huying("import", files).exception, DependencyDown)
    with monkeypatch.context() as patch:
        patch.setattr(AuditTrail, "record", down)
        done = huying("import", files)

    assert done.exit_code == 1
    assert "stored 0" in done.output
    assert "stopped early: audit: down" in done.output


def test_a_send_is_recorded_by_study_and_destination(
    data: Path,
    huying: Huying,
    files: Path,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sending, "PAUSE_SECONDS", 0.0)
    huying("import", files / "3.dcm", files / "4.dcm")
    for number in (3, 4):
        (files / f"{number}.dcm").unlink()
    answers = [0x0000, 0xA900, 0xB000, 0x0000, 0x0000]
    with PyScp(status=answers.__getitem__).running() as scp:
        huying("peer", "add", scp.title, "127.0.0.1", scp.port)
        assert huying("send", scp.title, files, STUDIES[1]).exit_code == 1

    where = {"destination": scp.title, "address": f"127.0.0.1:{scp.port}"}
    began = recorded(data, database_url, "send")
    assert {one["study_uid"]: one["detail"] for one in began} == {
        uid: {**where, "instances": count} for uid, count in COUNTS.items()
    }
    ended = {one["study_uid"]: one for one in recorded(data, database_url, "send.end")}
    failed, well = (ended[uid] for uid in STUDIES)
    assert (failed["outcome"], failed["reason"]) == ("error", "status A900")
    assert failed["detail"] == {**where, "sent": 2, "failed": 1, "left": 0}
    assert (well["outcome"], well["reason"] or "") == ("allow", "")
    assert well["detail"] == {**where, "sent": 2, "failed": 0, "left": 0}
    assert max(one["sequence"] for one in began) < failed["sequence"]


def test_nothing_is_sent_that_cannot_be_recorded(
    huying: Huying, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(_trail: AuditTrail, _event: AuditEvent) -> None:
        raise DependencyDown("audit: down")

    with PyScp().running() as scp:
        huying("peer", "add", scp.title, "127.0.0.1", scp.port)
        monkeypatch.setattr(AuditTrail, "record", down)
        assert isinstance(huying("send", scp.title, files).exception, DependencyDown)

    assert not scp.received


def test_a_peer_that_is_not_there_is_recorded(
    data: Path,
    huying: Huying,
    files: Path,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sending, "PAUSE_SECONDS", 0.0)
    huying("peer", "add", "GONE", "127.0.0.1", 1)

    assert huying("send", "GONE", files / "0.dcm").exit_code == 1

    [ended] = recorded(data, database_url, "send.end")
    assert ended["outcome"] == "error"
    assert "refused" in ended["reason"]
    assert ended["detail"]["failed"] == 1


def test_changes_of_peers_are_recorded(
    data: Path, huying: Huying, database_url: str
) -> None:
    huying("peer", "add", "CT1", "10.0.0.7", 104)
    huying("peer", "add", "CT1", "10.0.0.7", 105)
    huying("peer", "remove", "CT1")

    added, changed, removed = recorded(
        data, database_url, "peer.add", "peer.change", "peer.remove"
    )
    assert added["object_id"] == "CT1"
    assert changed["detail"] == {"before_port": 104, "after_port": 105}
    assert (added["before"], removed["after"]) == (None, None)
    assert changed["after"] == removed["before"]
