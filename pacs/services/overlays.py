"""Masks, measurements, graphics and contours of a study as one plain JSON document.

SEG, SR, GSPS and RTSTRUCT objects each become a layer (`docs/viewer-endpoints.md` has
the schema). An object that cannot be read is named under ``problems`` and does not keep
the others away; what exceeds the limits is left out and marked ``truncated``.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from pacs.domain.attributes import Attributes, text
from pacs.domain.study import StoredInstance
from pacs.imaging import syntaxes
from pacs.services import (
    overlays_presentation,
    overlays_report,
    overlays_segmentation,
    overlays_structure,
)
from pacs.services.overlays_budget import Budget, Reader
from pacs.services.overlays_planes import ImagePlanes
from pacs.services.retrieve import RetrieveService
from pacs.services.volumes import VolumeService, one_tenant
from storage.kernel.errors import (
    DependencyDown,
    InvalidInput,
    NotFound,
    TooLarge,
    Unsupported,
)
from storage.kernel.limits import MIB, Limits
from storage.kernel.types import Actor

VERSION: Final = 1
#: Documents of one process that are kept, all together.
KEPT_BYTES: Final = 32 * MIB
#: Documents of one process that are made at a time.
MAX_MAKING: Final = 2
#: Header of an object that is read as JSON.
MAX_HEADER: Final = 64 * MIB

_STORAGE = "1.2.840.10008.5.1.4.1.1."
SEGMENTATIONS: Final = frozenset((f"{_STORAGE}66.4", f"{_STORAGE}66.7"))
REPORTS: Final = frozenset(
    f"{_STORAGE}88.{n}"
    for n in ("11", "22", "33", "34", "35", "50", "65", "67", "68", "70", "71", "73")
)
PRESENTATIONS: Final = frozenset(f"{_STORAGE}11.{n}" for n in (1, 2, 3, 4))
STRUCTURES: Final = frozenset((f"{_STORAGE}481.3",))
#: SOP classes that become layers.
CLASSES: Final = SEGMENTATIONS | REPORTS | PRESENTATIONS | STRUCTURES


@dataclass(frozen=True, slots=True)
class _Study:
    """What one document is made of."""

    actor: Actor
    study: str
    every: Sequence[StoredInstance]
    chosen: Sequence[StoredInstance]
    version: str


class OverlayService:
    """Make the overlay documents of studies."""

    def __init__(
        self, retrieve: RetrieveService, volumes: VolumeService, limits: Limits
    ) -> None:
        self._retrieve = retrieve
        self._volumes = volumes
        self._limits = limits
        self._lock = threading.Lock()
        self._room = threading.Semaphore(MAX_MAKING)
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def version(self, actor: Actor, study_uid: str, series_uid: str | None) -> str:
        """Return what names the content of a document.

        Raises
        ------
        NotFound
        """
        return self._find(actor, study_uid, series_uid).version

    def document(self, actor: Actor, study_uid: str, series_uid: str | None) -> bytes:
        """Return the document of a study, or of one of its series.

        Raises
        ------
        NotFound, Unavailable
        """
        found = self._find(actor, study_uid, series_uid)
        kept = self._lookup(found.version)
        if kept is not None:
            return kept
        if not self._room.acquire(timeout=self._limits.render_seconds):
            raise DependencyDown("too many overlays are asked for")
        try:
            # Whoever was here before may have made it.
            kept = self._lookup(found.version)
            return self._keep(found) if kept is None else kept
        finally:
            self._room.release()

    def _lookup(self, version: str) -> bytes | None:
        with self._lock:
            kept = self._kept.get(version)
            if kept is not None:
                self._kept.move_to_end(version)
            return kept

    def _keep(self, found: _Study) -> bytes:
        made = orjson.dumps(self._made(found))
        with self._lock:
            self._kept[found.version] = made
            while sum(map(len, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return made

    def _find(self, actor: Actor, study_uid: str, series_uid: str | None) -> _Study:
        actor = one_tenant(self._retrieve, actor, study_uid)
        every = self._retrieve.instances(actor, study_uid)
        asked = [one for one in every if series_uid in {None, one.series_instance_uid}]
        if not asked:
            raise NotFound("no such series")
        # Images too: coordinates in the patient are given in those they lie in.
        version = hashlib.sha256(f"{VERSION} {study_uid} {series_uid}".encode())
        for one in every:
            version.update(one.digest)
        chosen = [one for one in asked if one.sop_class_uid in CLASSES]
        return _Study(actor, study_uid, every, chosen, version.hexdigest()[:32])

    def _made(self, found: _Study) -> dict[str, Any]:
        budget = Budget.of(self._limits)
        # Presentation states place nothing; without others no image is looked at.
        placed = any(one.sop_class_uid not in PRESENTATIONS for one in found.chosen)
        planes = ImagePlanes(self._images(found) if placed else ())
        layers = []
        for number, stored in enumerate(found.chosen):
            if number >= self._limits.overlay_objects:
                budget.truncated = True
                break
            try:
                layer = self._layer(stored, planes, budget)
            except (InvalidInput, NotFound) as error:
                budget.problem(stored.sop_instance_uid, str(error)[:200])
                continue
            layers.append(
                {
                    "instance": stored.sop_instance_uid,
                    "series": stored.series_instance_uid,
                    **layer,
                }
            )
        return {
            "version": VERSION,
            "study": found.study,
            "layers": layers,
            "truncated": budget.truncated,
            "problems": budget.problems,
        }

    def _layer(
        self, stored: StoredInstance, planes: ImagePlanes, budget: Budget
    ) -> dict[str, Any]:
        if stored.header_end - stored.dataset_offset > MAX_HEADER:
            raise TooLarge("header_bytes", MAX_HEADER)
        attributes: Attributes = orjson.loads(self._retrieve.metadata(stored))

        def resolve(path: str) -> bytes:
            if stored.transfer_syntax_uid == syntaxes.EXPLICIT_VR_BE:
                raise Unsupported("long values in big endian are not read")
            source = self._retrieve.bulkdata(stored, path).source
            if source.length > MAX_HEADER:
                raise TooLarge("header_bytes", MAX_HEADER)
            return source.read(0, source.length)

        reader = Reader(stored.sop_instance_uid, resolve)
        if stored.sop_class_uid in SEGMENTATIONS:
            return overlays_segmentation.read(
                stored, attributes, self._retrieve, self._volumes.masks, planes, budget
            )
        if stored.sop_class_uid in REPORTS:
            return overlays_report.read(attributes, reader, planes, budget)
        if stored.sop_class_uid in STRUCTURES:
            return overlays_structure.read(attributes, reader, planes, budget)
        return overlays_presentation.read(attributes, reader, budget)

    def _images(self, found: _Study) -> Iterable[list[Mapping[str, Any]]]:
        """Yield the attributes of the images of each series."""
        series = dict.fromkeys(
            one.series_instance_uid
            for one in found.every
            if one.pixel_offset is not None and one.sop_class_uid not in CLASSES
        )
        for uid in series:
            body = self._retrieve.series_metadata(found.actor, found.study, uid)
            listed: list[Mapping[str, Any]] = orjson.loads(b"".join(body.text()))
            yield [one for one in listed if text(one, "00280010")]
