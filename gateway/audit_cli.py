"""``huying audit``: verify, search and export the audit, and go on after a damage.

`gateway.cli` registers these commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.options import Config, Data, require_node, settings_for
from storage.kernel.errors import Conflict, InvalidParameter, Unavailable

if TYPE_CHECKING:
    from storage.audit import AuditEvent, AuditTrail
    from storage.audit.event import Detail
    from storage.audit.findings import Verification
    from storage.db.engine import Database

#: Columns of `search` on a terminal: what stands in each, and how wide it is.
_COLUMNS = (
    ("sequence", 9), ("time", 27), ("outcome", 7), ("actor", 20), ("action", 14),
    ("count", 5), ("source", 15),
)  # fmt: skip
_OBJECT = ("object_kind", "patient_id", "study_uid", "series_uid", "object_id")
#: Bytes of a line of an export, at most.
_LINE = 1 << 20
#: Characters of the hash that is noted for `--noted`, at least.
_HASH_CHARS = 64


audit_app = typer.Typer(help="Who did what.", no_args_is_help=True)


@dataclass(frozen=True, slots=True)
class _Opened:
    """The audit of a data folder, without the rest of a node."""

    database: Database
    folder: Path
    trail: AuditTrail

    def note(self, action: str, detail: Detail) -> None:
        """Record that somebody on this machine has read or verified the audit."""
        self.trail.record_now(_event(action, detail=detail))


def _event(action: str, **fields: Any) -> AuditEvent:
    """Return the event of whoever runs the command."""
    from gateway.console import command_event

    return command_event(action, object_kind="audit records", **fields)


@contextmanager
def _opened(data: Path | None, config: Path | None) -> Iterator[_Opened]:
    from storage.audit import AuditTrail
    from storage.audit.trail import FOLDER
    from storage.db import migrate
    from storage.db.engine import Database
    from storage.kernel.clock import SystemClock

    settings = settings_for(data, config)
    require_node(settings)
    migrate.require_current(settings.database_url())
    database = Database(settings.database_url())
    folder = settings.data / FOLDER
    trail = AuditTrail(database, SystemClock(), folder, limits=settings.limits)
    try:
        yield _Opened(database, folder, trail)
    finally:
        trail.close()
        database.close()


@audit_app.command()
def verify(
    *,
    key: Annotated[
        list[Path] | None,
        typer.Option(help="Key of another host that writes here.", metavar="FILE"),
    ] = None,
    noted: Annotated[
        list[str] | None,
        typer.Option(help="A hash that was noted elsewhere.", metavar="SEQUENCE:HASH"),
    ] = None,
    export_file: Annotated[
        Path | None,
        typer.Option("--export", help="An export, instead of all.", metavar="FILE"),
    ] = None,
    data: Data = None,
    config: Config = None,
) -> None:
    """Check the chain of the audit, and name the first record that is not right."""
    from storage.audit.keys import Memory, keyring, load_key
    from storage.audit.trail import FOLDER, STREAM
    from storage.audit.verify import ChainVerifier

    known = dict(_noted(one) for one in noted or ())
    if export_file is not None:
        folder = settings_for(data, config).data / FOLDER
        _verify_export(export_file, folder, key or (), known)
        return
    with _opened(data, config) as audit:
        keys = [*keyring(audit.folder), *(load_key(path) for path in key or ())]
        verifier = ChainVerifier(audit.database, keys)
        damaged = 0
        for stream in sorted({STREAM, *verifier.streams()}):
            with _progress() as progress:
                done = verifier.verify(
                    stream,
                    memory=Memory(audit.folder, stream, keys[0])
                    if stream == STREAM
                    else None,
                    noted=known if stream == STREAM else None,
                    progress=progress,
                )
            _tell(done)
            damaged += done.n_findings
            try:
                audit.note("audit.verify", _outcome(done))
            except Unavailable as error:
                typer.echo(f"this verification was not recorded: {error}", err=True)
    if damaged:
        raise typer.Exit(1)


def _verify_export(
    path: Path, folder: Path, more: Sequence[Path], noted: Mapping[int, bytes]
) -> None:
    """Check a file, with the keys that are here; there need be no node."""
    from storage.audit.keys import KEY_FILE, keyring, load_key
    from storage.audit.verify import verify_export

    own = [*keyring(folder)] if (folder / KEY_FILE).exists() else []
    keys = [*own, *(load_key(one) for one in more)]
    try:
        with path.open("rb") as file:
            done = verify_export(iter(partial(file.readline, _LINE), b""), keys, noted)
    except OSError as error:
        raise InvalidParameter("export", f"{path}: {error.strerror}") from error
    _tell(done)
    if not done.is_clean:
        raise typer.Exit(1)


def _noted(text: str) -> tuple[int, bytes]:
    sequence, colon, digest = text.partition(":")
    try:
        if not colon or len(digest) != _HASH_CHARS:
            raise ValueError
        return int(sequence), bytes.fromhex(digest)
    except ValueError as error:
        raise InvalidParameter("noted", f"{text} is not SEQUENCE:HASH") from error


def _tell(done: Verification) -> None:
    from storage.audit.event import clean

    typer.echo(f"{clean(done.stream, 32)}: {done.records} records")
    for finding in done.accepted:
        typer.echo(f"  accepted before: {finding}")
    if done.is_clean:
        typer.echo(f"the chain is whole; note its end elsewhere: {_last(done)}")
        return
    first = done.first
    typer.echo(f"NOT the chain that was written; first {first}", err=True)
    for finding in done.findings:
        if finding != first:
            typer.echo(f"  {finding}", err=True)
    if done.n_findings > len(done.findings):
        typer.echo(f"  and {done.n_findings - len(done.findings)} more", err=True)
    if done.unchecked:
        typer.echo(
            f"  {done.unchecked} signed records could not be checked, because the one"
            " before is damaged",
            err=True,
        )


def _outcome(done: Verification) -> Detail:
    detail: dict[str, Any] = {
        "stream": done.stream,
        "records": done.records,
        "last": _last(done),
        "findings": done.n_findings,
    }
    if done.first is not None:
        detail["first"] = str(done.first)
    return detail


def _last(done: Verification) -> str:
    return f"{done.sequence}:{done.hash.hex()}"


@audit_app.command()
def accept(
    *,
    reason: Annotated[str, typer.Option(help="What has happened; it is recorded.")],
    data: Data = None,
    config: Config = None,
) -> None:
    """Let the audit go on after a damage, or after a backup was put back.

    The damages stay, and `verify` lists them as accepted; new ones are told again.
    """
    from storage.audit.accept import accept as accept_findings
    from storage.audit.keys import Memory, keyring
    from storage.audit.trail import STREAM
    from storage.audit.verify import ChainVerifier
    from storage.kernel.clock import SystemClock

    if not reason.strip():
        raise InvalidParameter("reason", "is empty")
    with _opened(data, config) as audit:
        keys = keyring(audit.folder)
        memory = Memory(audit.folder, STREAM, keys.own)
        with _progress() as progress:
            found = ChainVerifier(audit.database, [*keys]).verify(
                STREAM, memory=memory, progress=progress
            )
        _tell(found)
        if found.is_clean:
            return
        head = accept_findings(
            audit.database,
            memory,
            keys,
            found,
            _event("audit.accept", reason=reason),
            SystemClock().now_us(),
        )
    typer.echo(f"accepted; the audit goes on with record {head.sequence + 1}")


@audit_app.command()
def search(
    *,
    actor: Annotated[str, typer.Option(help="Account, AE title or service.")] = "",
    patient: Annotated[str, typer.Option(help="Patient ID.")] = "",
    study: Annotated[str, typer.Option(help="Study Instance UID.")] = "",
    action: Annotated[str, typer.Option(help="What was asked for.")] = "",
    outcome: Annotated[str, typer.Option(help="allow, deny or error.")] = "",
    since: Annotated[str, typer.Option(help="Date or time, in UTC.")] = "",
    until: Annotated[str, typer.Option(help="Date or time, in UTC.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Records at most.")] = 100,
    json_lines: Annotated[
        bool, typer.Option("--json", help="One JSON object a line.")
    ] = False,
    data: Data = None,
    config: Config = None,
) -> None:
    """List records that match all that is given, newest first.

    A line has what the heading says, then what the access was done to: its kind, and
    what is known of patient, study, series and name.
    """
    import orjson

    from gateway.audit import PatientStudies, query_of
    from storage.audit import Outcome
    from storage.audit.search import AuditReader, as_json

    if outcome and outcome not in set(Outcome):
        raise InvalidParameter("outcome", f"{outcome} is none of {', '.join(Outcome)}")
    wanted = Outcome(outcome) if outcome else None
    query = query_of(actor, patient, study, action, wanted, since, until)
    with _opened(data, config) as audit:
        audit.note("audit.search", query.described())
        studies = PatientStudies(audit.database).of_patient(None, patient)
        query = replace(query, studies=studies)
        reader, cursor, left = AuditReader(audit.database), None, limit
        if not json_lines:
            typer.echo(_heading())
        while left > 0:
            page = reader.search(None, query, left, cursor)
            for row in page.records:
                record = as_json(row)
                if json_lines:
                    typer.echo(orjson.dumps(record).decode())
                else:
                    typer.echo(_line(record))
            left -= len(page.records)
            cursor = page.next
            if cursor is None:
                break


def _heading() -> str:
    cells = [f"{name:<{width}}" for name, width in _COLUMNS]
    return " ".join([*cells, "object and (reason)"])


def _line(record: dict[str, Any]) -> str:
    cells = [f"{record[name]!s:<{width}}" for name, width in _COLUMNS]
    cells += [str(record[name]) for name in _OBJECT if record[name]]
    if record["reason"]:
        cells.append(f"({record['reason']})")
    line = " ".join(cells)
    # What somebody wrote into the table behind our back may hold anything.
    return line if line.isprintable() else line.encode("unicode_escape").decode()


@audit_app.command()
def export(
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="A new file; else the terminal.", metavar="FILE"),
    ] = None,
    first: Annotated[int, typer.Option(min=1, help="First sequence number.")] = 1,
    last: Annotated[int | None, typer.Option(help="Last sequence number.")] = None,
    data: Data = None,
    config: Config = None,
) -> None:
    """Write records as lines of JSON, with all that their hashes are taken over."""
    from storage.audit.search import AuditReader, as_line

    with _opened(data, config) as audit:
        audit.note("audit.export", {"first": first, "last": last})
        rows = AuditReader(audit.database).export(first, last)
        if output is None:
            for row in rows:
                sys.stdout.buffer.write(as_line(row))
            return
        count = 0
        try:
            with open(output, "xb", opener=_private) as file:
                for row in rows:
                    file.write(as_line(row))
                    count += 1
        except FileExistsError as error:
            raise Conflict(f"{output} exists already") from error
        except OSError as error:
            raise InvalidParameter("output", f"{output}: {error.strerror}") from error
    typer.echo(f"{count} records written to {output}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show records done of records in all, on a terminal."""
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("verifying", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
