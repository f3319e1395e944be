"""Storage commitment, push model: requests taken, results delivered (PS3.4 Annex J)."""

from __future__ import annotations

from dataclasses import dataclass

from pacs.dimse import command as cmd
from pacs.dimse import identifier
from pacs.dimse.association import Association, Message
from pacs.dimse.command import CommandField, Value
from pacs.dimse.deliver import Outgoing
from pacs.dimse.identifier import Item
from pacs.dimse.status import Status, comment_of, status_of
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from pacs.services.commitment import (
    CommitmentService,
    Reference,
    Report,
    TransactionInUse,
)
from pacs.services.policy import AccessPolicy, Action, PeerDirectory
from storage.kernel.errors import (
    DependencyDown,
    ImagingError,
    InvalidParameter,
    MalformedObject,
    TooLarge,
    Unavailable,
)
from storage.kernel.limits import Limits
from storage.kernel.uids import is_uid

PUSH_MODEL = "1.2.840.10008.1.20.1"
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
REQUEST_COMMITMENT = 1
ALL_COMMITTED, FAILURES_EXIST = 1, 2

CLASS_UID, INSTANCE_UID = 0x00081150, 0x00081155
TRANSACTION_UID = 0x00081195
FAILURE_REASON = 0x00081197
FAILED_SEQUENCE = 0x00081198
REFERENCED_SEQUENCE = 0x00081199

#: A requestor that we cannot call back is answered on its own association, when
#: checking takes no longer than this.
AT_ONCE_SECONDS = 5.0
ANSWER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class CommitHandler:
    """Answer N-ACTION-RQ of the Storage Commitment Push Model.

    The request is on stable storage when it is answered; the result comes later, by
    N-EVENT-REPORT on an association of ours. Only a peer whose address we do not know
    gets it on its own association, if that is still open.
    """

    commitment: CommitmentService
    policy: AccessPolicy
    peers: PeerDirectory
    limits: Limits

    def __call__(self, association: Association, message: Message) -> None:
        context = association.contexts[message.context_id]
        command = message.command
        if (
            context.abstract_syntax != PUSH_MODEL
            or cmd.text(command, cmd.REQUESTED_CLASS) != PUSH_MODEL
        ):
            _answer(association, message, Status.SOP_CLASS_NOT_SUPPORTED)
            return
        if cmd.text(command, cmd.REQUESTED_INSTANCE) != PUSH_MODEL_INSTANCE:
            _answer(association, message, Status.NO_SUCH_INSTANCE)
            return
        if cmd.number(command, cmd.ACTION_TYPE) != REQUEST_COMMITMENT:
            _answer(association, message, Status.NO_SUCH_ACTION)
            return
        try:
            self.policy.require(association.actor, Action.COMMIT)
            transaction, references = self._read(message, context.transfer_syntax)
            association.accesses.committed(transaction, len(references))
            pk = self.commitment.request(
                association.actor,
                peer_ae=association.calling_ae,
                called_ae=association.called_ae,
                transaction_uid=transaction,
                references=references,
            )
        except ImagingError as error:
            association.accesses.refused(Action.COMMIT, error)
            _answer(association, message, _status(error), comment_of(error))
            return
        _answer(association, message, Status.SUCCESS)
        peer = self.peers.find(association.calling_ae)
        if peer is None or not peer.port:
            self._report_here(association, message.context_id, pk)

    def _read(
        self, message: Message, transfer_syntax_uid: str
    ) -> tuple[str, list[Reference]]:
        """Read the action information (PS3.4 Table J.3-1)."""
        if not message.dataset:
            raise MalformedObject("no action information", TRANSACTION_UID)
        elements = identifier.read(message.dataset, transfer_syntax_uid, self.limits)
        transaction = identifier.text(elements, TRANSACTION_UID)
        items = elements.get(REFERENCED_SEQUENCE)
        if not transaction:
            raise MalformedObject("Transaction UID is missing", TRANSACTION_UID)
        if not isinstance(items, list):
            raise MalformedObject("the sequence is missing", REFERENCED_SEQUENCE)
        if not is_uid(transaction):
            raise InvalidParameter("Transaction UID (0008,1195)", "not a UID")
        if not items:
            raise InvalidParameter("Referenced SOP Sequence (0008,1199)", "no items")
        references = [
            Reference(
                identifier.text(one, CLASS_UID)[:64],
                identifier.text(one, INSTANCE_UID)[:64],
            )
            for one in items
        ]
        return transaction, references

    def _report_here(self, association: Association, context_id: int, pk: int) -> None:
        """Deliver on the requestor's association; the worker goes on if that fails."""
        try:
            report = self.commitment.check(pk, within_seconds=AT_ONCE_SECONDS)
        except Unavailable:
            return
        if report is None or association.stopping():
            return
        syntax = association.contexts[context_id].transfer_syntax
        number = association.next_message_id()
        command: dict[int, Value] = {
            cmd.AFFECTED_CLASS: PUSH_MODEL,
            cmd.FIELD: CommandField.N_EVENT_REPORT_RQ,
            cmd.MESSAGE_ID: number,
            cmd.DATASET_TYPE: 1,
            cmd.AFFECTED_INSTANCE: PUSH_MODEL_INSTANCE,
            cmd.EVENT_TYPE: event_type(report),
        }
        association.send(context_id, command, (event_information(report, syntax),))
        reply = association.receive(ANSWER_SECONDS)
        if (
            reply is not None
            and cmd.number(reply.command, cmd.RESPONDED_ID, -1) == number
            and cmd.number(reply.command, cmd.STATUS) == Status.SUCCESS
        ):
            self.commitment.delivered(pk)


@dataclass(frozen=True, slots=True)
class ReportSender:
    """Delivers results on associations of ours, as SCP of the service (PS3.4 J.3.3)."""

    peers: PeerDirectory
    outgoing: Outgoing

    def deliver(self, report: Report) -> None:
        """Send one result and wait until the peer has taken it.

        Raises
        ------
        DependencyDown
            It has no address, does not answer, or answers with a failure.
        """
        peer = self.peers.find(report.peer_ae)
        if peer is None or not (peer.host and peer.port):
            raise DependencyDown(f"{report.peer_ae} has no address to report to")
        with self.outgoing.open(
            peer,
            report.called_ae,
            [(PUSH_MODEL, (EXPLICIT_VR_LE, IMPLICIT_VR_LE))],
            roles={PUSH_MODEL: (False, True)},
        ) as association:
            offer = association.offer(PUSH_MODEL)
            status = association.n_event_report(
                offer,
                class_uid=PUSH_MODEL,
                instance_uid=PUSH_MODEL_INSTANCE,
                event_type=event_type(report),
                information=event_information(report, offer.transfer_syntax),
            )
        if status != Status.SUCCESS:
            raise DependencyDown(f"event report: status {status:04X}")


def event_type(report: Report) -> int:
    """Return Event Type ID (0000,1002)."""
    return FAILURES_EXIST if report.failed else ALL_COMMITTED


def event_information(report: Report, transfer_syntax_uid: str) -> bytes:
    """Return the event information (PS3.4 Table J.3-2)."""
    elements: list[tuple[int, bytes, identifier.Value]] = [
        (TRANSACTION_UID, b"UI", report.transaction_uid)
    ]
    if report.failed:
        failed = [
            (*_reference(one), (FAILURE_REASON, b"US", reason))
            for one, reason in report.failed
        ]
        elements.append((FAILED_SEQUENCE, b"SQ", failed))
    committed: list[Item] = [_reference(one) for one in report.committed]
    if committed:
        elements.append((REFERENCED_SEQUENCE, b"SQ", committed))
    return identifier.write(elements, transfer_syntax_uid)


def _reference(one: Reference) -> tuple[tuple[int, bytes, identifier.Value], ...]:
    return (
        (CLASS_UID, b"UI", one.sop_class_uid),
        (INSTANCE_UID, b"UI", one.sop_instance_uid),
    )


def _status(error: ImagingError) -> Status:
    """Return the status of an N-ACTION that was not taken (PS3.7 10.1.4.1.10)."""
    if isinstance(error, TransactionInUse):
        return Status.DUPLICATE_TRANSACTION
    if isinstance(error, InvalidParameter):
        return Status.INVALID_ARGUMENT
    if isinstance(error, MalformedObject):
        return Status.NO_SUCH_ARGUMENT
    if isinstance(error, TooLarge | Unavailable):
        return Status.RESOURCE_LIMITATION
    return status_of(error)


def _answer(
    association: Association, message: Message, status: Status, comment: str = ""
) -> None:
    response = cmd.response(message.command, status)
    response[cmd.ACTION_TYPE] = cmd.number(message.command, cmd.ACTION_TYPE)
    if comment:
        response[cmd.COMMENT] = comment
    association.send(message.context_id, response)
