"""Reading DIMSE messages out of P-DATA-TF PDUs, each length checked before use.

The bounds are those of the association: the PDU length we announced, the size of a
command set, the size of a data set, and the number of fragments (PS3.8 9.3.5, Annex
E).
"""

from __future__ import annotations

from collections.abc import Callable

from pacs.dimse import command
from pacs.dimse.command import Value
from pacs.dimse.hashing import RunningDigest
from pacs.dimse.pdu import (
    COMMAND,
    HEADER,
    LAST,
    PDV,
    AbortReason,
    PduType,
    ProtocolError,
)
from pacs.dimse.transport import PROGRESS, PeerGone, Stopping, Wire

#: Fragments of one message: so many, and beyond them one for so many bytes.
MAX_FRAGMENTS = 4096
BYTES_PER_FRAGMENT = 64
#: Bytes of the shortest PDUs that end an association.
_SHORT_PDU = 10


class ReleaseRequested(Exception):
    """The peer sent A-RELEASE-RQ."""


class MessageReader:
    """The stream of PDVs of one association.

    Parameters
    ----------
    wire : Wire
    max_pdu : int
        The longest PDU we announced.
    command_bytes : int
        Bound of a command set.
    read_seconds : float
        A message must make progress within this time.
    """

    def __init__(
        self, wire: Wire, *, max_pdu: int, command_bytes: int, read_seconds: float
    ) -> None:
        self._wire = wire
        self._max_pdu = max_pdu
        self._command_bytes = command_bytes
        self._read_seconds = read_seconds
        #: Bytes left in the PDU that is being read.
        self._left = 0

    def wait(self, what: str, seconds: float) -> None:
        """Wait for the next message; shutdown is seen here.

        Raises
        ------
        PeerGone, TimedOut, Stopping
        """
        if self._wire.stopping:
            raise Stopping
        if self._left == 0 and not self._wire.buffered:
            self._wire.expect(what, seconds)
            self._wire.need(1, interruptible=True)

    def read_command(self) -> tuple[int, dict[int, Value]]:
        """Read a command set; return its context and elements.

        Raises
        ------
        ReleaseRequested
            Instead of a message.
        ProtocolError, PeerGone, TimedOut
        """
        wire = self._wire
        wire.expect("read", self._read_seconds)
        size, context_id, flags = self._next_pdv(between_messages=True)
        whole = b""
        fragments = 0
        while True:
            if not flags & COMMAND:
                raise ProtocolError(
                    "a data set fragment where a command belongs",
                    AbortReason.UNEXPECTED_PARAMETER,
                )
            fragments += 1
            if len(whole) + size > self._command_bytes:
                raise ProtocolError("the command set is too long")
            _check_number(fragments, len(whole))
            whole += wire.read(size)
            if flags & LAST:
                return context_id, command.decode(whole)
            size, other, flags = self._next_pdv()
            if other != context_id:
                raise ProtocolError("fragments of two contexts are mixed")

    def read_dataset(self, context_id: int, most: int) -> bytes:
        """Read the data set of a small message whole.

        Raises
        ------
        ProtocolError
            Also when it is longer than `most`.
        """
        parts: list[bytes] = []
        total = fragments = 0
        while True:
            size, other, flags = self._next_pdv()
            _check_fragment(context_id, other, flags)
            total += size
            fragments += 1
            if total > most:
                raise ProtocolError("the data set is too long")
            _check_number(fragments, total)
            parts.append(self._wire.read(size))
            if flags & LAST:
                return b"".join(parts)

    def receive_dataset(
        self,
        context_id: int,
        buffer: memoryview,
        digest: RunningDigest | None,
        *,
        most: int,
        spill: Callable[[memoryview], None],
    ) -> tuple[int, int]:
        """Read a data set into `buffer`, each fragment straight to its place.

        A fragment and the headers of the next one come in one system call. What
        does not fit goes to `spill`, from the front.

        Parameters
        ----------
        buffer : memoryview
            Longer than a PDU by 16 bytes at least.
        digest : RunningDigest or None
            Gets every byte.
        most : int
            Bound of the data set.

        Returns
        -------
        total, kept : int
            Bytes of the data set, and those of its end that are in `buffer`.
        """
        wire = self._wire
        total = kept = fragments = 0
        mark = 0
        room = len(buffer)
        size, other, flags = self._next_pdv()
        while True:
            _check_fragment(context_id, other, flags)
            total += size
            fragments += 1
            if total > most:
                raise ProtocolError("the data set is too long")
            _check_number(fragments, total)
            last = flags & LAST
            extra = 0 if last else (6 if self._left else 12)
            if kept + size + extra > room:
                if digest is not None:
                    digest.settle()
                spill(buffer[:kept])
                kept = 0
            stop = kept + size
            if size or extra:
                least = size if last else size + (extra if extra == 6 else _SHORT_PDU)
                got = wire.read_into(buffer[kept : stop + extra], least)
            if digest is not None:
                later = bool(last) or wire.has_input
                digest.update(buffer[kept:stop], later=later)
            if total - mark >= PROGRESS:
                mark = total
                wire.expect("read", self._read_seconds)
            head = kept + size
            kept = stop
            if last:
                return total, kept
            size, other, flags = self._after(buffer[head : head + extra], got - size)

    def _after(self, head: memoryview, got: int) -> tuple[int, int, int]:
        """Return the PDV whose header was read behind the fragment before it."""
        if got < len(head) or len(head) == 12:
            self._wire.unread(head[:got])
            return self._next_pdv()
        return self._checked_pdv(*PDV.unpack(head))

    def _next_pdv(self, *, between_messages: bool = False) -> tuple[int, int, int]:
        """Read the header of the next PDV: size of its fragment, context, flags."""
        wire = self._wire
        while self._left == 0:
            self._next_pdu(between_messages=between_messages)
        if self._left < 6:
            raise ProtocolError("a presentation data value is cut off")
        wire.need(6)
        size, context_id, flags = PDV.unpack(wire.peek(6))
        wire.take(6)
        return self._checked_pdv(size, context_id, flags)

    def _checked_pdv(
        self, size: int, context_id: int, flags: int
    ) -> tuple[int, int, int]:
        if size < 2 or size + 4 > self._left:
            raise ProtocolError("a presentation data value does not fit its PDU")
        self._wire.check()
        self._left -= size + 4
        return size - 2, context_id, flags

    def _next_pdu(self, *, between_messages: bool) -> None:
        """Read a PDU header; only P-DATA-TF with content goes on."""
        wire = self._wire
        wire.need(6)
        kind, length = HEADER.unpack(wire.peek(6))
        if kind == PduType.DATA:
            if length > self._max_pdu:
                raise ProtocolError("a PDU is longer than announced")
            if length < 6:
                raise ProtocolError("a P-DATA-TF PDU is empty")
            wire.take(6)
            self._left = length
            return
        if kind in {PduType.RELEASE_RQ, PduType.ABORT}:
            if length != 4:
                raise ProtocolError("a PDU has the wrong length")
            wire.need(_SHORT_PDU)
            wire.take(_SHORT_PDU)
            if kind == PduType.ABORT:
                raise PeerGone("aborted by the peer")
            if between_messages:
                raise ReleaseRequested
        known = kind in set(PduType)
        raise ProtocolError(
            "a PDU of this type does not belong here",
            AbortReason.UNEXPECTED_PDU if known else AbortReason.UNRECOGNIZED_PDU,
        )


def _check_number(fragments: int, size: int) -> None:
    if fragments > MAX_FRAGMENTS + size // BYTES_PER_FRAGMENT:
        raise ProtocolError("the fragments are too small")


def _check_fragment(context_id: int, other: int, flags: int) -> None:
    if flags & COMMAND:
        raise ProtocolError(
            "a command fragment where a data set belongs",
            AbortReason.UNEXPECTED_PARAMETER,
        )
    if other != context_id:
        raise ProtocolError("fragments of two contexts are mixed")
