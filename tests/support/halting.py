"""A way to a server that can be cut, held up, or made to answer with an error."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Self

CHUNK = 1 << 16
BROKEN = (
    b"HTTP/1.1 500 Internal Server Error\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)


class Way(StrEnum):
    """What becomes of what is sent."""

    OPEN = "open"
    STALLED = "stalled"
    BROKEN = "broken"


class HaltingProxy:
    """Passes connections of this machine on to a port.

    Attributes
    ----------
    way : Way
        Taken by each connection once it has something to send; those that pass
        already stop at their next bytes.
    """

    def __init__(self, port: int) -> None:
        self.way = Way.OPEN
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._stopped = threading.Event()
        self._opened: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._begin(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for one in self._opened:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def _begin(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._opened.append(client)
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._opened.append(server)
            self._begin(self._pass, client, server, True)
            self._begin(self._pass, server, client, False)

    def _pass(
        self,
        source: socket.socket,
        target: socket.socket,
        asks: bool,  # noqa: FBT001
    ) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK):
                if self.way is Way.BROKEN and asks:
                    source.sendall(BROKEN)
                    break
                while self.way is Way.STALLED and not self._stopped.wait(0.05):
                    pass
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
