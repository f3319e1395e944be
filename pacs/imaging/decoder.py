"""The decoder process: one frame in, its samples out, over the socket at descriptor 0.

It has bounded memory, and every request bounded time; it dies of what is hostile and
its parent starts another. It needs no signal of its parent's death (which would come
with the end of the thread that started it): without a parent it reads end of file, and
an alarm ends whatever it is doing.

Request: `REQUEST`, then the code stream. Answer: `ANSWER`, then samples or a reason.
"""

from __future__ import annotations

import resource
import signal
import socket
import struct
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]

#: codec, flags, rows, columns, samples, bits allocated, precision, seconds, length.
REQUEST: Final = struct.Struct("<BBIIHHHIQ")
#: outcome, length.
ANSWER: Final = struct.Struct("<BQ")
CODECS: Final = ("jpeg", "jpegls", "jpeg2k", "htj2k", "jpegxl", "rle")
#: Flags of a request.
SIGNED: Final = 1
AS_STORED: Final = 2
"""Leave colours as they are in the code stream."""
#: Outcomes.
DECODED: Final = 0
MALFORMED: Final = 1
TOO_LARGE: Final = 2


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


class Undecodable(ValueError):
    """The code stream is broken or not what the attributes say."""


def decode(
    codec: str,
    data: bytes | bytearray,
    *,
    rows: int,
    columns: int,
    samples: int,
    bits_allocated: int,
    precision: int,
    flags: int,
) -> Array:
    """Return the samples of a frame, colour by pixel, as little endian needs them."""
    import numpy as np

    if codec == "rle":
        return _rle(data, rows, columns, samples, bits_allocated // 8)
    decoded: Array = np.asarray(_codec(codec, data, flags & AS_STORED))
    wanted = (rows, columns) if samples == 1 else (rows, columns, samples)
    if decoded.shape != wanted:
        raise Undecodable(f"decoded to {decoded.shape}, not {wanted}")
    if decoded.dtype.kind not in "iu":
        raise Undecodable(f"decoded to {decoded.dtype.name}")
    signed = bool(flags & SIGNED)
    if 8 * decoded.itemsize > bits_allocated:
        raise Undecodable(f"{8 * decoded.itemsize} bits, not {bits_allocated}")
    target = np.dtype(f"<{'i' if signed else 'u'}{bits_allocated // 8}")
    if signed and decoded.dtype.kind == "u" and 0 < precision < bits_allocated:
        # Only JPEG 2000 knows signs: elsewhere the samples are bit patterns.
        shift = bits_allocated - precision
        widened: Array = decoded.astype(target)
        return np.right_shift(np.left_shift(widened, shift), shift)
    if not signed and decoded.dtype.kind == "i" and 0 < precision < bits_allocated:
        mask = target.type((1 << precision) - 1)
        masked: Array = np.bitwise_and(decoded.astype(target), mask)
        return masked
    return decoded.astype(target, copy=False)


def _codec(codec: str, data: bytes | bytearray, as_stored: int) -> Any:
    import imagecodecs

    if codec == "jpeg":
        if as_stored:
            return imagecodecs.jpeg8_decode(data, colorspace="rgb", outcolorspace="rgb")
        return imagecodecs.jpeg8_decode(data)
    if codec == "jpegls":
        return imagecodecs.jpegls_decode(data)
    if codec == "jpeg2k":
        return imagecodecs.jpeg2k_decode(data, numthreads=1)
    if codec == "htj2k":
        return imagecodecs.htj2k_decode(data)
    return imagecodecs.jpegxl_decode(data, numthreads=1)


def _rle(
    data: bytes | bytearray, rows: int, columns: int, samples: int, size: int
) -> Array:
    """Decode RLE segments: one per byte of a sample, high byte first (PS3.5 G.2)."""
    import imagecodecs
    import numpy as np

    n, *offsets = struct.unpack_from("<16I", data)
    if n != samples * size:
        raise Undecodable(f"{n} RLE segments, not {samples * size}")
    pixels = rows * columns
    bounds = [*offsets[:n], len(data)]
    out = np.empty((pixels, samples, size), np.uint8)
    for i in range(n):
        # A padded odd segment may decode to a byte more.
        plane = np.frombuffer(
            imagecodecs.packbits_decode(data[bounds[i] : bounds[i + 1]]), np.uint8
        )
        if plane.size < pixels:
            raise Undecodable("an RLE segment is too short")
        out[:, i // size, size - 1 - i % size] = plane[:pixels]
    return out


def _answer(sock: socket.socket) -> None:
    head = REQUEST.unpack(receive(sock, REQUEST.size))
    codec, flags, rows, columns, samples, bits, precision, seconds, length = head
    signal.alarm(seconds)
    data = receive(sock, length)
    try:
        decoded = decode(
            CODECS[codec],
            data,
            rows=rows,
            columns=columns,
            samples=samples,
            bits_allocated=bits,
            precision=precision,
            flags=flags,
        )
        outcome, body = DECODED, memoryview(decoded.tobytes())
    except MemoryError:
        outcome, body = TOO_LARGE, memoryview(b"")
    except Exception as error:  # noqa: BLE001  codecs raise what they like
        text = f"{type(error).__name__}: {error}"[:200]
        outcome, body = MALFORMED, memoryview(text.encode("ascii", "replace"))
    sock.sendall(ANSWER.pack(outcome, len(body)))
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
    _limit_memory(int(sys.argv[1]))
    with socket.socket(fileno=0) as sock:
        while True:
            try:
                _answer(sock)
            except (EOFError, ConnectionError):
                return


if __name__ == "__main__":
    main()
