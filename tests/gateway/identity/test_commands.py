"""``huying init``, ``user`` and ``token``, as an operator types them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from gateway import cli
from gateway.identity.recording import Origin
from gateway.options import opened
from storage.db import migrate
from storage.kernel.errors import Conflict, InvalidParameter, NotFound
from storage.kernel.settings import Settings
from tests.support.accounts import CHEAP

ENVIRONMENT = {
    "HUYING_IDENTITY__HASH_MEMORY_KIB": "8",
    "HUYING_IDENTITY__HASH_PASSES": "1",
    "COLUMNS": "300",
}


class Shell:
    """Runs our commands on one data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str) -> str:
        result = CliRunner().invoke(
            cli.app, [*words, "--data", str(self.folder)], env=ENVIRONMENT
        )
        if result.exception is not None and not isinstance(
            result.exception, SystemExit
        ):
            raise result.exception
        return result.output

    def log_in(self, name: str, password: str) -> tuple[str, ...]:
        """Log in; return what has to be done first."""
        with opened(Settings(data=self.folder, identity=CHEAP)) as node:
            login = node.identity.logins.log_in(name, password, "", Origin("::1"))[1]
            return login.must

    def rows(self, sql: str) -> list[tuple[object, ...]]:
        with (
            opened(Settings(data=self.folder, identity=CHEAP)) as node,
            node.database.read() as connection,
        ):
            return [tuple(row) for row in connection.execute(text(sql))]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Return what runs commands on a node without accounts."""
    folder = tmp_path / "data"
    migrate.upgrade(Settings(data=folder).database_url())
    return Shell(folder)


def password_in(output: str) -> str:
    found = re.search(r"^password +(\S+)$", output, re.MULTILINE)
    assert found is not None, output
    return found[1]


def test_the_first_start_makes_an_administrator_once(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "data")
    output = shell("init")
    password = password_in(output)

    assert "admin" in output
    assert shell.log_in("admin", password) == ("password", "second_factor")
    with pytest.raises(Conflict, match="there are accounts already"):
        shell("init", "--admin", "other")
    assert shell.rows("SELECT name, roles FROM account") == [
        ("admin", "administrator archive_manager")
    ]
    # It is nowhere but on the operator's screen.
    assert password not in str(shell.rows("SELECT * FROM account"))
    assert password not in str(shell.rows("SELECT * FROM audit_record"))


@pytest.mark.parametrize(
    ("words", "settings", "shown"),
    [
        ([], "", "http://127.0.0.1:8080/"),
        ([], "host = '10.1.2.3'\nport = 8042", "http://10.1.2.3:8042/"),
        ([], "host = '0.0.0.0'\nport = 81", "http://127.0.0.1:81/"),
        ([], "host = '::'", "http://[::1]:8080/"),
        ([], "external_url = 'https://pacs.example/'", "https://pacs.example/"),
        (["--http", "10.1.2.3:99"], "port = 8042", "http://10.1.2.3:99/"),
    ],
)
def test_the_first_start_says_where_to_go_and_what_the_account_is_for(
    tmp_path: Path, words: list[str], settings: str, shown: str
) -> None:
    config = tmp_path / "huying.toml"
    config.write_text(f"[http]\n{settings}\n")

    output = Shell(tmp_path / "data")("init", *words, "--config", str(config))

    assert f" {shown} " in output
    assert "administrator and archive_manager" in output
    assert "huying user add" in output


def test_no_two_nodes_have_the_same_first_password(tmp_path: Path) -> None:
    made = {password_in(Shell(tmp_path / str(n))("init")) for n in range(3)}

    assert len(made) == 3


def test_accounts_are_added_listed_changed_and_disabled(shell: Shell) -> None:
    password = password_in(
        shell("user", "add", "Wang", "--role", "radiologist", "--reads", "other")
    )
    assert shell.log_in("wang", password) == ("password",)
    assert re.search(r"^wang +default +radiologist +reads other", shell("user", "list"))

    shell("user", "roles", "wang", "--role", "clinician", "--role", "reviewer")
    again = password_in(shell("user", "reset-password", "wang"))
    assert "clinician reviewer" in shell("user", "list")
    assert shell.log_in("wang", again) == ("password",)

    shell("user", "disable", "wang")
    assert "disabled" in shell("user", "list")
    shell("user", "enable", "wang")
    assert "no second factor" in shell("user", "totp", "wang", "--reset")
    assert shell.log_in("wang", again) == ("password",)
    actions = [str(row[0]) for row in shell.rows("SELECT action FROM audit_record")]
    assert [one for one in actions if one.startswith("account.")] == [
        "account.add", "account.roles", "account.reset", "account.disable",
        "account.enable", "account.totp_reset",
    ]  # fmt: skip
    assert all(
        str(row[0]).startswith("cli:")
        for row in shell.rows("SELECT actor FROM audit_record WHERE door = 'cli'")
    )


def test_a_patient_is_named_as_hl7_names_one(shell: Shell) -> None:
    shell("user", "add", "p1", "--role", "patient", "--patient", "P1^^^H1")

    assert shell.rows("SELECT patients FROM account") == [('[["default","H1","P1"]]',)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "--role", "king"], "no such role"),
        (["x", "--role", "administrator", "--role", "auditor"], "not in one hand"),
        (["x", "--role", "patient", "--role", "clinician"], "no other role"),
        (["x", "--role", "patient"], "patients"),
        (["x", "--role", "clinician", "--patient", "P1"], "patients"),
        (["x", "--role", "patient", "--patient", "P1^H1"], "ID\\^\\^\\^ISSUER"),
        (["x y", "--role", "clinician"], "name"),
        (["管理员", "--role", "clinician"], "name"),
        (["../x", "--role", "clinician"], "name"),
        (["x", "--role", "clinician", "--tenant", "a/b"], "tenant"),
        (["x", "--role", "clinician", "--display-name", "a\x1b[2Jb"], "display_name"),
    ],
)
def test_accounts_that_cannot_be_are_refused(
    shell: Shell, words: list[str], said: str
) -> None:
    with pytest.raises(InvalidParameter, match=said):
        shell("user", "add", *words)

    assert shell.rows("SELECT * FROM account") == []


def test_names_are_taken_once(shell: Shell) -> None:
    shell("user", "add", "wang", "--role", "clinician")

    with pytest.raises(Conflict):
        shell("user", "add", "WANG", "--role", "radiologist")
    with pytest.raises(NotFound):
        shell("user", "disable", "nobody")


def test_tokens_are_shown_once_and_revoked(shell: Shell) -> None:
    token = shell("token", "add", "his", "--role", "clinician", "--days", "30").strip()
    assert token.startswith("hyt_")
    assert len(token) > 40
    assert token not in str(shell.rows("SELECT * FROM api_token"))
    assert "clinician  until" in shell("token", "list")

    shell("token", "revoke", "his")

    assert "revoked" in shell("token", "list")
    with pytest.raises(Conflict):
        shell("token", "add", "his", "--role", "clinician")
    for role in ("patient", "security_administrator"):
        with pytest.raises(InvalidParameter, match="not for a machine"):
            shell("token", "add", "x", "--role", role)
    with pytest.raises(InvalidParameter, match="days"):
        shell("token", "add", "x", "--role", "device", "--days", "4000")
