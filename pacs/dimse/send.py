"""C-STORE sub-operations: which context each instance takes, and the counting.

C-GET, C-MOVE and forwarding send through here, so that choice and counts have one
place. While the peer stores one instance, the next is read (or converted) already.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, Protocol, TypeVar

from pacs.dimse import command as cmd
from pacs.dimse.client import Offer, RemoteAssociation, Wanted
from pacs.dimse.command import Value
from pacs.dimse.pdu import MAX_CONTEXTS
from pacs.dimse.status import Status
from pacs.domain.study import ByteStream
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from storage.kernel.errors import ImagingError

log = logging.getLogger(__name__)

FALLBACKS = (EXPLICIT_VR_LE, IMPLICIT_VR_LE)
#: What is least work for both sides comes first.
_EASE = {EXPLICIT_VR_LE: 0, IMPLICIT_VR_LE: 1}
NO_CONTEXT = "no suitable presentation context"
UNREADABLE = "cannot be read or converted"


class Sendable(Protocol):
    """What must be known of an instance to send it."""

    @property
    def sop_class_uid(self) -> str: ...
    @property
    def sop_instance_uid(self) -> str: ...
    @property
    def transfer_syntax_uid(self) -> str: ...


T = TypeVar("T", bound=Sendable)
T_contra = TypeVar("T_contra", bound=Sendable, contravariant=True)


class Source(Protocol[T_contra]):
    """Where instances are read: the retrieve service, or files."""

    def can_send_as(self, instance: T_contra, transfer_syntax_uid: str) -> bool:
        """Tell whether the instance can leave in that transfer syntax."""
        ...

    def dataset(self, instance: T_contra, transfer_syntax_uid: str) -> ByteStream:
        """Return the data set without File Meta."""
        ...


class Channel(Protocol):
    """An association that takes C-STORE requests."""

    @property
    def offers(self) -> Sequence[Offer]:
        """Accepted contexts, the peer's order of preference."""
        ...

    def begin(self, instance: Sendable, chunks: Iterable[bytes], offer: Offer) -> int:
        """Send the request; return its Message ID."""
        ...

    def finish(self, message_id: int) -> int:
        """Wait for the response; return its status."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteChannel:
    """An association that we opened, for C-MOVE and forwarding."""

    association: RemoteAssociation
    originator: tuple[str, int] | None = None

    @property
    def offers(self) -> Sequence[Offer]:
        return self.association.offers

    def begin(self, instance: Sendable, chunks: Iterable[bytes], offer: Offer) -> int:
        return self.association.begin_store(
            instance.sop_instance_uid,
            instance.sop_class_uid,
            chunks,
            offer,
            originator=self.originator,
        )

    def finish(self, message_id: int) -> int:
        return self.association.response(message_id, operation="store").status


@dataclass(slots=True)
class Tally:
    """Counts of sub-operations: their sum is `total` at every moment."""

    total: int
    completed: int = 0
    warning: int = 0
    failed_uids: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def failed(self) -> int:
        return len(self.failed_uids)

    @property
    def remaining(self) -> int:
        return self.total - self.completed - self.failed - self.warning

    def count(self, instance: Sendable, status: int | None, reason: str = "") -> None:
        """Note how one sub-operation ended (PS3.4 B.2.3); None: it was not sent."""
        if status == Status.SUCCESS:
            self.completed += 1
        elif status is not None and is_warning(status):
            self.warning += 1
        else:
            self.fail(instance, reason or f"C-STORE status {status:04X}")

    def fail(self, instance: Sendable, reason: str) -> None:
        """Note an instance that was not sent; the first reason is kept."""
        self.failed_uids.append(instance.sop_instance_uid)
        self.reason = self.reason or reason

    def fail_all(self, instances: Iterable[Sendable], reason: str) -> None:
        """Note instances that will not be sent."""
        for instance in instances:
            self.fail(instance, reason)

    def counts(self, *, remaining: bool) -> dict[int, Value]:
        """Return the elements (0000,1020) to (0000,1023)."""
        counts: dict[int, Value] = {
            cmd.COMPLETED: self.completed,
            cmd.FAILED: self.failed,
            cmd.WARNING: self.warning,
        }
        if remaining:
            counts[cmd.REMAINING] = self.remaining
        return counts

    def final_status(self, *, cancelled: bool) -> Status:
        """Return the status of the final response (PS3.4 Table C.4-2)."""
        if cancelled:
            return Status.CANCEL
        if self.total and self.failed == self.total:
            return Status.CANNOT_PERFORM
        if self.failed or self.warning:
            return Status.COERCED
        return Status.SUCCESS


def is_warning(status: int) -> bool:
    """Tell whether a C-STORE status means stored, with a note."""
    return status >> 12 == 0xB or status in {0x0001, 0x0107, 0x0116}


def plan(
    instances: Sequence[T],
) -> Iterator[tuple[list[T], list[Wanted]]]:
    """Yield the instances of each association, and the contexts to propose for them.

    For each SOP class one context per stored transfer syntax, then the fallbacks, so
    that the acceptor's choice is visible. A request holds 128 contexts; what needs
    more goes over several associations.
    """
    syntaxes: dict[str, dict[str, None]] = {}
    for instance in instances:
        syntaxes.setdefault(instance.sop_class_uid, {})[
            instance.transfer_syntax_uid
        ] = None
    groups: list[dict[str, list[Wanted]]] = [{}]
    used = 0
    for class_uid, stored in syntaxes.items():
        # Bound: a class stored in more syntaxes than fit keeps its fallbacks.
        proposed = [*stored][: MAX_CONTEXTS - len(FALLBACKS)]
        proposed += [uid for uid in FALLBACKS if uid not in stored]
        if used + len(proposed) > MAX_CONTEXTS:
            groups.append({})
            used = 0
        groups[-1][class_uid] = [(class_uid, (uid,)) for uid in proposed]
        used += len(proposed)
    for group in groups:
        chosen = [one for one in instances if one.sop_class_uid in group]
        if chosen:
            yield chosen, list(chain.from_iterable(group.values()))


def choose(
    source: Source[T], instance: T, offers: Mapping[str, Sequence[Offer]]
) -> Offer | None:
    """Return the context an instance is sent in, or None.

    As stored when that was accepted, else natively: Explicit, then Implicit VR Little
    Endian; only who takes neither gets it encoded again.
    """
    mine = offers.get(instance.sop_class_uid, ())
    for offer in mine:
        if offer.transfer_syntax == instance.transfer_syntax_uid:
            return offer
    for offer in sorted(mine, key=lambda one: _EASE.get(one.transfer_syntax, 2)):
        if source.can_send_as(instance, offer.transfer_syntax):
            return offer
    return None


def by_class(offers: Iterable[Offer]) -> dict[str, list[Offer]]:
    """Group accepted contexts by SOP class, order kept."""
    grouped: dict[str, list[Offer]] = {}
    for offer in offers:
        grouped.setdefault(offer.abstract_syntax, []).append(offer)
    return grouped


@dataclass(slots=True)
class _Ready(Generic[T]):
    """An instance whose first bytes are in memory, or why it cannot be sent."""

    instance: T
    offer: Offer | None = None
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    error: str = ""


class SourceFailed(Exception):
    """An instance could not be read to its end; half of it is on the wire."""


def send_all(
    source: Source[T],
    channel: Channel,
    pending: deque[T],
    *,
    done: Callable[[T, int | None, str], None],
    proceed: Callable[[], bool],
) -> None:
    """Send instances from the left of `pending`, each removed once it is dealt with.

    Parameters
    ----------
    done : callable
        Called after each with its C-STORE status, or with None and the reason why it
        was not sent.
    proceed : callable
        Asked before each; False stops.

    Raises
    ------
    SourceFailed
        The association is lost, the first of `pending` is why.
    DependencyDown
        The peer failed; the first of `pending` was in flight.
    """
    offers = by_class(channel.offers)
    ready: _Ready[T] | None = None
    while pending and proceed():
        current = ready or _prepare(source, pending[0], offers)
        ready = None
        status = None
        if current.offer is not None:
            number = channel.begin(current.instance, current.chunks, current.offer)
            if len(pending) > 1:
                # While the peer stores it.
                ready = _prepare(source, pending[1], offers)
            status = channel.finish(number)
        pending.popleft()
        done(current.instance, status, current.error)


def _prepare(
    source: Source[T], instance: T, offers: Mapping[str, Sequence[Offer]]
) -> _Ready[T]:
    """Read the first chunk: what cannot be read or converted shows before sending."""
    offer = choose(source, instance, offers)
    if offer is None:
        return _Ready(instance, error=NO_CONTEXT)
    try:
        chunks = source.dataset(instance, offer.transfer_syntax).chunks
        first = next(chunks, b"")
    except ImagingError as error:
        log.warning(
            "instance cannot be sent",
            extra={"event": "send.unreadable", "code": error.code},
        )
        return _Ready(instance, error=UNREADABLE)
    return _Ready(instance, offer, _guarded(first, chunks))


def _guarded(first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks; tell failures of ours from those of the peer."""
    yield first
    try:
        yield from chunks
    except ImagingError as error:
        raise SourceFailed(UNREADABLE) from error
