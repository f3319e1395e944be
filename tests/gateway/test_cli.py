"""The command line, as a person meets it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway import cli, supervisor
from gateway.importer import ImportSummary, Rejected
from gateway.options import NoNode, address, require_node, settings_for
from gateway.reference import settings_reference
from storage.db import migrate
from storage.kernel.errors import InvalidParameter
from storage.kernel.settings import Settings, known_keys
from tests.support import postgres as postgresql

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def test_help_names_the_commands() -> None:
    shown = run("--help").output

    for command in (
        "serve", "web", "dimse", "worker", "import", "demo", "doctor", "db", "version"
    ):  # fmt: skip
        assert command in shown


def test_version_loads_nothing_that_it_does_not_need() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gateway", "version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("huying 0.")
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in loaded
    assert loaded.isdisjoint({"sqlalchemy", "fastapi", "numpy", "pydicom", "dbos"})


def test_an_error_is_a_sentence_without_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--http", "nonsense"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 1
    assert done.stderr == "huying: http: nonsense is not HOST:PORT\n"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("[::1]:0", "::1", 0),
        ("localhost:1", "localhost", 1),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert address("http", text) == {"host": host, "port": port}


@pytest.mark.parametrize("text", ["8080", ":8080", "host:", "host:http", ""])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InvalidParameter, match="HOST:PORT"):
        address("http", text)


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "huying.toml").write_text("[http]\nport = 1\nworkers = 3\n")

    settings = settings_for(tmp_path, None, http="127.0.0.1:2", aet="NODE1")

    assert (settings.http.port, settings.http.workers) == (2, 3)
    assert settings.dimse.aet == "NODE1"


def test_open_is_refused_beyond_loopback(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidParameter,
        match=r"^settings: open: refused, http.host \S+ is not a loopback address",
    ):
        settings_for(tmp_path, None, http="0.0.0.0:8080", open_access=True)


COMMANDS = (
    "user list", "user disable nobody", "token list", "peer list",
    "peer add CT1 10.0.0.1 104", "peer remove CT1", "echo CT1", "send CT1 1.2.3",
    "verify", "verify --rebuild-index", "db current", "db check", "db upgrade",
    "web", "dimse", "worker",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_a_node_is_refused_and_not_made(
    tmp_path: Path, command: str
) -> None:
    done = run(*command.split(), "--data", tmp_path / "typo")

    assert isinstance(done.exception, NoNode)
    assert str(done.exception) == f"no node in {tmp_path / 'typo'}: run huying init"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_no_node_and_stays_empty(tmp_path: Path) -> None:
    assert isinstance(run("user", "list", "--data", tmp_path).exception, NoNode)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_node_ends_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "typo")
    monkeypatch.setattr("sys.argv", ["huying", "user", "list", "--data", folder])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert ended.value.code == 2
    assert capsys.readouterr().err == f"huying: no node in {folder}: run huying init\n"


def test_another_host_needs_the_database_only(
    tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    with postgresql.empty_database(postgres) as url:
        monkeypatch.setenv("HUYING_DATABASE__URL", url)
        settings = settings_for(folder, None)

        with pytest.raises(NoNode):
            require_node(settings, folder=False)
        assert run("db", "upgrade", "--data", folder).output == f"{migrate.head()}\n"
        require_node(settings, folder=False)
        with pytest.raises(NoNode):
            require_node(settings)
        assert isinstance(run("user", "list", "--data", folder).exception, NoNode)
    assert not folder.exists()


def test_what_a_node_makes_is_not_for_others(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        data = stored(tmp_path)
    finally:
        os.umask(umask)

    assert stat.S_IMODE(data.stat().st_mode) == 0o750
    assert stat.S_IMODE((data / "index.db").stat().st_mode) == 0o640


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)

    stored(tmp_path)

    assert stat.S_IMODE(data.stat().st_mode) == 0o755


def test_db_commands(tmp_path: Path) -> None:
    migrate.upgrade(settings_for(tmp_path, None).database_url())
    assert run("db", "current", "--data", tmp_path).output == f"{migrate.head()}\n"
    assert run("db", "upgrade", "--data", tmp_path).output == f"{migrate.head()}\n"
    checked = run("db", "check", "--data", tmp_path)
    assert (checked.exit_code, checked.output) == (
        0,
        "the database and the code agree\n",
    )


def test_a_summary_lists_what_was_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    summary = ImportSummary(stored=2, n_rejected=1, n_bytes=3_000_000)
    summary.rejected.append(Rejected("a.dcm", "empty data set"))

    cli.print_summary(summary)

    out, err = capsys.readouterr()
    assert out == "stored 2, duplicate 0, skipped 0 (not DICOM), rejected 1; 3.0 MB\n"
    assert err == "  rejected a.dcm: empty data set\n"


def test_a_long_list_is_summed_up_by_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = ImportSummary()
    for n in range(60):
        summary.n_rejected += 1
        summary.rejected.append(Rejected(f"{n:02}", "empty data set"))
        summary.reasons["empty data set"] += 1

    cli.print_summary(summary)

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == cli.LISTED + 2
    assert lines[-1].split() == ["60", "empty", "data", "set"]


def test_what_to_try_uses_reachable_addresses() -> None:
    settings = Settings.model_validate({"http": {"host": "0.0.0.0", "port": 81}})  # noqa: S104

    lines = cli.try_it(settings, Path("/a b/1.dcm"))

    assert "  storescu -aec HUYING 127.0.0.1 11112 '/a b/1.dcm'" in lines
    assert "  curl 'http://127.0.0.1:81/dicom-web/studies?limit=5'" in lines


def test_the_settings_page_is_current() -> None:
    """Write it anew with: huying doctor --settings > docs/reference/settings.md"""
    page = ROOT / "docs" / "reference" / "settings.md"

    assert page.read_text("utf-8") == settings_reference()


def test_the_settings_page_names_every_setting_with_its_meaning() -> None:
    page = settings_reference()

    for key in known_keys():
        assert f"| `{key}` |" in page
    assert "|  |" not in page


def test_doctor_prints_the_settings_page() -> None:
    assert run("doctor", "--settings").output == settings_reference()


def test_doctor_says_which_setting_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "huying.toml").write_text("[http]\nprot = 1\n[pacs]\ndecoders = 0\n")

    result = run("doctor", "--data", tmp_path)

    assert result.exit_code == 1
    assert "http.prot is not a setting, did you mean http.port?" in result.output
    assert "pacs.decoders: " in result.output


def stored(tmp_path: Path) -> Path:
    """Return a data folder with two stored slices, no node running."""
    from tests.support.datasets import ct_slice, part10

    files = tmp_path / "files"
    files.mkdir()
    for number in (1, 2):
        (files / f"{number}.dcm").write_bytes(part10(ct_slice(number=number)))
    assert run("import", files, "--data", tmp_path / "data").exit_code == 0
    return tmp_path / "data"


def test_verify_says_that_everything_agrees(tmp_path: Path) -> None:
    done = run("verify", "--data", stored(tmp_path))

    assert done.exit_code == 0
    assert "2 instances" in done.output
    assert "agree" in done.output


def test_verify_names_a_flipped_bit(tmp_path: Path) -> None:
    data = stored(tmp_path)
    pack = next(data.rglob("*.pack"))
    raw = bytearray(pack.read_bytes())
    raw[len(raw) // 2] ^= 1
    pack.write_bytes(raw)

    done = run("verify", "--data", data)

    assert done.exit_code == 1
    assert pack.stem in done.output


def test_the_index_comes_back_from_packs_alone(tmp_path: Path) -> None:
    data = stored(tmp_path)
    for left in data.glob("index.db*"):
        left.unlink()

    done = run("verify", "--rebuild-index", "--data", data)

    assert done.exit_code == 0
    assert "2 instances indexed" in done.output
    assert run("verify", "--data", data).exit_code == 0


def test_an_index_is_not_rebuilt_under_a_running_node(tmp_path: Path) -> None:
    data = stored(tmp_path)
    with supervisor.data_lock(data):
        done = run("verify", "--rebuild-index", "--data", data)

    assert done.exit_code == 1
    assert "another Huying" in str(done.exception)
