"""C-MOVE SCP: instances go to a third party, or back, on associations of ours
(PS3.4 C.4.2).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from pacs.dimse import command as cmd
from pacs.dimse.association import Association, Message
from pacs.dimse.deliver import Outgoing, deliver
from pacs.dimse.selection import select, selection
from pacs.dimse.status import Status
from pacs.dimse.suboperations import Progress, refuse
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
    """

    retrieve: RetrieveService
    policy: AccessPolicy
    limits: Limits
    our_aes: Collection[str]
    outgoing: Outgoing = field(default_factory=Outgoing)

    def __call__(self, association: Association, message: Message) -> None:
        try:
            self.policy.require(association.actor, Action.MOVE)
            wanted = selection(association, message, self.limits)
        except ImagingError as error:
            association.accesses.refused(Action.MOVE, error)
            refuse(association, message, error)
            return
        try:
            peer = self._destination(association, message)
        except NotFound as error:
            refuse(association, message, error, Status.MOVE_DESTINATION_UNKNOWN)
            return
        except ImagingError as error:
            refuse(association, message, error)
            return
        try:
            found = select(self.retrieve, association, wanted)
            association.accesses.retrieved(Action.MOVE, wanted.keys, found, peer.title)
        except ImagingError as error:
            refuse(association, message, error)
            return
        progress = Progress(association, message, len(found))
        try:
            deliver(
                self.retrieve,
                lambda contexts: self.outgoing.open(
                    peer, association.called_ae, contexts
                ),
                found,
                done=progress.done,
                proceed=progress.proceed,
                originator=(
                    association.calling_ae,
                    cmd.number(message.command, cmd.MESSAGE_ID),
                ),
            )
        except DependencyDown as error:
            log.warning(
                "move destination failed: %s",
                error,
                extra={"event": "move.destination", "peer": peer.title},
            )
            progress.finish(found, str(error))
        else:
            progress.finish(found)

    def _destination(self, association: Association, message: Message) -> KnownPeer:
        title = cmd.text(message.command, cmd.MOVE_DESTINATION).strip()
        if title in self.our_aes:
            raise NotFound("the move destination is this archive")
        peer = self.policy.resolve(association.actor, title)
        if peer is None:
            raise NotFound("the move destination is not known here")
        return peer
