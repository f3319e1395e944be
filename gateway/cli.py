"""The command ``huying``.

Commands import what they need when they run: ``huying version`` should not wait for
codecs. An error of ours ends a command with its sentence and status 1.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.audit_cli import audit_app
from gateway.dicom_cli import add_commands as add_dicom_commands
from gateway.identity.commands import add_commands as add_identity_commands
from gateway.options import (
    Aet,
    Config,
    Data,
    Dimse,
    Http,
    NoNode,
    Open,
    opened,
    require_node,
    settings_for,
)
from storage.kernel.errors import Conflict, ImagingError, InvalidParameter
from storage.kernel.settings import Settings

if TYPE_CHECKING:
    from gateway.app import Node
    from gateway.importer import ImportSummary
    from gateway.supervisor import Kind
    from pacs.services.recovery import Finding

app = typer.Typer(
    name="huying",
    help="Huying (互影): an imaging archive and its services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
peer_app = typer.Typer(help="Remote AEs.", no_args_is_help=True)
db_app = typer.Typer(help="The index database.", no_args_is_help=True)
app.add_typer(peer_app, name="peer")
add_dicom_commands(app, peer_app)
add_identity_commands(app)
app.add_typer(db_app, name="db")
app.add_typer(audit_app, name="audit")

#: Rejected files that an import lists; the rest is counted.
LISTED = 50


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ImagingError as error:
        typer.echo(f"huying: {error}", err=True)
        sys.exit(2 if isinstance(error, NoNode) else 1)


def _run(settings: Settings, *kinds: Kind) -> None:
    from gateway import supervisor

    if kinds:
        # A part of a node makes none; on another host its folder may be new.
        require_node(settings, folder=False)
    chosen = frozenset(kinds) or supervisor.ALL_KINDS
    raise typer.Exit(supervisor.serve(settings, kinds=chosen))


@app.command()
def serve(
    *,
    data: Data = None,
    http: Http = None,
    dimse: Dimse = None,
    aet: Aet = None,
    open_access: Open = False,
    config: Config = None,
) -> None:
    """Run a whole node: web, DICOM and worker."""
    _run(
        settings_for(
            data, config, http=http, dimse=dimse, aet=aet, open_access=open_access
        )
    )


@app.command()
def web(
    *,
    data: Data = None,
    http: Http = None,
    open_access: Open = False,
    config: Config = None,
) -> None:
    """Run only the web processes of a node."""
    from gateway.supervisor import Kind

    _run(settings_for(data, config, http=http, open_access=open_access), Kind.WEB)


@app.command("dimse")
def dimse_command(
    *,
    data: Data = None,
    dimse: Dimse = None,
    aet: Aet = None,
    open_access: Open = False,
    config: Config = None,
) -> None:
    """Run only the DICOM processes of a node."""
    from gateway.supervisor import Kind

    settings = settings_for(data, config, dimse=dimse, aet=aet, open_access=open_access)
    _run(settings, Kind.DIMSE)


@app.command()
def worker(*, data: Data = None, config: Config = None) -> None:
    """Run only the worker of a node."""
    from gateway.supervisor import Kind

    _run(settings_for(data, config), Kind.WORKER)


@app.command("import")
def import_command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...")],
    *,
    tenant: Annotated[str, typer.Option(help="Who the studies belong to.")] = "default",
    data: Data = None,
    config: Config = None,
) -> None:
    """Store files, folders, ZIP archives and DICOMDIRs.

    Works beside a running node on the same data folder, and without one.
    """
    settings = settings_for(data, config)
    with opened(settings, make=True) as node:
        summary = _import(node, paths, tenant)
    print_summary(summary)
    if not summary.ok:
        raise typer.Exit(1)


def _import(node: Node, paths: list[Path], tenant: str = "default") -> ImportSummary:
    """Import with a progress bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from gateway.importer import count_files, import_paths
    from gateway.transfers import ImportRecording

    class Bar:
        n_bytes = 0

        def found(self, n_files: int) -> None:
            total = bar.tasks[task].total or 0
            bar.update(task, total=total + n_files)

        def finished(self, n_bytes: int) -> None:
            self.n_bytes += n_bytes
            bar.update(task, advance=1, size=f"{self.n_bytes / 1e6:.0f} MB")

    recording = ImportRecording(node.audit, paths, tenant)
    bar = Progress(
        TextColumn("importing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[size]}"),
        Remaining(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with recording, bar:
        task = bar.add_task("import", total=count_files(paths), size="")
        recording.summary = import_paths(
            node.ingest,
            paths,
            limits=node.settings.limits,
            tenant=tenant,
            accept_without_preamble=node.settings.pacs.accept_files_without_preamble,
            progress=Bar(),
            accepted=recording.accepted,
        )
        return recording.summary


def print_summary(summary: ImportSummary) -> None:
    """Say what an import did; rejected files with their reasons."""
    typer.echo(
        f"stored {summary.stored}, duplicate {summary.duplicate},"
        f" skipped {summary.skipped} (not DICOM), rejected {summary.n_rejected};"
        f" {summary.n_bytes / 1e6:.1f} MB"
    )
    for one in summary.rejected[:LISTED]:
        typer.echo(f"  rejected {one.name}: {one.reason}", err=True)
    if summary.n_rejected > LISTED:
        typer.echo(f"  and {summary.n_rejected - LISTED} more, by reason:", err=True)
        for reason, count in summary.reasons.most_common():
            typer.echo(f"  {count:6}  {reason}", err=True)
    if summary.stopped:
        typer.echo(f"  stopped early: {summary.stopped}", err=True)


@app.command()
def verify(
    *,
    fast: Annotated[
        bool, typer.Option("--fast", help="Leave checksums and digests out.")
    ] = False,
    rebuild_index: Annotated[
        bool,
        typer.Option(
            "--rebuild-index",
            help="Empty the index and fill it from the packs; the node must be"
            " stopped. What packs cannot hold (peers, commitment results, the"
            " change feed so far) is not brought back.",
        ),
    ] = False,
    data: Data = None,
    config: Config = None,
) -> None:
    """Compare index, packs, object store and digests, in both directions."""
    settings = settings_for(data, config)
    if rebuild_index:
        _rebuild(settings)
        return
    from pacs.services.verify import Verifier

    with opened(settings) as node, _progress("verifying") as progress:
        done = Verifier(
            database=node.database,
            folder=node.packs.folder,
            objects=node.objects,
            node_id=settings.node.id,
        ).verify(fast=fast, progress=progress)
    typer.echo(
        f"{done.instances} instances, {done.records} records, {done.packs} packs,"
        f" {done.objects} objects; {done.size_bytes / 1e6:.1f} MB"
    )
    if done.elsewhere:
        typer.echo(f"{done.elsewhere} packs lie on other hosts: verify there too")
    _print_findings(done.findings, done.n_findings)
    if not done.is_clean:
        raise typer.Exit(1)
    typer.echo("index, packs and objects agree")


def _rebuild(settings: Settings) -> None:
    """Rebuild the index; nobody else may work in the folder meanwhile."""
    from gateway import supervisor
    from gateway.app import pack_folder
    from pacs.services.rebuild import Rebuilder

    if not pack_folder(settings).is_dir():
        require_node(settings)
    with (
        supervisor.data_lock(settings.data),
        opened(settings, make=True) as node,
        _progress("rebuilding") as progress,
    ):
        done = Rebuilder(
            database=node.database,
            folder=node.packs.folder,
            objects=node.objects,
            ingest=node.ingest,
            clock=node.clock,
            node_id=settings.node.id,
        ).rebuild(progress=progress)
    typer.echo(
        f"{done.instances} instances indexed from {done.records} records of"
        f" {done.packs} packs; {done.buried} deleted or replaced"
    )
    typer.echo(f"the change feed begins anew, as epoch {done.epoch}")
    _print_findings(done.findings, done.n_findings)


def _print_findings(findings: Sequence[Finding], n_findings: int) -> None:
    for one in findings[:LISTED]:
        where = f"{one.pack}@{one.offset}" if one.pack else ""
        parts = (one.kind, one.tenant, one.instance_uid or one.series_uid, where)
        about = "  ".join(filter(None, (*parts, one.detail)))
        typer.echo(f"  {about}", err=True)
    if n_findings > LISTED:
        typer.echo(f"  and {n_findings - LISTED} more", err=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show bytes done of bytes in all, on a terminal."""
    from rich.progress import DownloadColumn, Progress

    with Progress(
        *Progress.get_default_columns(),
        DownloadColumn(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
def demo(
    *,
    run: Annotated[
        bool, typer.Option("--serve", help="Start the node first, open on loopback.")
    ] = False,
    corpus: Annotated[
        Path | None, typer.Option(help="Public studies to import.", metavar="DIR")
    ] = None,
    data: Data = None,
    http: Http = None,
    dimse: Dimse = None,
    config: Config = None,
) -> None:
    """Fill a node with a few studies and say how to look at them."""
    settings = settings_for(data, config, http=http, dimse=dimse, open_access=run)
    if corpus is None:
        corpus = Path(__file__).resolve().parents[2] / "shared" / "corpus"
    if not run:
        _fill(settings, corpus)
        return
    from gateway import supervisor

    def announce(line: str, bound: Settings) -> None:
        typer.echo(line)
        supervisor.spawn("demo", lambda: _fill(bound, corpus))

    raise typer.Exit(supervisor.serve(settings, announce=announce))


def _fill(settings: Settings, corpus: Path) -> None:
    """Import the demonstration studies, then print the commands to try."""
    from gateway import demo as studies

    paths = studies.corpus_paths(corpus)
    if paths:
        typer.echo(f"importing the public studies of {corpus}")
    else:
        folder = settings.data / "demo"
        typer.echo(
            f"{corpus} is not here: importing three synthetic studies instead"
            f" (computed phantoms, no patients), written to {folder}"
        )
        studies.write_studies(folder)
        paths = [folder]
    with opened(settings, make=True) as node:
        summary = _import(node, paths)
    print_summary(summary)
    for line in try_it(settings, studies.example_file(paths)):
        typer.echo(line)


def try_it(settings: Settings, example: Path) -> list[str]:
    """Return addresses and one command for each client."""
    from gateway.supervisor import local_host

    web_host = local_host(settings.http.host)
    shown = f"[{web_host}]" if ":" in web_host else web_host
    base = f"http://{shown}:{settings.http.port}"
    peer = f"{local_host(settings.dimse.host)} {settings.dimse.port}"
    aet = settings.dimse.aet
    find = (
        f"findscu -S -aec {aet} {peer} -k QueryRetrieveLevel=STUDY"
        " -k StudyInstanceUID -k PatientName -k StudyDate"
    )
    return [
        "",
        f"web page    {base}/",
        f"DICOMweb    {base}/dicom-web",
        f"DICOM       {aet} at {peer.replace(' ', ':')}",
        "",
        "Try:",
        f"  storescu -aec {aet} {peer} {shlex.quote(str(example))}",
        f"  {find}",
        f"  curl '{base}/dicom-web/studies?limit=5'",
    ]


@app.command()
def doctor(
    *,
    settings_page: Annotated[
        bool, typer.Option("--settings", help="Print the settings reference.")
    ] = False,
    data: Data = None,
    http: Http = None,
    dimse: Dimse = None,
    config: Config = None,
) -> None:
    """Say what is wrong, in one sentence each."""
    if settings_page:
        from gateway.reference import settings_reference

        typer.echo(settings_reference(), nl=False)
        return
    try:
        settings = settings_for(data, config, http=http, dimse=dimse)
    except InvalidParameter as error:
        for sentence in str(error).removeprefix("settings: ").split("; "):
            typer.echo(f"settings    {sentence}")
        raise typer.Exit(1) from error
    from gateway import app as composition
    from gateway.doctor import examine

    healthy = True
    for finding in examine(settings, composition.open_objects):
        healthy &= finding.ok
        typer.echo(f"{finding.subject:<12}{finding.problem or 'ok'}")
    if not healthy:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"huying {distribution_version('huying')}")


@db_app.command("upgrade")
def db_upgrade(*, data: Data = None, config: Config = None) -> None:
    """Bring the index to this version's schema."""
    from storage.db import migrate

    settings = settings_for(data, config)
    if settings.embedded:
        require_node(settings)
    typer.echo(migrate.upgrade(settings.database_url()))


@db_app.command("current")
def db_current(*, data: Data = None, config: Config = None) -> None:
    """Print the revision of the index."""
    from storage.db import migrate

    settings = settings_for(data, config)
    if settings.embedded:
        require_node(settings)
    typer.echo(migrate.current(settings.database_url()) or "none")


@db_app.command("check")
def db_check(*, data: Data = None, config: Config = None) -> None:
    """Compare the database with the tables this version uses."""
    for tables in (
        "storage.db.tables",
        "pacs.repository.tables",
        "gateway.identity.tables",
    ):
        import_module(tables)  # registers them
    from storage.db import migrate

    settings = settings_for(data, config)
    if settings.embedded:
        require_node(settings)
    url = settings.database_url()
    migrate.require_current(url)
    differences = migrate.check(url)
    for line in differences:
        typer.echo(line)
    if differences:
        raise Conflict(f"{len(differences)} differences between code and database")
    typer.echo("the database and the code agree")
