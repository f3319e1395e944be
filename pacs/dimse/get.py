"""C-GET SCP: instances go back on the requestor's own association (PS3.4 C.4.3)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pacs.dimse import command as cmd
from pacs.dimse.association import Association, Message
from pacs.dimse.client import Offer
from pacs.dimse.command import CommandField
from pacs.dimse.pdu import AbortReason, ProtocolError
from pacs.dimse.selection import select, selection
from pacs.dimse.send import Sendable, SourceFailed, send_all
from pacs.dimse.suboperations import Progress, refuse
from pacs.imaging.sopclasses import is_storage
from pacs.services.policy import AccessPolicy, Action
from pacs.services.retrieve import RetrieveService
from storage.kernel.errors import ImagingError
from storage.kernel.limits import Limits


@dataclass(frozen=True, slots=True)
class GetHandler:
    """Answer C-GET-RQ.

    Only storage contexts for which the requestor is SCP (role selection, PS3.7
    D.3.3.4) carry sub-operations; what fits none of them counts as failed.

    Attributes
    ----------
    response_seconds : float
        How long the requestor may take to store one instance.
    """

    retrieve: RetrieveService
    policy: AccessPolicy
    limits: Limits
    response_seconds: float = 60.0

    def __call__(self, association: Association, message: Message) -> None:
        try:
            self.policy.require(association.actor, Action.GET)
            wanted = selection(association, message, self.limits)
            found = select(self.retrieve, association, wanted)
            association.accesses.retrieved(Action.GET, wanted.keys, found)
        except ImagingError as error:
            association.accesses.refused(Action.GET, error)
            refuse(association, message, error)
            return
        progress = Progress(association, message, len(found))
        channel = _Channel(association, message, progress, self.response_seconds)
        try:
            send_all(
                self.retrieve,
                channel,
                deque(found),
                done=progress.done,
                proceed=progress.proceed,
            )
        except SourceFailed as error:
            # Half an instance is on the wire: only an abort says so.
            raise ProtocolError(str(error), AbortReason.NOT_SPECIFIED) from error
        progress.finish(found)


class _Channel:
    """Sub-operations on the association of the request itself."""

    def __init__(
        self,
        association: Association,
        message: Message,
        progress: Progress,
        response_seconds: float,
    ) -> None:
        self._association = association
        self._request_id = cmd.number(message.command, cmd.MESSAGE_ID)
        self._progress = progress
        self._seconds = response_seconds
        self.offers: Sequence[Offer] = [
            Offer(number, context.abstract_syntax, context.transfer_syntax)
            for number, context in association.contexts.items()
            if context.as_scu and is_storage(context.abstract_syntax)
        ]

    def begin(self, instance: Sendable, chunks: Iterable[bytes], offer: Offer) -> int:
        number = self._association.next_message_id()
        if number == self._request_id:
            # The requestor could not tell the two apart by Message ID alone.
            number = self._association.next_message_id()
        self._association.send(
            offer.context_id,
            {
                cmd.AFFECTED_CLASS: instance.sop_class_uid,
                cmd.FIELD: CommandField.C_STORE_RQ,
                cmd.MESSAGE_ID: number,
                cmd.PRIORITY: 0,
                cmd.DATASET_TYPE: 1,
                cmd.AFFECTED_INSTANCE: instance.sop_instance_uid,
            },
            chunks,
        )
        return number

    def finish(self, message_id: int) -> int:
        """Wait for the response; a C-CANCEL may come before it."""
        deadline = time.monotonic() + self._seconds
        while (left := deadline - time.monotonic()) > 0:
            reply = self._association.receive(left)
            if reply is None:
                break
            field = cmd.number(reply.command, cmd.FIELD)
            answered = cmd.number(reply.command, cmd.RESPONDED_ID, -1)
            if field == CommandField.C_STORE_RQ | cmd.RESPONSE:
                if answered == message_id:
                    return cmd.number(reply.command, cmd.STATUS)
            elif field == CommandField.C_CANCEL_RQ:
                if answered == self._request_id:
                    self._progress.cancel()
            else:
                raise ProtocolError(
                    "another request during C-GET", AbortReason.UNEXPECTED_PDU
                )
        raise ProtocolError("no response to C-STORE", AbortReason.NOT_SPECIFIED)
