"""``huying echo``, ``send`` and ``peer`` against real listeners."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from pydicom.uid import ExplicitVRBigEndian
from typer.testing import CliRunner, Result

from gateway import sending
from gateway.dicom_cli import add_commands
from storage.kernel.errors import Conflict, DependencyDown, InvalidParameter, NotFound
from tests.support.archive import Archive, archive
from tests.support.datasets import a_study, ct_slice, dataset_bytes, part10
from tests.support.dicom_peers import PyScp
from tests.support.ports import free_port

Run = Callable[..., Result]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Archive]:
    with archive(tmp_path / "node") as made:
        yield made


@pytest.fixture
def huying(node: Archive) -> Run:
    """Run a command on the node's data folder."""
    app, peers = typer.Typer(), typer.Typer()
    add_commands(app, peers)
    app.add_typer(peers, name="peer")
    data = str(node.node.settings.data)

    def run(*arguments: object, ok: bool = True) -> Result:
        done = CliRunner().invoke(app, [*map(str, arguments), "--data", data])
        if ok and done.exception is not None:
            raise done.exception
        return done

    return run


def test_peers_are_added_listed_and_removed(huying: Run, node: Archive) -> None:
    huying("peer", "add", "CT1", "10.0.0.7", 104, "--may", "store commit", "--forward")

    listed = huying("peer", "list").output

    assert listed.split() == [
        "CT1", "10.0.0.7:104", "may", "commit", "store", "forward",
    ]  # fmt: skip
    huying("peer", "remove", "CT1")
    assert huying("peer", "list").output == ""
    with pytest.raises(NotFound):
        huying("peer", "remove", "CT1")


def test_a_peer_that_cannot_be_is_refused(huying: Run) -> None:
    with pytest.raises(InvalidParameter, match="title"):
        huying("peer", "add", "SEVENTEEN-LETTERS", "host", 104)
    with pytest.raises(InvalidParameter, match="may"):
        huying("peer", "add", "CT1", "host", 104, "--may", "everything")
    with pytest.raises(InvalidParameter, match="forward"):
        huying("peer", "add", "CT1", "--forward")


def test_echo_says_how_fast_or_where_it_fails(huying: Run, node: Archive) -> None:
    with node.listening() as port:
        output = huying("echo", "127.0.0.1", port, "--aet", node.aet).output

        assert f"{node.aet} at 127.0.0.1:{port} answers" in output
        with pytest.raises(DependencyDown, match="called AE title not recognized"):
            huying("echo", "127.0.0.1", port, "--aet", "OTHER")
    with pytest.raises(DependencyDown, match=r"TCP: Connection refused"):
        huying("echo", "127.0.0.1", free_port())
    with pytest.raises(DependencyDown, match="name resolution"):
        huying("echo", "no.such.host.invalid", 104)
    with pytest.raises(NotFound, match="no peer called NOBODY"):
        huying("echo", "NOBODY")


def test_files_and_stored_studies_are_sent(
    huying: Run, node: Archive, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    made = a_study(seed=1, n_instances=3)
    for number, ds in enumerate(made):
        (folder / f"{number}.dcm").write_bytes(part10(ds))
    (folder / "note.txt").write_text("not an image")
    node.store_all(a_study(seed=2, n_instances=2))
    with PyScp().running() as scp:
        huying("peer", "add", scp.title, "127.0.0.1", scp.port)

        done = huying("send", scp.title, folder, ct_slice(seed=2).StudyInstanceUID)

    assert "sent 5" in done.output
    assert "skipped" in done.output
    assert [one.dataset for one in scp.received[:3]] == [
        dataset_bytes(part10(ds)) for ds in made
    ]
    assert scp.associations == 2


def test_a_file_is_converted_where_the_peer_needs_it(
    huying: Run, tmp_path: Path
) -> None:
    path = tmp_path / "big.dcm"
    path.write_bytes(part10(ct_slice(), ExplicitVRBigEndian))
    with PyScp(syntaxes=["1.2.840.10008.1.2"]).running() as scp:
        huying("peer", "add", scp.title, "127.0.0.1", scp.port)

        huying("send", scp.title, path)

    [received] = scp.received
    assert received.transfer_syntax_uid == "1.2.840.10008.1.2"


def test_what_is_refused_is_listed_and_ends_with_one(
    huying: Run, node: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "PAUSE_SECONDS", 0.0)
    uids = node.store_all(a_study(n_instances=4))
    # Final, with a note, short of something (and taken the second time), taken.
    answers = [0xA900, 0xB000, 0xA700, 0x0000, 0x0000]
    with PyScp(status=answers.__getitem__).running() as scp:
        huying("peer", "add", scp.title, "127.0.0.1", scp.port)

        done = huying(
            "send", scp.title, ct_slice().StudyInstanceUID, "--verbose", ok=False
        )

    assert done.exit_code == 1
    assert "sent 3, of these with a note 1; failed 1" in done.output
    assert f"failed {uids[0]}: status A900" in done.output
    assert [one.instance_uid for one in scp.received] == [*uids, uids[2]]


def test_a_peer_of_the_settings_file_is_not_changed(tmp_path: Path) -> None:
    peers = [{"title": "FIXED", "host": "10.0.0.8", "port": 104}]
    with archive(tmp_path / "node", dimse={"peers": peers}) as node:
        assert node.node.peers.find("FIXED") is not None
        with pytest.raises(Conflict, match="settings file"):
            node.add_peer("FIXED", 105)
