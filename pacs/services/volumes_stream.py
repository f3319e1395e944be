"""The frames of whole series, one after the other, in the order of their planes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson

from pacs.domain.attributes import text, whole
from pacs.domain.study import Level, StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.encoders import HTJ2K_LOSSLESS_RPCL, is_encodable
from pacs.rendering.volume import NotAVolume
from pacs.rendering.volume_levels import MAX_LEVEL, reduce, reduced_size
from pacs.services.frames import FrameForm
from pacs.services.retrieve import RetrieveService
from pacs.services.sources import ByteSource
from pacs.services.volumes import VolumeService, one_tenant
from storage.kernel.errors import (
    ImagingError,
    InvalidParameter,
    NotFound,
    TooLarge,
)
from storage.kernel.limits import MIB
from storage.kernel.types import Actor

Order = Literal["middle-out", "ascending"]
Form = Literal["stored", "raw", "htj2k"]

#: Stored in it already, with or without loss.
HTJ2K: Final = frozenset(f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203))
#: Frames of one series that one answer holds.
MAX_FRAMES: Final = 100_000
#: So much can be announced whatever is stored: black images are next to nothing.
PLAIN: Final = 256 * MIB
#: Photometric interpretations whose neighbouring samples can be averaged.
_SMOOTH: Final = frozenset(
    ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_RCT", "YBR_ICT")
)


@dataclass(frozen=True, slots=True)
class Place:
    """One frame of a series.

    Attributes
    ----------
    length : int or None
        Bytes, when they are known before the frame is read.
    """

    instance: int
    frame_number: int
    syntax: int
    rows: int
    columns: int
    length: int | None
    reduced: bool


@dataclass(frozen=True, slots=True)
class Frames:
    """Which frames a series has, in the order they are sent.

    Attributes
    ----------
    opened : dict
        The frames of multi-frame instances that have been looked up, for the next one.
    """

    study: str
    series: str
    version: str
    stored: tuple[StoredInstance, ...]
    attributes: Mapping[str, Mapping[str, Any]]
    syntaxes: tuple[str, ...]
    places: tuple[Place, ...]
    form: Form
    level: int
    opened: dict[int, list[FrameForm]] = field(default_factory=dict)


class SeriesStream:
    """Find and read the frames of series.

    Parameters
    ----------
    volumes : VolumeService
        Knows the order of planes.
    """

    def __init__(self, retrieve: RetrieveService, volumes: VolumeService) -> None:
        self._retrieve = retrieve
        self._volumes = volumes

    def frames(
        self, actor: Actor, series_uid: str, *, form: Form, order: Order, level: int
    ) -> Frames:
        """Return which frames a series has.

        Parameters
        ----------
        form : {"stored", "raw", "htj2k"}
            As stored (native ones always in little endian), decoded, or in HTJ2K
            without loss, resolution after resolution, where grey frames are not
            stored with loss; a kept rendition is used, else each is encoded.
        order : {"middle-out", "ascending"}
            Of planes along their normal, where they have one; else of presentation.
        level : int
            0: every pixel; n: rows and columns divided by 2**n, raw only.

        Raises
        ------
        NotFound
            No such series, or it has no frames.
        InvalidParameter, TooLarge
        """
        if not 0 <= level <= MAX_LEVEL:
            raise InvalidParameter("level", f"is not from 0 to {MAX_LEVEL}")
        if level and form != "raw":
            raise InvalidParameter("level", "frames as stored have one size: ask raw")
        found = self._retrieve.select(actor, Level.SERIES, {0x0020000E: (series_uid,)})
        if not found:
            raise NotFound("no such series")
        study = found[0].study_instance_uid
        actor = one_tenant(self._retrieve, actor, study)
        stored = [
            one
            for one in self._retrieve.instances(actor, study, series_uid)
            if one.pixel_offset is not None and one.rows and one.columns
        ]
        if not stored:
            raise NotFound("the series has no frames")
        numbered = self._numbered(actor, study, series_uid, stored)
        if order == "middle-out":
            numbered = middle_out(numbered)
        attributes = self._attributes(actor, study, series_uid) if level else {}
        names: list[str] = []
        places = []
        failing = [self._is_failing(one, _sent(one, form)) for one in stored]
        for index, frame_number in numbered:
            syntax_uid = _sent(stored[index], form)
            if syntax_uid not in names:
                names.append(syntax_uid)
            places.append(
                _place(
                    index,
                    stored[index],
                    frame_number,
                    names.index(syntax_uid),
                    level=level,
                    native=syntax_uid == syntaxes.EXPLICIT_VR_LE and not failing[index],
                )
            )
        self._check_announced(stored, places)
        version = hashlib.sha256(f"{form} {level} {order}".encode())
        for one in stored:
            version.update(one.digest)
        return Frames(
            study,
            series_uid,
            version.hexdigest()[:32],
            tuple(stored),
            attributes,
            tuple(names),
            tuple(places),
            form,
            level,
        )

    def read(self, frames: Frames, position: int) -> tuple[int, Iterator[bytes]]:
        """Return length and bytes of one of the frames.

        Raises
        ------
        NotFound, MalformedObject, UnsupportedTransferSyntax, Unavailable
        """
        place = frames.places[position]
        stored = frames.stored[place.instance]
        target: str | None = frames.syntaxes[place.syntax]
        if target == stored.transfer_syntax_uid:
            target = None
        source = self._opened(frames, place, target)
        if not place.reduced:
            return source.length, source.chunks()
        data = source.read(0, source.length)
        made = _reduced(stored, frames.attributes, data, frames.level)
        return len(made), iter((made,))

    def _opened(self, frames: Frames, place: Place, target: str | None) -> ByteSource:
        stored, number = frames.stored[place.instance], place.frame_number
        if (stored.number_of_frames or 1) == 1:
            return self._retrieve.open_frame(stored, number, target)
        forms = frames.opened.get(place.instance)
        if forms is None:
            # One look at the frame table for all of them, not one for each.
            numbers = range(1, self._count(stored) + 1)
            forms = self._retrieve.frame_forms(stored, numbers, target)
            frames.opened[place.instance] = forms
        return forms[number - 1].open()

    def _numbered(
        self,
        actor: Actor,
        study: str,
        series_uid: str,
        stored: Sequence[StoredInstance],
    ) -> list[tuple[int, int]]:
        """Return (instance, frame number), along the normal where there is one."""
        at = {one.sop_instance_uid: index for index, one in enumerate(stored)}
        counts = [self._count(one) for one in stored]
        if sum(counts) > MAX_FRAMES:
            raise TooLarge("frames", MAX_FRAMES)
        every = [
            (index, number)
            for index, count in enumerate(counts)
            for number in range(1, count + 1)
        ]
        try:
            facts = self._volumes.describe(actor, study, series_uid)
        except NotAVolume:
            return every
        sorted_ones = [
            (at[uid], number)
            for uid, number in zip(facts.instances, facts.frames, strict=True)
            if uid in at
        ]
        seen = set(sorted_ones)
        return sorted_ones + [one for one in every if one not in seen]

    def _is_failing(self, stored: StoredInstance, target: str) -> bool:
        """Tell whether it shows already that no frame can be decoded to its length."""
        if target != syntaxes.EXPLICIT_VR_LE:
            return False
        limits, size = self._retrieve.limits, _frame_bytes(stored)
        syntax = syntaxes.get(stored.transfer_syntax_uid)
        if not syntax.encapsulated and not syntax.deflated:
            return size > stored.object_length - (stored.pixel_offset or 0)
        if size > limits.inflated_bytes:
            return True
        if size <= max(MIB, limits.inflation_ratio * stored.object_length):
            return False
        try:
            # Worth a look only where so much is claimed: it costs reading a frame.
            self._retrieve.check_frame(stored, 1)
        except ImagingError:
            return True
        return False

    def _check_announced(
        self, stored: Sequence[StoredInstance], places: Sequence[Place]
    ) -> None:
        """See that what is announced can come of what is stored.

        Raises
        ------
        TooLarge
        """
        limits = self._retrieve.limits
        announced = sum(place.length or 0 for place in places)
        if announced > limits.stream_bytes:
            raise TooLarge("stream_bytes", limits.stream_bytes)
        ratio = limits.stream_ratio
        if announced > max(PLAIN, ratio * sum(one.object_length for one in stored)):
            raise TooLarge("stream_ratio", ratio)

    def _count(self, stored: StoredInstance) -> int:
        """Return how many frames there are; claims of more are not believed."""
        claimed = stored.number_of_frames or 1
        if claimed <= 1:
            return 1
        try:
            return min(claimed, self._retrieve.frame_count(stored))
        except ImagingError:
            # Nobody can tell them apart: one says for all why they cannot be read.
            return 1

    def _attributes(
        self, actor: Actor, study: str, series_uid: str
    ) -> dict[str, Mapping[str, Any]]:
        body = self._retrieve.series_metadata(actor, study, series_uid)
        listed = orjson.loads(b"".join(body.text()))
        return {text(one, "00080018"): one for one in listed}


def middle_out(ordered: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the middle one first, then its neighbours on both sides in turn.

    Examples
    --------
    >>> [n for n, _ in middle_out([(0, 1), (1, 1), (2, 1), (3, 1)])]
    [2, 1, 3, 0]
    """
    middle = len(ordered) // 2
    found: list[tuple[int, int]] = []
    for distance in range(len(ordered)):
        sides = (middle - distance, middle + distance)[: 2 if distance else 1]
        found += [ordered[at] for at in sides if 0 <= at < len(ordered)]
    return found


def _sent(stored: StoredInstance, form: Form) -> str:
    """Return the transfer syntax in which frames of an instance leave."""
    uid = stored.transfer_syntax_uid
    syntax = syntaxes.get(uid)
    if form == "stored" and syntax.encapsulated:
        return uid
    if form != "htj2k":
        return syntaxes.EXPLICIT_VR_LE
    if uid in HTJ2K or (syntax.encapsulated and (syntax.lossy or not syntax.decodes)):
        return uid
    grey = stored.samples == 1 and is_encodable(
        HTJ2K_LOSSLESS_RPCL, bits_allocated=stored.bits_allocated or 0, samples=1
    )
    return HTJ2K_LOSSLESS_RPCL if grey else syntaxes.EXPLICIT_VR_LE


def _place(
    index: int,
    stored: StoredInstance,
    frame_number: int,
    syntax: int,
    *,
    level: int,
    native: bool,
) -> Place:
    rows, columns = stored.rows or 0, stored.columns or 0
    bits = stored.bits_allocated or 0
    reducible = bool(level) and bits in {8, 16, 32}
    if reducible:
        rows, columns = reduced_size(rows, columns, level)
    length: int | None = None
    if native:
        length = -(-rows * columns * (stored.samples or 1) * bits // 8)
    return Place(index, frame_number, syntax, rows, columns, length, reducible)


def _frame_bytes(stored: StoredInstance) -> int:
    """Return the bytes of a decoded frame of every pixel."""
    samples, bits = stored.samples or 1, stored.bits_allocated or 0
    return -(-(stored.rows or 0) * (stored.columns or 0) * samples * bits // 8)


def _reduced(
    stored: StoredInstance,
    attributes: Mapping[str, Mapping[str, Any]],
    data: bytes,
    level: int,
) -> bytes:
    found = attributes.get(stored.sop_instance_uid, {})
    signed = whole(found, "00280103") == 1
    samples = stored.samples or 1
    syntax = syntaxes.get(stored.transfer_syntax_uid)
    # Codecs give colour by pixel, whatever the attribute says.
    planar = samples > 1 and not syntax.encapsulated
    planar = planar and whole(found, "00280006") == 1
    return reduce(
        data,
        rows=stored.rows or 0,
        columns=stored.columns or 0,
        samples=samples,
        dtype=f"<{'i' if signed else 'u'}{(stored.bits_allocated or 8) // 8}",
        level=level,
        planar=planar,
        average=text(found, "00280004") in _SMOOTH,
    )
