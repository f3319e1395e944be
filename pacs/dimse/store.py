"""C-STORE: from the socket to the ingest service with one copy (PS3.4 Annex B).

No data set is decoded here. Bytes are received straight into a buffer that lies ready,
with the digest running; larger ones go on into a pack of their own.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections import deque
from contextlib import suppress

from pacs.dimse import command as cmd
from pacs.dimse.association import Association, Message, has_dataset
from pacs.dimse.command import Value
from pacs.dimse.hashing import Hasher
from pacs.dimse.status import Status, comment_of, status_of
from pacs.domain.study import Accepted, Arrival, Outcome, Spool, Warned
from pacs.imaging import sopclasses
from pacs.services.ingest import IngestService
from pacs.services.policy import AccessPolicy, Action
from storage.kernel.errors import (
    IdentityMismatch,
    ImagingError,
    MalformedObject,
    UnsupportedSopClass,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Door, Source

log = logging.getLogger(__name__)

#: Buffers that are kept between messages; more exist only while they are filled.
_KEPT_BUFFERS = 8
#: Room for the headers that are read behind a fragment.
_HEADERS = 16
#: Offending elements named in one answer.
_MAX_OFFENDING = 8
#: Refused instances that one association may put into the log.
_MAX_LOGGED = 10
_CLASS_UID = 0x00080016
_INSTANCE_UID = 0x00080018


class Buffers:
    """Receive buffers, used again so that their pages stay in memory.

    Anonymous mappings take memory only for what was ever received into them.
    """

    def __init__(self, limits: Limits) -> None:
        self._size = max(limits.memory_instance_bytes, limits.pdu_bytes) + _HEADERS
        self._free: deque[memoryview] = deque(maxlen=_KEPT_BUFFERS)
        self._lock = threading.Lock()
        #: How many are being filled or stored from.
        self.in_use = 0

    def take(self) -> memoryview:
        """Return a buffer nobody else uses."""
        with self._lock:
            self.in_use += 1
        with suppress(IndexError):
            return self._free.pop()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return memoryview(mmap.mmap(-1, self._size, flags=flags))

    def give_back(self, buffer: memoryview) -> None:
        """Keep `buffer` for the next message."""
        with self._lock:
            self.in_use -= 1
        self._free.append(buffer)


class StoreSession:
    """Receives the instances of one association.

    Parameters
    ----------
    association : Association
    ingest : IngestService
    policy : AccessPolicy
    buffers : Buffers
        Shared by the associations of this process.
    """

    def __init__(
        self,
        association: Association,
        *,
        ingest: IngestService,
        policy: AccessPolicy,
        buffers: Buffers,
    ) -> None:
        self._association = association
        self._ingest = ingest
        self._policy = policy
        self._buffers = buffers
        self._limits = association.limits
        self._logged = 0
        self._source = Source(
            Door.DIMSE,
            calling_ae=association.calling_ae,
            called_ae=association.called_ae,
            peer=association.peer,
        )
        self._hasher = Hasher()
        self.stored = False

    def close(self) -> None:
        """End what runs beside the association."""
        self._hasher.close()

    def answer(self, message: Message) -> None:
        """Receive the data set of a C-STORE-RQ, have it stored, and respond."""
        request = message.command
        try:
            accepted = self._store(message)
            # Not acknowledged unless it is recorded; the peer sends it again.
            self._association.accesses.stored(accepted.study_instance_uid)
        except ImagingError as error:
            status = status_of(error)
            response = cmd.response(request, status)
            response[cmd.COMMENT] = comment_of(error)
            tag = getattr(error, "tag", None)
            if tag:
                response[cmd.OFFENDING] = cmd.tags(tag)
            self._log_refusal(status, error)
        else:
            self.stored = True
            response = cmd.response(request, Status.SUCCESS)
            if accepted.warnings and accepted.outcome is Outcome.STORED:
                _warn(response, accepted)
        self._association.send(message.context_id, response)

    def _store(self, message: Message) -> Accepted:
        """Return what ingest says; the data set has been read whole in any case."""
        association, request = self._association, message.command
        class_uid = cmd.text(request, cmd.AFFECTED_CLASS)
        instance_uid = cmd.text(request, cmd.AFFECTED_INSTANCE)
        syntax = association.contexts[message.context_id].transfer_syntax
        refusal = self._refusal(message, class_uid, instance_uid)
        if not has_dataset(request):
            raise refusal or MalformedObject("no data set")
        spill = _Spill(self, class_uid, instance_uid, syntax, refusal)
        buffer = self._buffers.take()
        digest = self._hasher.begin(beside=self._buffers.in_use == 1)
        try:
            total, kept = association.reader.receive_dataset(
                message.context_id,
                buffer,
                digest if refusal is None else None,
                most=self._limits.instance_bytes,
                spill=spill.write,
            )
            rest = buffer[:kept]
            if total > kept:
                spill.write(rest)
            if spill.refusal is not None:
                raise spill.refusal
            return self._ingest.accept(
                Arrival(
                    actor=association.actor,
                    source=self._source,
                    transfer_syntax_uid=syntax,
                    dataset=rest if spill.spool is None else spill.spool,
                    digest=digest,
                    claimed_class_uid=class_uid,
                    claimed_instance_uid=instance_uid,
                )
            )
        except BaseException:
            spill.abort()
            raise
        finally:
            # Order matters: the buffer goes to others once its bytes are hashed.
            digest.settle()
            self._buffers.give_back(buffer)

    def _refusal(
        self, message: Message, class_uid: str, instance_uid: str
    ) -> ImagingError | None:
        """Return why the data set will not be stored, whatever it holds."""
        context = self._association.contexts[message.context_id]
        actor = self._association.actor
        try:
            self._policy.require(actor, Action.STORE)
            if not class_uid:
                raise IdentityMismatch("required UID is missing:", _CLASS_UID)
            if not instance_uid:
                raise IdentityMismatch("required UID is missing:", _INSTANCE_UID)
            if class_uid != context.abstract_syntax or not sopclasses.is_storage(
                class_uid
            ):
                raise UnsupportedSopClass("SOP class is not that of its context")
            self._ingest.check(
                actor,
                self._source,
                sop_class_uid=class_uid,
                sop_instance_uid=instance_uid,
                transfer_syntax_uid=context.transfer_syntax,
            )
        except ImagingError as error:
            self._association.accesses.refused(Action.STORE, error)
            return error
        return None

    def open_spool(self, class_uid: str, instance_uid: str, syntax: str) -> Spool:
        """Start a pack for an instance that is larger than a buffer."""
        return self._ingest.open_spool(
            self._association.actor,
            self._source,
            sop_class_uid=class_uid,
            sop_instance_uid=instance_uid,
            transfer_syntax_uid=syntax,
        )

    def _log_refusal(self, status: Status, error: ImagingError) -> None:
        """Say once what was refused; a hostile sender does not fill the log."""
        self._logged += 1
        if self._logged > _MAX_LOGGED:
            return
        log.warning(
            "instance refused",
            extra={
                "event": "dimse.store_refused",
                "peer": self._association.peer,
                "calling_ae": self._association.calling_ae,
                "status": f"{status:04X}",
                "reason": error.code,
                "tag": getattr(error, "tag", None),
                "last_logged": self._logged == _MAX_LOGGED,
            },
        )


class _Spill:
    """Where a data set goes that is larger than the buffer.

    Once something is wrong the rest is read and dropped: the peer hears why in the
    response.
    """

    def __init__(
        self,
        session: StoreSession,
        class_uid: str,
        instance_uid: str,
        syntax: str,
        refusal: ImagingError | None,
    ) -> None:
        self._session = session
        self._names = (class_uid, instance_uid, syntax)
        self.spool: Spool | None = None
        self.refusal = refusal

    def write(self, data: memoryview) -> None:
        if self.refusal is not None:
            return
        try:
            if self.spool is None:
                self.spool = self._session.open_spool(*self._names)
            self.spool.write(data)
        except ImagingError as error:
            self.refusal = error
            self.abort()

    def abort(self) -> None:
        if self.spool is not None:
            self.spool.abort()


def _warn(response: dict[int, Value], accepted: Accepted) -> None:
    """Make a success a warning that names what deserves a second look."""
    warnings = accepted.warnings
    response[cmd.STATUS] = Status.MISMATCH_WARNING
    response[cmd.COMMENT] = _comment(warnings[0])
    tags = tuple(dict.fromkeys(one.tag for one in warnings if one.tag))
    if tags:
        response[cmd.OFFENDING] = cmd.tags(*tags[:_MAX_OFFENDING])


def _comment(warned: Warned) -> str:
    return warned.reason.encode("ascii", "replace").decode()[:64]
