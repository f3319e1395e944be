"""Bytes over one connection, with every wait bounded.

Sockets stay blocking and the kernel wakes each call after `TICK` seconds
(SO_RCVTIMEO, SO_SNDTIMEO), so that MSG_WAITALL fills a whole fragment in one call
while deadlines and shutdown are still seen. Small reads go through a read-ahead
buffer: a command set and the headers around it cost one system call.
"""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

from storage.kernel.limits import KIB

#: How often a waiting call looks at deadlines and at shutdown, in seconds.
TICK = 0.5
#: What a message in hand may still take once the process is told to stop.
STOP_GRACE = 10.0
#: How long a peer may read our last words before the connection is closed.
LINGER = 0.5
#: A timer inside a message starts again after this much progress, so that a peer
#: that sends a byte now and then does not hold its slot for ever.
PROGRESS = 4 * KIB
#: A pause inside a message that smells of a delayed acknowledgement, in seconds.
STALL = 0.02
_FIRST_ACKS = 16
_NO_INPUT = bytes(4)
_FOR_EVER = 1 << 62
_AHEAD = 8 * KIB
_MAX_BUFFERS = 512

Buffer = bytes | bytearray | memoryview


class PeerGone(Exception):
    """The connection ended, or the peer sent A-ABORT: there is nobody to answer."""


class TimedOut(Exception):
    """The peer took longer than a timer allows."""


class Stopping(Exception):
    """This process ends; raised only between messages."""


class Wire:
    """A connected socket.

    Parameters
    ----------
    connection : socket
        Plain or TLS, handshake done; this object closes it.
    stop : Event
        Set when the process ends.
    """

    def __init__(self, connection: socket.socket, stop: threading.Event) -> None:
        self._socket = connection
        self._stop = stop
        self._stopped_at = 0.0
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        self._deadline = 0.0
        self._what = ""
        self._buffer = bytearray(_AHEAD)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._quick_acks = _FIRST_ACKS
        self._flags = 0 if self._is_tls else socket.MSG_WAITALL
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._is_tls:
            connection.settimeout(TICK)
        else:
            connection.settimeout(None)
            tick = struct.pack("ll", int(TICK), int(TICK % 1 * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)

    def expect(self, what: str, seconds: float) -> None:
        """Start the timer `what`: reads and writes fail when it runs out."""
        self._what = what
        self._deadline = time.monotonic() + seconds

    def check(self) -> None:
        """Fail when the timer has run out, also while bytes keep coming.

        Raises
        ------
        TimedOut, Stopping
        """
        self._tick(interruptible=False)

    @property
    def stopping(self) -> bool:
        """Whether this process is told to stop."""
        return self._stop.is_set()

    @property
    def has_input(self) -> bool:
        """Whether the peer has sent more than was read, without waiting."""
        raw = fcntl.ioctl(self._socket, termios.FIONREAD, _NO_INPUT)
        return raw != _NO_INPUT or self._end > self._start

    @property
    def buffered(self) -> int:
        """Bytes that are read ahead."""
        return self._end - self._start

    def need(self, size: int, *, interruptible: bool = False) -> None:
        """Read ahead until `size` bytes are there; at most 8 KiB.

        Raises
        ------
        PeerGone, TimedOut
        Stopping
            Only when `interruptible`.
        """
        while self._end - self._start < size:
            self._make_room(size)
            got = self._receive(self._view[self._end :], 0, inside=not interruptible)
            if got < 0:
                self._tick(interruptible=interruptible)
                continue
            if got == 0:
                raise PeerGone("connection closed")
            self._end += got
            if self._end - self._start < size:
                self._tick(interruptible=False)

    def peek(self, size: int) -> memoryview:
        """Return the next `size` bytes that are read ahead, without taking them."""
        return self._view[self._start : self._start + size]

    def take(self, size: int) -> bytes:
        """Take `size` bytes that are read ahead."""
        start = self._start
        self._start = start + size
        return bytes(self._view[start : start + size])

    def read(self, size: int) -> bytes:
        """Take `size` bytes; the caller has bounded `size`."""
        if size <= _AHEAD:
            self.need(size)
            return self.take(size)
        whole = bytearray(size)
        self.read_into(memoryview(whole), size)
        return bytes(whole)

    def read_into(self, view: memoryview, least: int) -> int:
        """Fill `view`; return how much came, which is all unless the peer pauses.

        Parameters
        ----------
        least : int
            A pause ends the wait once this many bytes are there.
        """
        size = len(view)
        got = min(self._end - self._start, size)
        if got:
            view[:got] = self._view[self._start : self._start + got]
            self._start += got
        while got < size:
            more = self._receive(view[got:], self._flags)
            if more > 0:
                got += more
                if got < size:
                    self._tick(interruptible=False)
                continue
            if got >= least:
                break
            if more == 0:
                raise PeerGone("connection closed")
            self._tick(interruptible=False)
        return got

    def unread(self, data: Buffer) -> None:
        """Put back what was taken last; at most the headers of a PDU."""
        size = len(data)
        if self._start < size:
            # It did not come from the buffer, which is therefore empty.
            self._start = self._end = size
        self._start -= size
        self._view[self._start : self._start + size] = data

    def poll(self) -> bool:
        """Tell whether the peer has sent anything, without waiting.

        Raises
        ------
        PeerGone
        """
        if self._end > self._start:
            return True
        self._make_room(1)
        try:
            if self._is_tls:
                self._socket.settimeout(0)
                try:
                    got = self._socket.recv_into(self._view[self._end :])
                finally:
                    self._socket.settimeout(TICK)
            else:
                got = self._socket.recv_into(
                    self._view[self._end :], 0, socket.MSG_DONTWAIT
                )
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            raise PeerGone(_reason(error)) from error
        if not got:
            raise PeerGone("connection closed")
        self._end += got
        return True

    def send(self, buffers: Iterable[Buffer], seconds: float) -> None:
        """Send everything; the timer restarts whenever the peer makes progress.

        Raises
        ------
        PeerGone, TimedOut
        """
        pending = [memoryview(one) for one in buffers if len(one)]
        self.expect("write", seconds)
        since = 0
        while pending:
            sent = self._transmit(pending)
            if sent < 0:
                self._tick(interruptible=False)
                continue
            since += sent
            if since >= PROGRESS:
                self.expect("write", seconds)
                since = 0
            pending = _rest(pending, sent)

    def close(self, last_words: bytes = b"") -> None:
        """Send `last_words`, give the peer a moment to read them, and close.

        Closing with unread input would make the kernel send a reset that
        overtakes them.
        """
        try:
            if last_words:
                self.send((last_words,), LINGER)
                self._say_goodbye()
                self._drain()
        except (OSError, PeerGone, TimedOut):
            pass
        finally:
            self._view.release()
            self._socket.close()

    def _say_goodbye(self) -> None:
        """End our half: close_notify of TLS without waiting for the peer's, FIN."""
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(0)
            with suppress(OSError, ValueError):
                self._socket.unwrap()
        self._socket.shutdown(socket.SHUT_WR)

    def _drain(self) -> None:
        until = time.monotonic() + LINGER
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv_into(self._view):
                return

    def _make_room(self, size: int) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + size > _AHEAD:
            kept = bytes(self._view[self._start : self._end])
            self._view[: len(kept)] = kept
            self._start, self._end = 0, len(kept)

    def _receive(self, view: memoryview, flags: int, *, inside: bool = True) -> int:
        """Return how many bytes came, 0 at the end, -1 after a tick without any.

        A sender that leaves Nagle's algorithm on waits for an acknowledgement that
        the kernel delays by 40 ms. Asking for it at once costs a packet for each
        call, so it is done at first, and for good with peers that were seen to stall.

        Parameters
        ----------
        inside : bool
            A message has begun: the peer has no reason to pause.
        """
        if self._quick_acks:
            self._quick_acks -= 1
            with suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        started = time.monotonic()
        try:
            got = self._socket.recv_into(view, 0, flags)
        except (BlockingIOError, TimeoutError):
            return -1
        except OSError as error:
            raise PeerGone(_reason(error)) from error
        if inside and time.monotonic() - started > STALL:
            self._quick_acks = _FOR_EVER
        return got

    def _transmit(self, pending: Sequence[memoryview]) -> int:
        try:
            if self._is_tls:
                return self._socket.send(b"".join(pending[:_MAX_BUFFERS]))
            return self._socket.sendmsg(pending[:_MAX_BUFFERS])
        except (BlockingIOError, TimeoutError):
            return -1
        except OSError as error:
            raise PeerGone(_reason(error)) from error

    def _tick(self, *, interruptible: bool) -> None:
        now = time.monotonic()
        if self._stop.is_set():
            if interruptible:
                raise Stopping
            self._stopped_at = self._stopped_at or now
            if now > self._stopped_at + STOP_GRACE:
                raise Stopping
        if now >= self._deadline:
            raise TimedOut(f"{self._what} timer")


def _rest(pending: list[memoryview], sent: int) -> list[memoryview]:
    """Return what is left of `pending` after `sent` bytes."""
    for number, one in enumerate(pending):
        if sent < len(one):
            return [one[sent:], *pending[number + 1 :]]
        sent -= len(one)
    return []


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
