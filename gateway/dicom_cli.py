"""``huying echo``, ``send`` and ``peer``: talking to other DICOM nodes by hand.

`gateway.cli` registers these commands.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.console import command_event
from gateway.options import Config, Data, opened, settings_for
from storage.kernel.errors import InvalidParameter, NotFound
from storage.kernel.settings import Settings
from storage.kernel.types import DEFAULT_TENANT, Actor, Role, TenantId
from storage.kernel.uids import is_uid

if TYPE_CHECKING:
    from gateway.app import Node
    from gateway.sending import FileInstance, SendReport
    from pacs.dimse.client import RemoteAssociation, Wanted
    from pacs.dimse.deliver import Outgoing
    from pacs.domain.study import StoredInstance
    from pacs.services.forwarding import Fate
    from pacs.services.policy import KnownPeer

Tls = Annotated[bool, typer.Option("--tls", help="Over TLS.")]

#: Failed instances that are listed; the rest is counted.
LISTED = 50
GRANTS = "echo store find get move commit"


def add_commands(app: typer.Typer, peers: typer.Typer) -> None:
    """Register the commands: `peers` is the group ``huying peer``."""
    app.command()(echo)
    app.command()(send)
    peers.command("add")(peer_add)
    peers.command("list")(peer_list)
    peers.command("remove")(peer_remove)


@contextmanager
def _node(data: Path | None, config: Path | None) -> Iterator[Node]:
    with opened(settings_for(data, config)) as node:
        yield node


def outgoing(settings: Settings) -> Outgoing:
    """Return how this node opens associations."""
    from pacs.dimse.client import Timeouts, client_tls
    from pacs.dimse.deliver import Outgoing

    return Outgoing(
        Timeouts.for_settings(settings.dimse), client_tls(settings.dimse.tls)
    )


def peer_add(
    title: Annotated[str, typer.Argument(metavar="AE")],
    host: Annotated[str, typer.Argument(metavar="HOST")] = "",
    port: Annotated[int, typer.Argument(metavar="PORT", min=0, max=65_535)] = 0,
    *,
    may: Annotated[
        str, typer.Option(help=f"What it may ask for, of: {GRANTS}.")
    ] = "echo store",
    tenant: Annotated[str, typer.Option(help="Whose peer it is; empty: all.")] = "",
    tls: Tls = False,
    forward: Annotated[
        bool, typer.Option("--forward", help="Send it every settled study.")
    ] = False,
    data: Data = None,
    config: Config = None,
) -> None:
    """Add a remote AE, or change it. Running processes know within a second."""
    from pacs.services.policy import KnownPeer

    peer = KnownPeer(
        title=title,
        host=host,
        port=port,
        tenant=tenant,
        may=frozenset(may.replace(",", " ").split()),
        tls=tls,
        forward=forward,
    )
    with _node(data, config) as node:
        node.peers.put(peer, command_event("peer"))
    typer.echo(_line(peer))


def peer_list(*, data: Data = None, config: Config = None) -> None:
    """List the remote AEs, those of the settings file too."""
    with _node(data, config) as node:
        for peer in node.peers.list():
            fixed = node.peers.is_configured(peer.title)
            typer.echo(_line(peer) + ("  (settings file)" if fixed else ""))


def peer_remove(
    title: Annotated[str, typer.Argument(metavar="AE")],
    *,
    data: Data = None,
    config: Config = None,
) -> None:
    """Remove a remote AE."""
    with _node(data, config) as node:
        node.peers.remove(title, command_event("peer"))


def _line(peer: KnownPeer) -> str:
    where = f"{peer.host}:{peer.port}" if peer.host else "-"
    marks = [
        *(["TLS"] if peer.tls else []),
        *(["forward"] if peer.forward else []),
        *([f"tenant {peer.tenant}"] if peer.tenant else []),
    ]
    may = " ".join(sorted(peer.may)) or "nothing"
    return "  ".join((f"{peer.title:<16}", f"{where:<24}", f"may {may}", *marks))


def echo(
    target: Annotated[str, typer.Argument(metavar="AE|HOST")],
    port: Annotated[
        int | None, typer.Argument(metavar="[PORT]", min=1, max=65_535)
    ] = None,
    *,
    aet: Annotated[
        str, typer.Option(help="Its AE title, when HOST and PORT are given.")
    ] = "ANY-SCP",
    tls: Tls = False,
    data: Data = None,
    config: Config = None,
) -> None:
    """Say whether a peer answers C-ECHO, how fast, or where it fails."""
    from pacs.dimse.client import VERIFICATION_CONTEXTS, Address, connect

    settings = settings_for(data, config)
    if port is None:
        with _node(data, config) as node:
            peer = _known(node, target)
        address = Address(peer.host, peer.port, peer.title, peer.tls)
    else:
        address = Address(target, port, aet, tls)
    how = outgoing(settings)
    started = time.perf_counter()
    with connect(
        address,
        settings.dimse.aet,
        VERIFICATION_CONTEXTS,
        timeouts=how.timeouts,
        tls=how.tls,
    ) as association:
        opened = time.perf_counter()
        association.echo()
        answered = time.perf_counter()
    typer.echo(
        f"{address.title} at {address.host}:{address.port} answers:"
        f" association {(opened - started) * 1e3:.1f} ms,"
        f" echo {(answered - opened) * 1e3:.1f} ms"
    )


def _known(node: Node, title: str) -> KnownPeer:
    peer = node.peers.find(title)
    if peer is None:
        raise NotFound(f"no peer called {title}; see huying peer list")
    if not (peer.host and peer.port):
        raise InvalidParameter("peer", f"{title} has no address")
    return peer


def send(
    title: Annotated[str, typer.Argument(metavar="AE")],
    what: Annotated[list[str], typer.Argument(metavar="PATH|UID...")],
    *,
    tenant: Annotated[str, typer.Option(help="Whose stored studies.")] = DEFAULT_TENANT,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for each instance.")
    ] = False,
    data: Data = None,
    config: Config = None,
) -> None:
    """Send files and folders, or stored studies, series and instances by UID.

    A peer that fails or is short of something is tried again a few times, with
    growing pauses; what it refuses is not.
    """
    with _node(data, config) as node:
        peer = _known(node, title)
        report = _send(node, peer, what, tenant, verbose=verbose)
    typer.echo(
        f"sent {report.sent}, of these with a note {report.noted};"
        f" failed {len(report.failed)}"
    )
    for uid, reason in report.failed[:LISTED]:
        typer.echo(f"  failed {uid}: {reason}", err=True)
    if len(report.failed) > LISTED:
        typer.echo(f"  and {len(report.failed) - LISTED} more", err=True)
    if report.failed:
        raise typer.Exit(1)


def _send(
    node: Node, peer: KnownPeer, what: Sequence[str], tenant: str, *, verbose: bool
) -> SendReport:
    """Send with a progress bar on a terminal, or a line for each instance."""
    from rich.progress import Progress

    from gateway.sending import FileSource, files_to_send, send_with_attempts
    from gateway.transfers import SendRecording

    settings = node.settings
    how = outgoing(settings)
    paths = [Path(one) for one in what if not is_uid(one) or Path(one).exists()]
    uids = [one for one in what if is_uid(one) and not Path(one).exists()]

    def skipped(path: Path) -> None:
        typer.echo(f"  skipped {path}: not a DICOM file", err=True)

    files = list(files_to_send(paths, skipped))
    stored = [one for uid in uids for one in _stored(node, uid, tenant)]
    if not files and not stored:
        raise NotFound("nothing to send")

    def open_association(contexts: Sequence[Wanted]) -> RemoteAssociation:
        return how.open(peer, settings.dimse.aet, contexts)

    with (
        SendRecording(node.audit, peer, tenant, [*files, *stored]) as recording,
        Progress(transient=True, disable=verbose or not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("sending", total=len(files) + len(stored))

        def told(
            instance: FileInstance | StoredInstance, fate: Fate, reason: str
        ) -> None:
            bar.advance(task)
            recording.count(instance, fate, reason)
            if verbose:
                typer.echo(f"  {fate:<8}{instance.sop_instance_uid}  {reason}")

        report = send_with_attempts(
            FileSource(node.decoders, settings.limits), open_association, files,
            told=told,
        )  # fmt: skip
        more = send_with_attempts(node.retrieve, open_association, stored, told=told)
    report.sent += more.sent
    report.noted += more.noted
    report.failed += more.failed
    return report


def _stored(node: Node, uid: str, tenant: str) -> list[StoredInstance]:
    """Return what a UID names: a study, a series or an instance."""
    from pacs.domain.study import Level

    actor = Actor(TenantId(tenant), "command line", roles=frozenset({Role.SYSTEM}))
    for level, tag in (
        (Level.STUDY, 0x0020000D),
        (Level.SERIES, 0x0020000E),
        (Level.IMAGE, 0x00080018),
    ):
        found = node.retrieve.select(actor, level, {tag: [uid]})
        if found:
            return found
    raise NotFound(f"no study, series or instance {uid}, and no such file")
