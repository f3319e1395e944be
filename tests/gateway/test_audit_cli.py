"""``huying audit``, as the person at the machine meets it."""

from __future__ import annotations

import getpass
import os
import stat
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from gateway import cli
from gateway.console import operator
from gateway.options import NoNode
from storage.audit import AuditEvent, AuditTrail, Outcome
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.errors import Conflict, ImagingError, InvalidParameter
from storage.kernel.settings import Settings
from tests.support.auditing import attacking, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a data folder with an audit of five logins and a refusal."""
    folder = tmp_path / "data"
    url = Settings(data=folder).database_url()
    migrate.upgrade(url)
    database = Database(url)
    trail = AuditTrail(database, SystemClock(), folder / "audit")
    write(trail, 5)
    trail.record_now(
        AuditEvent(
            action="get",
            actor="eve\n",
            outcome=Outcome.DENY,
            reason="other tenant",
            study_uid="1.2.3",
        )
    )
    trail.close()
    database.close()
    return folder


def run(data: Path, *arguments: object) -> Result:
    return CliRunner().invoke(
        cli.app, ["audit", *(str(one) for one in arguments), "--data", str(data)]
    )


def attack(data: Path, statement: str) -> None:
    database = Database(Settings(data=data).database_url())
    with attacking(database) as connection:
        connection.execute(text(statement))
    database.close()


class TestVerify:
    def test_a_whole_chain_ends_with_0_and_is_recorded(self, data: Path) -> None:
        done = run(data, "verify")

        assert done.exit_code == 0, done.output
        assert "access: 6 records" in done.output
        assert "the chain is whole" in done.output
        assert run(data, "search", "--action", "audit.verify").output.count("\n") == 2

    def test_a_damage_ends_with_1_and_names_the_record(self, data: Path) -> None:
        attack(data, "UPDATE audit_record SET actor = 'x' WHERE sequence IN (3, 5)")

        done = run(data, "verify")

        assert done.exit_code == 1
        assert "first record 3: altered" in done.output
        assert "record 5: altered" in done.output

    def test_it_works_when_nothing_can_be_recorded_any_more(self, data: Path) -> None:
        attack(data, "UPDATE audit_stream SET sequence = 2")

        done = run(data, "verify")

        assert done.exit_code == 1
        assert "was not recorded" in done.output
        assert "head" in done.output

    def test_a_hash_noted_elsewhere_is_compared(self, data: Path) -> None:
        noted = run(data, "verify").output.rsplit(maxsplit=1)[-1]

        assert run(data, "verify", "--noted", noted).exit_code == 0
        other = f"6:{'0' * 64}"
        done = run(data, "verify", "--noted", other)
        assert done.exit_code == 1
        assert "record 6: rolled_back" in done.output

    @pytest.mark.parametrize("noted", ["", "6", "6:", "x:" + "0" * 64, "6:" + "0" * 63])
    def test_what_was_not_noted_so_is_refused(self, data: Path, noted: str) -> None:
        done = run(data, "verify", "--noted", noted)

        assert isinstance(done.exception, InvalidParameter)

    def test_an_index_that_is_not_up_to_date_is_told(self, tmp_path: Path) -> None:
        url = Settings(data=tmp_path).database_url()
        migrate.upgrade(url)
        migrate.downgrade(url, "-1")

        done = run(tmp_path, "verify")

        assert isinstance(done.exception, ImagingError)
        assert "db upgrade" in str(done.exception)

    @pytest.mark.parametrize("command", ["verify", "search", "export", "accept"])
    def test_a_folder_without_a_node_is_not_found_whole(
        self, tmp_path: Path, command: str
    ) -> None:
        options = ("--reason", "none") if command == "accept" else ()
        for folder in (tmp_path, tmp_path / "typo"):
            done = run(folder, command, *options)

            assert isinstance(done.exception, NoNode), done.output
            assert "run huying init" in str(done.exception)
        assert list(tmp_path.iterdir()) == []

    def test_what_an_attacker_named_does_not_reach_the_terminal(
        self, data: Path
    ) -> None:
        attack(
            data,
            "UPDATE audit_record SET key_id = char(27) || '[2J' || char(10),"
            " stream = CASE WHEN sequence = 2 THEN '../' || char(27) ELSE stream END",
        )

        done = run(data, "verify")

        assert done.exit_code == 1
        assert "\x1b" not in done.output


class TestVerifyExport:
    @pytest.fixture
    def export(self, data: Path, tmp_path: Path) -> Path:
        path = tmp_path / "audit.jsonl"
        assert run(data, "export", "--output", path).exit_code == 0
        return path

    def verify(self, data: Path, path: Path, *options: object) -> Result:
        return run(data, "verify", "--export", path, *options)

    def test_a_whole_one_is_clean(self, data: Path, export: Path) -> None:
        done = self.verify(data, export)

        assert done.exit_code == 0, done.output
        assert "export: 7 records" in done.output

    def test_it_needs_the_key_and_no_node(
        self, data: Path, export: Path, tmp_path: Path
    ) -> None:
        elsewhere = tmp_path / "elsewhere"

        done = self.verify(elsewhere, export)
        assert done.exit_code == 1
        assert "record 1: unknown" in done.output

        key = data / "audit" / "audit.key"
        done = self.verify(elsewhere, export, "--key", key)
        assert done.exit_code == 0, done.output
        assert not elsewhere.exists()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda lines: lines[:2] + lines[3:], "record 3: missing"),
            (lambda lines: [lines[1], lines[0], *lines[2:]], "record 1: extra"),
            (
                lambda lines: [line.replace(b"user-4", b"user-5") for line in lines],
                "record 4: altered",
            ),
        ],
        ids=["deleted", "swapped", "changed"],
    )
    def test_a_changed_one_is_told(
        self,
        data: Path,
        export: Path,
        change: Callable[[list[bytes]], list[bytes]],
        said: str,
    ) -> None:
        lines = export.read_bytes().splitlines(keepends=True)
        export.write_bytes(b"".join(change(lines)))

        done = self.verify(data, export)

        assert done.exit_code == 1
        assert f"first {said}" in done.output

    def test_a_shortened_one_is_known_by_a_noted_hash(
        self, data: Path, export: Path
    ) -> None:
        lines = export.read_bytes().splitlines(keepends=True)
        last = orjson.loads(lines[-1])
        noted = f"{last['sequence']}:{last['hash']}"
        export.write_bytes(b"".join(lines[:-2]))

        assert self.verify(data, export).exit_code == 0
        done = self.verify(data, export, "--noted", noted)
        assert done.exit_code == 1
        assert "record 6: rolled_back" in done.output

    def test_a_part_is_clean_but_for_the_contents_of_its_first(
        self, data: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "part.jsonl"
        run(data, "export", "--output", path, "--first", 3, "--last", 5)

        done = self.verify(data, path)

        assert done.exit_code == 0, done.output
        assert "3 records" in done.output

    @pytest.mark.parametrize(
        "line", [b"{}", b"[]", b"no", b"\xff", b'{"sequence":"x"}', b"{" * 99_999]
    )
    def test_what_is_no_export_is_told(
        self, data: Path, export: Path, line: bytes
    ) -> None:
        export.write_bytes(export.read_bytes() + line + b"\n")

        done = self.verify(data, export)

        assert isinstance(done.exception, InvalidParameter)
        assert "line 8" in str(done.exception)


class TestSearch:
    def test_lines_are_one_for_each_record(self, data: Path) -> None:
        done = run(data, "search", "--outcome", "deny")

        assert done.exit_code == 0
        heading, line = done.output.splitlines()
        assert heading.split()[:5] == [
            "sequence", "time", "outcome", "actor", "action",
        ]  # fmt: skip
        for name, value in (
            ("outcome", "deny"),
            ("actor", "eve␊"),
            ("object", "1.2.3"),
        ):
            assert line[heading.index(name) :].startswith(value)
        assert "1.2.3" in line
        assert line.endswith("(other tenant)")

    def test_json_lines_are_records(self, data: Path) -> None:
        done = run(data, "search", "--json", "--actor", "user-3")

        (line,) = done.output.splitlines()
        assert orjson.loads(line)["sequence"] == 3

    def test_the_newest_come_first_up_to_the_limit(self, data: Path) -> None:
        done = run(data, "search", "--json", "--limit", 2, "--action", "login")

        found = [orjson.loads(line)["sequence"] for line in done.output.splitlines()]
        assert found == [5, 4]

    def test_what_somebody_wrote_behind_our_back_does_not_reach_the_terminal(
        self, data: Path
    ) -> None:
        attack(data, "UPDATE audit_record SET reason = char(27) || '[2J' || char(10)")

        done = run(data, "search")

        assert "\x1b" not in done.output
        assert len(done.output.splitlines()) == 8

    @pytest.mark.parametrize(
        "options",
        [
            ("--outcome", "maybe"),
            ("--since", "soon"),
            ("--until", "2026-1"),
            ("--action", "reed"),
        ],
    )
    def test_what_cannot_be_asked_is_told(
        self, data: Path, options: tuple[str, str]
    ) -> None:
        assert isinstance(run(data, "search", *options).exception, InvalidParameter)

    def test_an_unknown_action_is_told_with_those_that_are_known(
        self, data: Path
    ) -> None:
        told = str(run(data, "search", "--action", "reed").exception)

        assert told.startswith("action: reed is none of account.add, ")
        assert ", get, " in told
        assert "peer.change" in told

    def test_who_reads_is_named_as_by_other_commands(self, data: Path) -> None:
        run(data, "verify")
        run(data, "search")
        run(data, "export", "--output", data / "audit.jsonl")
        run(data, "accept", "--reason", "nothing")

        shown = run(data, "search", "--json", "--actor", operator().name).output

        found = [orjson.loads(line) for line in shown.splitlines()]
        assert operator().name == f"cli:{getpass.getuser()}"
        assert {one["action"] for one in found} == {
            "audit.verify", "audit.search", "audit.export",
        }  # fmt: skip
        assert {one["door"] for one in found} == {"cli"}


class TestExport:
    def test_all_is_written_and_the_export_recorded(
        self, data: Path, tmp_path: Path
    ) -> None:
        done = run(data, "export", "--output", tmp_path / "audit.jsonl")

        assert done.exit_code == 0, done.output
        lines = (tmp_path / "audit.jsonl").read_bytes().splitlines()
        found = [orjson.loads(line) for line in lines]
        assert [one["sequence"] for one in found] == list(range(1, 8))
        assert found[-1]["action"] == "audit.export"

    def test_a_file_that_is_there_is_not_overwritten(
        self, data: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "audit.jsonl"
        path.write_text("mine", "utf-8")

        done = run(data, "export", "--output", path)

        assert isinstance(done.exception, Conflict)
        assert path.read_text("utf-8") == "mine"

    def test_a_file_of_patient_data_is_its_owners(
        self, data: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "audit.jsonl"
        before = os.umask(0)
        try:
            run(data, "export", "--output", path)
        finally:
            os.umask(before)

        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_to_the_terminal_it_is_lines(self, data: Path) -> None:
        done = run(data, "export", "--first", 2, "--last", 3)

        found = [orjson.loads(line)["sequence"] for line in done.output.splitlines()]
        assert found == [2, 3]


class TestAccept:
    def test_a_whole_chain_has_nothing_to_accept(self, data: Path) -> None:
        done = run(data, "accept", "--reason", "none")

        assert done.exit_code == 0
        assert "the chain is whole" in done.output

    def test_what_is_accepted_is_listed_and_told_no_more(self, data: Path) -> None:
        attack(data, "UPDATE audit_record SET actor = 'x' WHERE sequence = 3")

        done = run(data, "accept", "--reason", "the disk of tuesday")

        assert done.exit_code == 0, done.output
        after = run(data, "verify")
        assert after.exit_code == 0, after.output
        assert "accepted before: record 3: altered" in after.output
        shown = run(data, "search", "--action", "audit.accept").output
        assert "the disk of tuesday" in shown

    def test_a_reason_is_needed(self, data: Path) -> None:
        done = run(data, "accept", "--reason", " ")

        assert isinstance(done.exception, InvalidParameter)
