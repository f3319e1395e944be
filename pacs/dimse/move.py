"""C-MOVE SCP: instances go to a third party, or back, on associations of ours
(PS3.4 C.4.2).
"""

from __future__ import annotations

import logging
import ssl
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pacs.dimse import command as cmd
from pacs.dimse.association import Association, Message
from pacs.dimse.client import Address, Timeouts, connect, propose
from pacs.dimse.selection import select, selection
from pacs.dimse.send import RemoteChannel, SourceFailed, plan, send_all
from pacs.dimse.status import Status
from pacs.dimse.suboperations import Progress, refuse
from pacs.domain.study import StoredInstance
from pacs.services.policy import AccessPolicy, Action, KnownPeer
from pacs.services.retrieve import RetrieveService
from storage.kernel.errors import DependencyDown, ImagingError, NotFound
from storage.kernel.limits import Limits

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MoveHandler:
    """Answer C-MOVE-RQ.

    Attributes
    ----------
    our_aes : collection of str
        Titles that are this archive: nothing is moved to them.
    aet : str
        Our calling AE title, and the Move Originator's when it is not known.
    tls : SSLContext, optional
        For destinations that want TLS.
    """

    retrieve: RetrieveService
    policy: AccessPolicy
    limits: Limits
    our_aes: Collection[str]
    timeouts: Timeouts = field(default_factory=Timeouts)
    tls: ssl.SSLContext | None = None

    def __call__(self, association: Association, message: Message) -> None:
        try:
            self.policy.require(association.actor, Action.MOVE)
            wanted = selection(association, message, self.limits)
        except ImagingError as error:
            refuse(association, message, error)
            return
        try:
            peer = self._destination(association, message)
        except ImagingError as error:
            refuse(association, message, error, Status.MOVE_DESTINATION_UNKNOWN)
            return
        try:
            found = select(self.retrieve, association, wanted)
        except ImagingError as error:
            refuse(association, message, error)
            return
        progress = Progress(association, message, len(found))
        left: list[StoredInstance] = []
        for instances, contexts in plan(found):
            left += self._send(
                association, message, peer, instances, contexts, progress
            )
        progress.finish(left)

    def _destination(self, association: Association, message: Message) -> KnownPeer:
        title = cmd.text(message.command, cmd.MOVE_DESTINATION).strip()
        if title in self.our_aes:
            raise NotFound("the move destination is this archive")
        peer = self.policy.resolve(association.actor, title)
        if peer is None:
            raise NotFound("the move destination is not known here")
        return peer

    def _send(
        self,
        association: Association,
        message: Message,
        peer: KnownPeer,
        instances: Sequence[StoredInstance],
        contexts: Sequence[tuple[str, tuple[str, ...]]],
        progress: Progress,
    ) -> list[StoredInstance]:
        """Send what one association can hold; return what was not tried."""
        pending = deque(instances)
        originator = (
            association.calling_ae,
            cmd.number(message.command, cmd.MESSAGE_ID),
        )
        while pending and progress.proceed():
            try:
                with connect(
                    Address(peer.host, peer.port, peer.title, peer.tls),
                    association.called_ae,
                    propose(contexts),
                    timeouts=self.timeouts,
                    tls=self.tls,
                ) as remote:
                    send_all(
                        self.retrieve,
                        RemoteChannel(remote, originator),
                        pending,
                        done=progress.done,
                        proceed=progress.proceed,
                    )
            except SourceFailed as error:
                # The instance is to blame, not the peer: go on without it.
                progress.done(pending.popleft(), None, str(error))
            except DependencyDown as error:
                log.warning(
                    "move destination failed: %s",
                    error,
                    extra={"event": "move.destination", "peer": peer.title},
                )
                progress.tally.fail_all(pending, f"destination: {error}")
                pending.clear()
        return list(pending)
