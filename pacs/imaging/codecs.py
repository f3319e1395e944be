"""Decoding frames in bounded processes (`pacs.imaging.decoder`).

What can go wrong, and what the caller gets:

* the attributes or the code stream's own header are impossible, or contradict each
  other, or the codec refuses it: `MalformedObject`;
* it needs more memory than `decode_bytes`: `TooLarge`;
* the decoder dies or takes longer than `decode_seconds`, or too many wait:
  `DependencyDown`. That one request fails; the next gets a new process.

Frames that are only wrapped or deflated are unwrapped here, without a process.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

from pacs.imaging import decoder, syntaxes
from pacs.imaging.codestream import SHAPES, Shape
from pacs.imaging.dataset import Scan
from pacs.imaging.encoding import PIXEL_DATA, Buffer
from storage.kernel.errors import (
    DependencyDown,
    ImagingError,
    MalformedObject,
    TooLarge,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits

log = logging.getLogger(__name__)

SAMPLES, PHOTOMETRIC, PLANAR = 0x00280002, 0x00280004, 0x00280006
ROWS, COLUMNS = 0x00280010, 0x00280011
BITS_ALLOCATED, BITS_STORED = 0x00280100, 0x00280101
PIXEL_REPRESENTATION = 0x00280103

_JPEG = syntaxes.IMPLICIT_VR_LE + ".4."
ENCAPSULATED_UNCOMPRESSED: Final = "1.2.840.10008.1.2.1.98"
DEFLATED_FRAMES: Final = "1.2.840.10008.1.2.8.1"
#: Which codec reads which transfer syntax.
CODECS: Final = {
    **{_JPEG + n: "jpeg" for n in ("50", "51", "53", "55", "57", "70")},
    **{_JPEG + n: "jpegls" for n in ("80", "81")},
    **{_JPEG + n: "jpeg2k" for n in ("90", "91")},
    **{_JPEG + n: "htj2k" for n in ("201", "202", "203")},
    **{_JPEG + n: "jpegxl" for n in ("110", "111", "112")},
    "1.2.840.10008.1.2.5": "rle",
}
_JPEG_LOSSLESS = frozenset((_JPEG + "57", _JPEG + "70"))
_JPEGXL_LOSSLESS = _JPEG + "110"

#: A decoder that nobody needed for so many seconds is ended.
IDLE_SECONDS = 30.0
#: Requests that may wait for a decoder; more are told to come back.
MAX_WAITING = 64
#: Bytes of a decoder's reason why it decoded nothing.
MAX_WORDS = 1024
#: Start-up of a process, on top of the time for decoding.
START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """What the attributes of an object say about each frame (PS3.3 C.7.6.3).

    Attributes
    ----------
    signed : bool
        Pixel Representation (0028,0103) is 1.
    planar : int
        Planar Configuration (0028,0006) of native frames.
    words : bool
        Native samples of one byte lie in OW (swapped in pairs in big endian).
    """

    rows: int
    columns: int
    samples: int = 1
    bits_allocated: int = 16
    bits_stored: int = 16
    signed: bool = False
    photometric: str = "MONOCHROME2"
    planar: int = 0
    words: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= 65_535:
            raise MalformedObject("no frame size", ROWS)
        if not 1 <= self.columns <= 65_535:
            raise MalformedObject("no frame size", COLUMNS)
        if self.samples not in {1, 3, 4}:
            raise MalformedObject("impossible number of samples", SAMPLES)
        if self.bits_allocated not in {1, 8, 16, 32, 64}:
            raise MalformedObject("impossible sample size", BITS_ALLOCATED)

    @classmethod
    def from_scan(cls, found: Scan) -> DecodeSpec:
        """Read the attributes of a scanned object.

        Raises
        ------
        MalformedObject
            They describe no frame.
        """
        pixel = found.pixel
        words = False
        if pixel is not None and not pixel.encapsulated and found.explicit:
            at = found.header_end
            words = bytes(found.buffer[at + 4 : at + 6]) == b"OW"
        return cls.from_values(found.values, found.byte_order, words=words)

    @classmethod
    def from_values(
        cls, values: dict[int, bytes], order: str, *, words: bool = False
    ) -> DecodeSpec:
        """Read the attributes from raw values by tag."""

        def number(tag: int, default: int) -> int:
            raw = values.get(tag, b"")
            if not raw:
                return default
            if len(raw) != 2:
                raise MalformedObject("not a 16-bit number", tag)
            return int.from_bytes(raw, "big" if order == "big" else "little")

        bits = number(BITS_ALLOCATED, 0)
        photometric = values.get(PHOTOMETRIC, b"").decode("ascii", "replace")
        return cls(
            rows=number(ROWS, 0),
            columns=number(COLUMNS, 0),
            samples=number(SAMPLES, 1),
            bits_allocated=bits,
            bits_stored=number(BITS_STORED, bits),
            signed=number(PIXEL_REPRESENTATION, 0) == 1,
            photometric=photometric.strip(" \0"),
            planar=number(PLANAR, 0),
            words=words,
        )

    @property
    def frame_bits(self) -> int:
        return self.rows * self.columns * self.samples * self.bits_allocated

    @property
    def frame_bytes(self) -> int:
        """Bytes of a decoded frame, the last one filled up."""
        return -(-self.frame_bits // 8)


def decoded_photometric(transfer_syntax_uid: str, spec: DecodeSpec) -> str:
    """Return Photometric Interpretation of frames once decoded."""
    codec = CODECS.get(transfer_syntax_uid)
    stored = spec.photometric
    if codec is None or spec.samples != 3:
        return stored
    if codec in {"jpeg2k", "htj2k"}:
        return "RGB" if stored in {"YBR_ICT", "YBR_RCT"} else _full(stored)
    if codec == "jpeg" and transfer_syntax_uid not in _JPEG_LOSSLESS:
        return "RGB"
    if codec == "jpegxl" and transfer_syntax_uid != _JPEGXL_LOSSLESS:
        return "RGB"
    return _full(stored)


def _full(photometric: str) -> str:
    # Decoders give every pixel all its samples.
    return "YBR_FULL" if photometric == "YBR_FULL_422" else photometric


def is_planar(transfer_syntax_uid: str, spec: DecodeSpec) -> bool:
    """Tell whether decoded frames are colour by plane."""
    wrapped = transfer_syntax_uid not in CODECS
    return wrapped and spec.samples > 1 and spec.planar == 1


class DecoderObserver(Protocol):
    """Who counts what decoders do."""

    def decoded(self, codec: str, outcome: str, seconds: float) -> None:
        """Note one request and how it ended: ``"decoded"``, or an error's code."""
        ...


class DecoderPool:
    """Decoder processes, started when needed; safe for use by many threads.

    Parameters
    ----------
    limits : Limits
        `decode_seconds` and `decode_bytes` of one request.
    processes : int
        At most so many at a time.
    idle_seconds : float
        After which an unused process is ended.
    max_waiting : int
        Requests beyond it are refused at once.
    observer : DecoderObserver, optional
    """

    def __init__(
        self,
        limits: Limits,
        *,
        processes: int = 1,
        idle_seconds: float = IDLE_SECONDS,
        max_waiting: int = MAX_WAITING,
        observer: DecoderObserver | None = None,
    ) -> None:
        self._limits = limits
        self._observer = observer
        self._idle_seconds = idle_seconds
        self._max_waiting = max_waiting
        self._room = threading.Semaphore(processes)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._waiting = 0
        self._closed = False
        self._reaper: threading.Timer | None = None

    def decode(self, data: Buffer, transfer_syntax_uid: str, spec: DecodeSpec) -> bytes:
        """Return one frame as native little endian samples, `frame_bytes` long.

        Colour lies by pixel, unless `is_planar`; what the colours are says
        `decoded_photometric`.

        Raises
        ------
        MalformedObject, TooLarge, DependencyDown
        UnsupportedTransferSyntax
            There is no decoder for it.
        """
        if spec.frame_bytes > self._limits.inflated_bytes:
            raise TooLarge("inflated_bytes", self._limits.inflated_bytes)
        if transfer_syntax_uid == ENCAPSULATED_UNCOMPRESSED:
            return _whole(bytes(data[: spec.frame_bytes]), spec)
        if transfer_syntax_uid == DEFLATED_FRAMES:
            return _inflated(data, spec)
        codec = CODECS.get(transfer_syntax_uid)
        if codec is None:
            raise UnsupportedTransferSyntax(f"cannot decode {transfer_syntax_uid}")
        if spec.bits_allocated % 8:
            raise MalformedObject("impossible sample size", BITS_ALLOCATED)
        started = time.perf_counter()
        outcome = "failed"
        try:
            shape = _checked(codec, data, spec)
            decoded = self._ask(codec, data, spec, shape)
            outcome = "decoded"
        except ImagingError as error:
            outcome = error.code
            raise
        finally:
            if self._observer is not None:
                seconds = time.perf_counter() - started
                self._observer.decoded(codec, outcome, seconds)
        return decoded

    def close(self) -> None:
        """End all processes; nothing can be decoded afterwards."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            reaper, self._reaper = self._reaper, None
        if reaper is not None:
            reaper.cancel()
        for process in idle:
            process.end()

    def pids(self) -> list[int]:
        """Return the processes that wait for work."""
        with self._lock:
            return [process.pid for process in self._idle]

    def _ask(self, codec: str, data: Buffer, spec: DecodeSpec, shape: Shape) -> bytes:
        flags = decoder.SIGNED if spec.signed else 0
        untouched = spec.photometric == "RGB" and not shape.transformed
        if codec == "jpeg" and spec.samples == 3 and (shape.lossless or untouched):
            flags |= decoder.AS_STORED
        head = decoder.REQUEST.pack(
            decoder.CODECS.index(codec),
            flags,
            spec.rows,
            spec.columns,
            spec.samples,
            spec.bits_allocated,
            shape.precision,
            math.ceil(self._limits.decode_seconds) + 1,
            len(data),
        )
        with self._process() as process:
            outcome, body = process.ask(
                head, data, self._limits.decode_seconds, spec.frame_bytes
            )
        if outcome == decoder.TOO_LARGE:
            raise TooLarge("decode_bytes", self._limits.decode_bytes)
        if outcome == decoder.MALFORMED:
            words = body.decode("ascii", "replace")
            raise MalformedObject(f"code stream: {words}", PIXEL_DATA)
        return body

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        """Lend a process; one whose request failed is not used again."""
        self._wait()
        process: _Process | None = None
        try:
            process = self._take()
            yield process
        except BaseException:
            if process is not None:
                process.end()
            raise
        else:
            self._give_back(process)
        finally:
            self._room.release()

    def _wait(self) -> None:
        with self._lock:
            if self._closed:
                raise DependencyDown("decoders are closed")
            if self._waiting >= self._max_waiting:
                raise DependencyDown("decoders are busy")
            self._waiting += 1
        try:
            if not self._room.acquire(timeout=self._limits.decode_seconds):
                raise DependencyDown("decoders are busy")
        finally:
            with self._lock:
                self._waiting -= 1

    def _take(self) -> _Process:
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return _Process(self._limits.decode_bytes)
            if process.is_alive():
                return process
            process.end()

    def _give_back(self, process: _Process) -> None:
        process.used = time.monotonic()
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                if self._reaper is None:
                    self._reaper = self._start_reaper()
                return
        process.end()

    def _start_reaper(self) -> threading.Timer:
        timer = threading.Timer(self._idle_seconds, self._reap)
        timer.daemon = True
        timer.name = "decoder-reaper"
        timer.start()
        return timer

    def _reap(self) -> None:
        """End processes that nobody used lately; come again while any are left."""
        before = time.monotonic() - self._idle_seconds
        with self._lock:
            old = [process for process in self._idle if process.used <= before]
            self._idle = [process for process in self._idle if process.used > before]
            again = self._idle and not self._closed
            self._reaper = self._start_reaper() if again else None
        for process in old:
            process.end()


def _environment() -> dict[str, str]:
    """Return ours without the settings: passwords are no business of a decoder."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HUYING_")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class _Process:
    """One decoder process and the socket to it."""

    def __init__(self, decode_bytes: int) -> None:
        self.used = 0.0
        self._fresh = True
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603
                    (sys.executable, "-P", "-m", decoder.__name__, str(decode_bytes)),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                )
            except OSError as error:
                self._socket.close()
                raise DependencyDown("no decoder process could be started") from error

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def ask(
        self, head: bytes, data: Buffer, seconds: float, expected: int
    ) -> tuple[int, bytes]:
        """Send a request and return outcome and body of the answer.

        Raises
        ------
        DependencyDown
            The process died, took too long, or answered nonsense; end it.
        """
        if self._fresh:
            seconds += START_SECONDS
            self._fresh = False
        deadline = time.monotonic() + seconds
        try:
            for part in (head, data):
                self._socket.settimeout(_left(deadline))
                self._socket.sendall(part)
            outcome, length = decoder.ANSWER.unpack(
                self._receive(decoder.ANSWER.size, deadline)
            )
            sane = length == expected
            if outcome != decoder.DECODED:
                sane = length <= MAX_WORDS
            if not sane:
                raise DependencyDown("the decoder answered nonsense")
            return outcome, bytes(self._receive(length, deadline))
        except TimeoutError:
            log.warning("decoder took too long", extra={"decoder": self.pid})
            raise DependencyDown(f"the decoder took over {seconds:g} s") from None
        except (EOFError, OSError):
            log.warning("decoder died", extra={"decoder": self.pid})
            raise DependencyDown("the decoder died of this code stream") from None

    def _receive(self, length: int, deadline: float) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            self._socket.settimeout(_left(deadline))
            n = self._socket.recv_into(view)
            if not n:
                raise EOFError
            view = view[n:]
        return data

    def end(self) -> None:
        """Kill the process, whatever it does, and wait for it."""
        self._socket.close()
        with suppress(OSError):
            self._popen.kill()
        self._popen.wait()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _checked(codec: str, data: Buffer, spec: DecodeSpec) -> Shape:
    """Compare what the code stream declares with the attributes, before decoding."""
    shape = SHAPES[codec](data)
    if codec == "rle":
        if shape.samples != spec.samples * spec.bits_allocated // 8:
            raise MalformedObject("code stream: not as many RLE segments", PIXEL_DATA)
        return shape
    if (shape.rows, shape.columns) != (spec.rows, spec.columns):
        raise MalformedObject(
            f"code stream is {shape.columns} x {shape.rows}, "
            f"attributes say {spec.columns} x {spec.rows}",
            PIXEL_DATA,
        )
    if shape.samples and shape.samples != spec.samples:
        raise MalformedObject(
            f"code stream has {shape.samples} components, not {spec.samples}",
            PIXEL_DATA,
        )
    if shape.precision > spec.bits_allocated:
        raise MalformedObject(
            f"code stream has {shape.precision} bits, not {spec.bits_allocated}",
            PIXEL_DATA,
        )
    return shape


def _whole(data: bytes, spec: DecodeSpec) -> bytes:
    if len(data) < spec.frame_bytes:
        raise MalformedObject("a frame is too short", PIXEL_DATA)
    return data


def _inflated(data: Buffer, spec: DecodeSpec) -> bytes:
    """Inflate a frame as far as it should go (PS3.5 A.4.13)."""
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
            data, spec.frame_bytes
        )
    except zlib.error as error:
        raise MalformedObject("not a deflated frame", PIXEL_DATA) from error
    return _whole(inflated, spec)
