"""Responses of C-GET and C-MOVE while their sub-operations run (PS3.4 C.4.2.3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.association import Association, Message
from pacs.dimse.command import Value
from pacs.dimse.send import Tally
from pacs.dimse.status import Status, comment_of, status_of
from pacs.domain.study import StoredInstance
from storage.kernel.errors import IdentityMismatch, ImagingError, TooLarge

log = logging.getLogger(__name__)

#: Least pause between pending responses, seconds.
PENDING_SECONDS = 0.5
FAILED_INSTANCES = 0x00080058


class Progress:
    """The requestor's view of one C-GET or C-MOVE.

    Parameters
    ----------
    total : int
        Sub-operations.
    """

    def __init__(self, association: Association, message: Message, total: int) -> None:
        self.tally = Tally(total)
        self._association = association
        self._message = message
        self._message_id = cmd.number(message.command, cmd.MESSAGE_ID)
        self._next_pending = 0.0
        self._cancelled = False
        self._done: set[int] = set()

    def cancel(self) -> None:
        """Note a C-CANCEL that was read elsewhere."""
        self._cancelled = True

    def proceed(self) -> bool:
        """Tell whether another sub-operation may start."""
        association = self._association
        if not self._cancelled:
            self._cancelled = association.cancelled(self._message_id)
        return not (self._cancelled or association.stopping())

    def done(self, instance: StoredInstance, status: int | None, reason: str) -> None:
        """Count one sub-operation; tell the requestor, though not too often."""
        self.tally.count(instance, status, reason)
        self._done.add(instance.pk)
        now = time.monotonic()
        if now >= self._next_pending and self.tally.remaining:
            self._next_pending = now + PENDING_SECONDS
            response = cmd.response(self._message.command, Status.PENDING)
            response.update(self.tally.counts(remaining=True))
            self._association.send(self._message.context_id, response)

    def finish(
        self,
        instances: Iterable[StoredInstance],
        reason: str = "the archive is shutting down",
    ) -> None:
        """Send the final response.

        Parameters
        ----------
        instances : iterable of StoredInstance
            All; those that were not done failed for `reason`, unless the requestor
            has cancelled.
        """
        tally = self.tally
        # A cancel that comes with the last sub-operation stops nothing.
        cancelled = self._cancelled and tally.remaining > 0
        if not cancelled:
            left = [one for one in instances if one.pk not in self._done]
            tally.fail_all(left, reason)
        status = tally.final_status(cancelled=cancelled)
        response = cmd.response(
            self._message.command, status, has_dataset=bool(tally.failed_uids)
        )
        response.update(tally.counts(remaining=cancelled))
        if tally.failed:
            response[cmd.COMMENT] = tally.reason[:64]
        dataset = None
        if tally.failed_uids:
            uids = "\\".join(tally.failed_uids)
            syntax = self._association.contexts[self._message.context_id]
            dataset = (
                identifier.write(
                    [(FAILED_INSTANCES, b"UI", uids)], syntax.transfer_syntax
                ),
            )
        self._association.send(self._message.context_id, response, dataset)


def refuse(
    association: Association,
    message: Message,
    error: ImagingError,
    status: Status | None = None,
) -> None:
    """Send the final response of a request that selects nothing."""
    if status is None:
        status = status_of(error)
        if isinstance(error, TooLarge) and error.limit == "move_instances":
            status = Status.CANNOT_PERFORM
    log.info(
        "retrieve refused",
        extra={
            "event": "retrieve.refused",
            "peer": association.calling_ae,
            "status": f"{status:04X}",
            "code": error.code,
        },
    )
    response: dict[int, Value] = cmd.response(message.command, status)
    response[cmd.COMMENT] = comment_of(error)
    if isinstance(error, IdentityMismatch):
        tag = error.tag
        response[cmd.OFFENDING] = (tag >> 16).to_bytes(2, "little") + (
            tag & 0xFFFF
        ).to_bytes(2, "little")
    association.send(message.context_id, response)
