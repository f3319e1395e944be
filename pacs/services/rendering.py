"""Pictures and readable documents of stored instances: one service for every face.

DICOMweb's rendered and thumbnail resources, WADO-URI and the thumbnails of settled
studies select here what is shown. Only the frames that are shown are read, and the
picture is made in one hop to a worker process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.pool import Job, WorkerPool
from pacs.rendering.parameters import GIF, Wanted
from pacs.services.frames import StoredPixels
from pacs.services.retrieve import RetrieveService
from storage.kernel.errors import NotFound, TooLarge, Unsupported
from storage.kernel.limits import MIB
from storage.kernel.types import Actor

RENDER: Final = "pacs.rendering.jobs:render"
REFERENCED: Final = "pacs.rendering.jobs:referenced"
DOCUMENT: Final = "pacs.rendering.document:document"

_STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
KEY_OBJECT_SELECTION: Final = f"{_STORAGE}88.59"
ENCAPSULATED_PDF: Final = f"{_STORAGE}104.1"
#: Documents that are text once rendered are bounded by their own bytes, times this.
_TEXT_FACTOR: Final = 16
#: Bytes of attributes; those of five thousand frames take a few million.
MAX_HEADER: Final = 64 * MIB
#: Stored bytes of an animation for each pixel it may have.
_STORED_FACTOR: Final = 4
#: References of a state or selection that are looked for.
MAX_LOOKED_FOR: Final = 50


class Kind(StrEnum):
    """What an instance can be rendered as."""

    IMAGE = "image"
    VIDEO = "video"
    STATE = "presentation state"
    DOCUMENT = "structured document"
    PDF = "PDF"
    NOTHING = "nothing"


def kind_of(instance: StoredInstance) -> Kind:
    """Return what an instance can be rendered as, by class and transfer syntax."""
    uid = instance.sop_class_uid
    syntax = syntaxes.get(instance.transfer_syntax_uid)
    if syntax.media_type.startswith("video/"):
        return Kind.VIDEO
    if uid.startswith(f"{_STORAGE}11."):
        return Kind.STATE
    if uid == ENCAPSULATED_PDF:
        return Kind.PDF
    if uid.startswith(f"{_STORAGE}88."):
        return Kind.DOCUMENT
    # The index knows no place of pixels in a deflated data set.
    if instance.pixel_offset is not None or (syntax.deflated and instance.rows):
        return Kind.IMAGE
    return Kind.NOTHING


@dataclass(frozen=True, slots=True)
class Rendered:
    """A picture as a file.

    Attributes
    ----------
    warnings : tuple of str
        What was asked for and could not be done.
    """

    media_type: str
    body: bytes
    width: int
    height: int
    warnings: tuple[str, ...] = ()


class _Pictures:
    """The pictures that were made last, by what they were made of.

    Their key holds the digest of the object: whoever may not have the object never
    gets here, and other content is another picture.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, Rendered] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> Rendered | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, key: Hashable, made: Rendered) -> None:
        # One picture never takes the place of most others.
        if _PICTURE_BYTES + 8 * len(made.body) > self._most_bytes:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = made
            self._bytes += _PICTURE_BYTES + len(made.body)
            while self._bytes > self._most_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= _PICTURE_BYTES + len(oldest.body)


#: What a picture and its key take besides its body.
_PICTURE_BYTES: Final = 1024


class RenderService:
    """Render what is stored.

    Parameters
    ----------
    retrieve : RetrieveService
    workers : WorkerPool
        Where pictures are made.
    cache_bytes : int
        Memory for pictures that are asked for again; 0: none.
    """

    def __init__(
        self,
        *,
        retrieve: RetrieveService,
        workers: WorkerPool,
        cache_bytes: int = 0,
    ) -> None:
        self._retrieve = retrieve
        self._workers = workers
        self._pictures = _Pictures(cache_bytes)

    def picture(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        wanted: Wanted,
        *,
        state: StoredInstance | None = None,
    ) -> Rendered:
        """Return frames of an instance as a picture, several as an animation.

        Parameters
        ----------
        numbers : sequence of int
            From 1; more than one only as GIF.
        state : StoredInstance, optional
            The presentation state that the image is shown by.

        Raises
        ------
        NotFound
            No such frame; or the state does not refer to the image.
        InvalidParameter
            The image does not have what the parameters ask for.
        MalformedObject, Unsupported, TooLarge
            The object cannot be rendered.
        DependencyDown
        """
        if len(numbers) > 1 and wanted.media_type != GIF:
            raise Unsupported("several frames are one picture only as image/gif")
        wanted = replace(wanted, max_pixels=self._retrieve.limits.rendered_pixels)
        shown_by = None if state is None else state.digest
        key = (instance.digest, instance.sop_instance_uid, tuple(numbers), shown_by,
               wanted)  # fmt: skip
        found = self._pictures.find(key)
        if found is None:
            found = self._made(instance, numbers, wanted, state)
            self._pictures.keep(key, found)
        return found

    def _made(
        self,
        instance: StoredInstance,
        numbers: Sequence[int],
        wanted: Wanted,
        state: StoredInstance | None,
    ) -> Rendered:
        limits = self._retrieve.limits
        pixels = self._pixels(instance)
        arguments = {
            "wanted": wanted.arguments(),
            "indexes": [number - 1 for number in numbers],
            "header_syntax": pixels.header_syntax,
            "syntax": pixels.frame_syntax,
            "instance_uid": instance.sop_instance_uid,
            "pixel_tag": pixels.pixel_tag,
            "words": pixels.words,
            "key": instance.digest.hex(),
            "max_bytes": limits.inflated_bytes,
        }
        states: list[bytes] = []
        if state is not None:
            shown_by = self._pixels(state)
            arguments["state_syntax"] = shown_by.header_syntax
            states.append(shown_by.header)
        # Bound: frames of an animation together, before one of them is read.
        stored = sum(
            length for number in numbers for _, length in pixels.table.ranges(number)
        )
        if len(numbers) > 1 and stored > _STORED_FACTOR * limits.rendered_pixels:
            raise TooLarge("rendered_pixels", limits.rendered_pixels)

        def payloads() -> list[bytes]:
            return [pixels.header, *states, *map(pixels.read_frame, numbers)]

        # A file is never longer than its pixels and their colours, and some markers.
        most = MIB + 4 * limits.rendered_pixels
        answer = self._workers.run(
            Job(RENDER, arguments, payloads, answer_bytes=most, label="render")
        )
        head = answer.head
        return Rendered(
            wanted.media_type,
            answer.body,
            int(head["width"]),
            int(head["height"]),
            tuple(map(str, head["warnings"])),
        )

    def _pixels(self, instance: StoredInstance) -> StoredPixels:
        """Return what an instance is rendered from.

        Raises
        ------
        Unsupported
            It has attributes beyond what is looked at for a picture or page.
        """
        if instance.header_end - instance.dataset_offset > MAX_HEADER:
            raise Unsupported("its attributes are too long to be rendered")
        return self._retrieve.pixels(instance)

    def document(self, instance: StoredInstance, media_type: str) -> bytes:
        """Return a structured document as text/html or text/plain, in UTF-8.

        Raises
        ------
        MalformedObject, Unsupported, TooLarge, DependencyDown
        """
        pixels = self._pixels(instance)
        job = Job(
            DOCUMENT,
            {"syntax": pixels.header_syntax, "media_type": media_type},
            (pixels.header,),
            answer_bytes=MIB + _TEXT_FACTOR * len(pixels.header),
            label="document",
        )
        return self._workers.run(job).body

    def frame_count(self, instance: StoredInstance) -> int:
        """Return how many frames can be rendered."""
        return self._retrieve.frame_count(instance)

    def target(self, actor: Actor, state: StoredInstance) -> tuple[StoredInstance, int]:
        """Return the first image that a state or a key object selection is for.

        Returns
        -------
        StoredInstance, int
            An instance of the same study, and a frame number.

        Raises
        ------
        NotFound
            None of its images is here.
        """
        pixels = self._pixels(state)
        job = Job(
            REFERENCED,
            {"syntax": pixels.header_syntax},
            (pixels.header,),
            label="references",
        )
        for _, uid, number in self._workers.run(job).head["references"][
            :MAX_LOOKED_FOR
        ]:
            try:
                found = self._retrieve.instances(
                    actor, state.study_instance_uid, None, str(uid)
                )
            except NotFound:
                continue
            return found[0], int(number)
        raise NotFound("none of the referenced images is stored")

    def representative(
        self, actor: Actor, instances: Sequence[StoredInstance]
    ) -> tuple[StoredInstance, int]:
        """Return the instance and the frame that stand for a study or series.

        A key image, else the middle of the largest series of images (PS3.18 10.4.4
        leaves the choice to the server).

        Parameters
        ----------
        instances : sequence of StoredInstance
            In presentation order.

        Raises
        ------
        Unsupported
            None of them is an image.
        """
        for instance in instances:
            if instance.sop_class_uid == KEY_OBJECT_SELECTION:
                try:
                    return self._within(self.target(actor, instance), instances)
                except NotFound:
                    continue
        by_series: dict[int, list[StoredInstance]] = {}
        for instance in instances:
            if kind_of(instance) is Kind.IMAGE:
                by_series.setdefault(instance.series_pk, []).append(instance)
        if not by_series:
            raise Unsupported("there is no image in it")
        largest = max(by_series.values(), key=_weight)
        middle = largest[len(largest) // 2]
        return middle, self.middle_frame(middle)

    def middle_frame(self, instance: StoredInstance) -> int:
        """Return the number of the frame that stands for an instance."""
        if (instance.number_of_frames or 1) <= 1:
            return 1
        # What the attributes promise need not be there.
        return self.frame_count(instance) // 2 + 1

    @staticmethod
    def _within(
        key_image: tuple[StoredInstance, int], instances: Sequence[StoredInstance]
    ) -> tuple[StoredInstance, int]:
        if key_image[0].pk not in {one.pk for one in instances}:
            raise NotFound("the key image is elsewhere")
        return key_image


#: Images that are made of others; a series of them stands for nothing.
_DERIVED: Final = frozenset(("SEG", "RTDOSE", "PR", "KO", "SR", "DOC", "OT", "REG"))


def _weight(series: Sequence[StoredInstance]) -> tuple[bool, int]:
    frames = sum(max(1, one.number_of_frames or 1) for one in series)
    return series[0].modality not in _DERIVED, frames
