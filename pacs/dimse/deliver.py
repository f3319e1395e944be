"""Sending stored instances to a peer, over as many associations as it takes.

C-MOVE, forwarding and ``huying send`` deliver through here.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pacs.dimse.client import (
    Address,
    RemoteAssociation,
    Timeouts,
    Wanted,
    connect,
    propose,
)
from pacs.dimse.send import (
    NO_CONTEXT,
    RemoteChannel,
    Source,
    SourceFailed,
    T,
    is_warning,
    plan,
    send_all,
)
from pacs.dimse.status import Status
from pacs.domain.study import StoredInstance
from pacs.services.forwarding import Fate
from pacs.services.policy import KnownPeer


def deliver(
    source: Source[T],
    open_association: Callable[[Sequence[Wanted]], RemoteAssociation],
    instances: Sequence[T],
    *,
    done: Callable[[T, int | None, str], None],
    proceed: Callable[[], bool],
    originator: tuple[str, int] | None = None,
) -> None:
    """Send `instances` in order, one association after the other.

    An instance that breaks its association because we cannot read it is passed over
    on a new one.

    Parameters
    ----------
    open_association : callable
        Given the contexts to propose.
    done, proceed
        As in `send_all`.

    Raises
    ------
    DependencyDown
        The peer failed; what `done` was not called for was not stored, or nobody
        knows.
    """
    for group, contexts in plan(instances):
        pending = deque(group)
        while pending and proceed():
            try:
                with open_association(contexts) as remote:
                    channel = RemoteChannel(remote, originator)
                    send_all(source, channel, pending, done=done, proceed=proceed)
            except SourceFailed as error:
                done(pending.popleft(), None, str(error))


@dataclass(frozen=True, slots=True)
class Outgoing:
    """How this archive opens associations.

    Attributes
    ----------
    tls : SSLContext, optional
        For peers that want TLS.
    """

    timeouts: Timeouts = field(default_factory=Timeouts)
    tls: ssl.SSLContext | None = None

    def open(
        self,
        peer: KnownPeer,
        calling_ae: str,
        contexts: Sequence[Wanted],
        *,
        roles: dict[str, tuple[bool, bool]] | None = None,
    ) -> RemoteAssociation:
        """Open an association with a known peer."""
        return connect(
            Address(peer.host, peer.port, peer.title, peer.tls),
            calling_ae,
            propose(contexts),
            timeouts=self.timeouts,
            tls=self.tls,
            roles=roles,
        )


@dataclass(frozen=True, slots=True)
class PeerSender:
    """Sends studies for the forwarding service."""

    source: Source[StoredInstance]
    outgoing: Outgoing
    calling_ae: str

    def send(
        self,
        peer: KnownPeer,
        instances: Sequence[StoredInstance],
        done: Callable[[StoredInstance, Fate, str], None],
    ) -> None:
        """Send `instances`; `done` is called as each is dealt with.

        Raises
        ------
        DependencyDown
        """

        def judged(instance: StoredInstance, status: int | None, reason: str) -> None:
            done(instance, fate_of(status, reason), reason or f"status {status:04X}")

        deliver(
            self.source,
            lambda contexts: self.outgoing.open(peer, self.calling_ae, contexts),
            instances,
            done=judged,
            proceed=lambda: True,
        )


def fate_of(status: int | None, reason: str = "") -> Fate:
    """Say what a C-STORE status means for the instance (PS3.4 Table B.2-1)."""
    if status is None:
        return Fate.REFUSED if reason == NO_CONTEXT else Fate.RETRY
    if status == Status.SUCCESS:
        return Fate.STORED
    if is_warning(status):
        return Fate.NOTED
    return Fate.RETRY if status >> 8 == 0xA7 else Fate.REFUSED
