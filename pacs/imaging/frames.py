"""Where the frames of an object are; offsets count from the first data set byte.

Frame numbers count from 1. A frame whose bytes are not all there does not exist:
nothing is padded, and no byte of a neighbour is served (PS3.5 A.4).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pacs.imaging.dataset import PixelElement, Scan
from storage.kernel.errors import MalformedObject, NotFound

#: A frame number beyond this is nobody's.
MAX_FRAMES = 10_000_000
RLE = "1.2.840.10008.1.2.5"


@dataclass(frozen=True, slots=True)
class FrameTable:
    """Frames, either computed (native) or listed (encapsulated).

    Attributes
    ----------
    count : int
    start, size : int
        Native: first byte of the first frame, and bytes of one frame.
    fragments : array of uint64
        Encapsulated: offset and length of each fragment, alternating.
    first : array of uint64
        Encapsulated: index of each frame's first fragment, and one past the last.
    """

    count: int
    start: int = 0
    size: int = 0
    fragments: array[int] | None = None
    first: array[int] | None = None

    def __len__(self) -> int:
        return self.count

    @classmethod
    def empty(cls) -> FrameTable:
        """Return the table of an object without frames."""
        return cls(0)

    @classmethod
    def of_one_frame(cls, fragments: array[int]) -> FrameTable:
        """Return the table of a single frame that is all these fragments."""
        n = len(fragments) // 2
        return cls(1, 0, 0, fragments, array("Q", (0, n))) if n else cls.empty()

    @classmethod
    def native(
        cls,
        start: int,
        length: int,
        *,
        frames: int,
        rows: int | None,
        columns: int | None,
        samples: int | None,
        bits_allocated: int | None,
        subsampled: bool = False,
    ) -> FrameTable:
        """Return the table of native Pixel Data of `length` bytes at `start`.

        Frames of 1-bit data share bytes when their size is no multiple of 8; such
        an object is one unit and has a single entry only if it has one frame.
        """
        if not rows or not columns or not bits_allocated:
            return cls.empty()
        per_pixel = 2 if subsampled else samples or 1
        bits = rows * columns * per_pixel * bits_allocated
        if bits % 8:
            size = (bits * frames + 7) // 8
            whole = size <= length and frames == 1
            return cls(1, start, size) if whole else cls.empty()
        size = bits // 8
        if not size:
            return cls.empty()
        return cls(min(frames, length // size, MAX_FRAMES), start, size)

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Return (offset, length) of the parts of frame `number`, in order.

        Raises
        ------
        NotFound
        """
        if not 1 <= number <= self.count:
            raise NotFound(f"no frame {number}")
        if self.fragments is None or self.first is None:
            return [(self.start + (number - 1) * self.size, self.size)]
        return [
            (self.fragments[2 * i], self.fragments[2 * i + 1])
            for i in range(self.first[number - 1], self.first[number])
        ]

    def pack(self) -> bytes:
        """Return the table as bytes, for the index."""
        fragments = self.fragments or array("Q")
        first = self.first or array("Q")
        head = array("Q", (self.count, self.start, self.size, len(fragments)))
        return head.tobytes() + fragments.tobytes() + first.tobytes()

    @classmethod
    def unpack(cls, raw: bytes) -> FrameTable:
        """Return the table that `pack` wrote."""
        numbers = array("Q")
        numbers.frombytes(raw)
        count, start, size, n = numbers[:4]
        if not n:
            return cls(count, start, size)
        return cls(count, start, size, numbers[4 : 4 + n], numbers[4 + n :])


def frame_ranges(found: Scan, frames: int) -> FrameTable:
    """Return the frame table of a scanned object.

    Parameters
    ----------
    frames : int
        Number of Frames (0028,0008), or 1 when it is absent.

    Raises
    ------
    MalformedObject
        The fragments cannot be told apart into that many frames.
    """
    pixel = found.pixel
    if pixel is None:
        return FrameTable.empty()
    if not pixel.encapsulated:
        return FrameTable.native(
            pixel.value_offset,
            pixel.length,
            frames=frames,
            rows=found.unsigned(0x00280010),
            columns=found.unsigned(0x00280011),
            samples=found.unsigned(0x00280002),
            bits_allocated=found.unsigned(0x00280100),
            subsampled=found.text(0x00280004) == "YBR_FULL_422",
        )
    return _encapsulated(found, pixel, frames)


def _encapsulated(found: Scan, pixel: PixelElement, frames: int) -> FrameTable:
    n = len(pixel.fragments) // 2
    if n == 0:
        return FrameTable.empty()
    if frames == 1:
        first = array("Q", (0, n))
    elif n == frames:
        first = array("Q", range(n + 1))
    elif n < frames:
        # Fewer fragments than frames: the rest was never sent (or is one video).
        if n == 1:
            return FrameTable(1, 0, 0, pixel.fragments, array("Q", (0, 1)))
        first = array("Q", range(n + 1))
        return FrameTable(n, 0, 0, pixel.fragments, first)
    else:
        starts = (
            _from_extended_table(found, pixel, frames)
            or _from_basic_table(found, pixel, frames)
            or _from_markers(found, pixel, frames)
        )
        if starts is None:
            raise MalformedObject("fragments do not divide into frames", pixel.tag)
        first = array("Q", (*starts, n))
    return FrameTable(frames, 0, 0, pixel.fragments, first)


def _starts_at(pixel: PixelElement, offsets: Sequence[int]) -> list[int] | None:
    """Return the fragment at each offset, or None unless all are item starts.

    Offsets count from the first item after the offset table (PS3.5 A.4).
    """
    base = pixel.fragments[0] - 8
    index = {
        pixel.fragments[2 * i] - 8 - base: i for i in range(len(pixel.fragments) // 2)
    }
    starts = [index.get(offset, -1) for offset in offsets]
    ordered = all(a < b for a, b in pairwise(starts))
    return starts if starts and starts[0] == 0 and ordered else None


def _from_extended_table(
    found: Scan, pixel: PixelElement, frames: int
) -> list[int] | None:
    raw = found.values.get(0x7FE00001, b"")
    if len(raw) != 8 * frames:
        return None
    return _starts_at(pixel, [*_unsigned(raw, 8)])


def _from_basic_table(
    found: Scan, pixel: PixelElement, frames: int
) -> list[int] | None:
    offset, length = pixel.offset_table
    if length != 4 * frames:
        return None
    raw = bytes(found.buffer[offset : offset + length])
    return _starts_at(pixel, [*_unsigned(raw, 4)])


def _from_markers(found: Scan, pixel: PixelElement, frames: int) -> list[int] | None:
    """Take a fragment that begins with a codestream's first bytes as a frame start."""
    starts = []
    for i in range(len(pixel.fragments) // 2):
        offset = pixel.fragments[2 * i]
        if bytes(found.buffer[offset : offset + 4]).startswith(_STARTS):
            starts.append(i)
    return starts if len(starts) == frames and starts[0] == 0 else None


#: JPEG and JPEG-LS SOI, JPEG 2000 SOC, JP2 and JPEG XL signatures.
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0c", b"\xff\x0a")


def _unsigned(raw: bytes, size: int) -> array[int]:
    numbers = array("Q" if size == 8 else "I")
    numbers.frombytes(raw)
    return numbers
