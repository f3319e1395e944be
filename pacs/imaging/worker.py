"""The worker process: one job in, its answer out, over the socket at descriptor 0.

It has bounded memory, and every job bounded time; it dies of what is hostile and its
parent (`pacs.imaging.pool`) starts another. It needs no signal of its parent's death
(which would come with the end of the thread that started it): without a parent it
reads end of file, and an alarm ends whatever it is doing.

Request: `REQUEST`, the length of each payload, the handler's name, arguments (JSON),
the payloads: in the shared memory when they fit there, which costs half of what a
socket does. The parent only writes there. Answer: `ANSWER`, a head (JSON), a body.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any, Final

import orjson

from storage.kernel.errors import ImagingError, InvalidParameter, TooLarge

#: Seconds, lengths of handler and arguments, payloads, whether those are shared.
REQUEST: Final = struct.Struct("<IHIHB")
#: Bytes of the shared memory; a CT slice has half a million.
SHARED_BYTES: Final = 8 << 20
LENGTH: Final = struct.Struct("<Q")
#: Outcome, lengths of head and body.
ANSWER: Final = struct.Struct("<BIQ")
#: Outcomes.
DONE: Final = 0
REFUSED: Final = 1
"""The head says why: `code` (of an `ImagingError`), `message`, and its attributes."""
NO_MEMORY: Final = 2
#: Characters of a reason.
MAX_WORDS: Final = 400

Body = bytes | bytearray | memoryview
Handler = Callable[[dict[str, Any], list[bytearray]], tuple[dict[str, Any], Body]]
"""Takes arguments and payloads; returns head and body of the answer."""


def receive(sock: socket.socket, length: int) -> bytearray:
    """Return exactly `length` bytes.

    Raises
    ------
    EOFError
    """
    data = bytearray(length)
    view = memoryview(data)
    while view:
        n = sock.recv_into(view)
        if not n:
            raise EOFError
        view = view[n:]
    return data


@cache
def _handler(name: str) -> Handler:
    module, _, function = name.partition(":")
    found: Handler = getattr(import_module(module), function)
    return found


def each(
    arguments: dict[str, Any], payloads: list[bytearray]
) -> tuple[dict[str, Any], bytes]:
    """Do the same for each of many small payloads by itself; a job's handler.

    Arguments: `handler`, which gives a body only; `each`, its arguments for every
    payload. The head says how long each body is (`lengths`).
    """
    handler = _handler(arguments["handler"])
    bodies = [
        bytes(handler(how, [payload])[1])
        for how, payload in zip(arguments["each"], payloads, strict=True)
    ]
    return {"lengths": [len(body) for body in bodies]}, b"".join(bodies)


def _reason(error: Exception) -> dict[str, Any]:
    """Return what the parent makes the same error of."""
    text = str(error)
    if not isinstance(error, ImagingError):
        # Codecs raise what they like.
        return {
            "code": "input.malformed",
            "message": f"{type(error).__name__}: {text}"[:MAX_WORDS],
        }
    reason: dict[str, Any] = {"code": error.code}
    if isinstance(error, InvalidParameter):
        text = text.removeprefix(f"{error.name}: ")
        reason["name"] = error.name
    elif isinstance(error, TooLarge):
        reason |= {"limit": error.limit, "allowed": error.allowed}
    elif (tag := getattr(error, "tag", None)) is not None:
        reason["tag"] = tag
    return {**reason, "message": text[:MAX_WORDS]}


def _answer(sock: socket.socket, shared: memoryview) -> None:
    seconds, n_name, n_arguments, n_payloads, is_shared = REQUEST.unpack(
        receive(sock, REQUEST.size)
    )
    signal.alarm(seconds)
    begin = n_payloads * LENGTH.size
    front = receive(sock, begin + n_name + n_arguments)
    lengths = [LENGTH.unpack_from(front, i * LENGTH.size)[0] for i in range(n_payloads)]
    name = front[begin : begin + n_name].decode("ascii")
    arguments = orjson.loads(front[begin + n_name :])
    outcome: int
    head: dict[str, Any] = {}
    body: Body = b""
    try:
        if is_shared:
            ends = [*accumulate(lengths, initial=0)]
            payloads = [bytearray(shared[a:b]) for a, b in pairwise(ends)]
        else:
            payloads = [receive(sock, length) for length in lengths]
        head, body = _handler(name)(arguments, payloads)
        outcome = DONE
    except EOFError:
        raise
    except MemoryError:
        outcome = NO_MEMORY
    except Exception as error:  # noqa: BLE001  whatever it is costs this job only
        outcome, head = REFUSED, _reason(error)
    packed = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    sock.sendall(ANSWER.pack(outcome, len(packed), len(body)) + packed)
    sock.sendall(body)
    signal.alarm(0)


def _limit_memory(added: int) -> None:
    """Bound the address space to what is in use now and `added` bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        pages = int(file.read().split()[0])
    bound = pages * resource.getpagesize() + added
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Serve until the other end is closed."""
    # Loaded before memory is bounded.
    import_module("imagecodecs")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    memory = int(sys.argv[2])
    shared = memoryview(mmap.mmap(memory, SHARED_BYTES, prot=mmap.PROT_READ))
    os.close(memory)
    _limit_memory(int(sys.argv[1]))
    with socket.socket(fileno=0) as sock:
        while True:
            try:
                _answer(sock, shared)
            except (EOFError, ConnectionError):
                return


if __name__ == "__main__":
    main()
