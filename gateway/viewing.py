"""What the viewer's endpoints ask of the archive, answered by its services."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np
import orjson

from pacs.domain.attributes import code, item, items, numbers, text
from pacs.domain.study import Level, StoredInstance
from pacs.imaging import syntaxes
from pacs.imaging.pool import PoolObserver
from pacs.rendering.volume import NotAVolume
from pacs.rendering.volume_tasks import Caller as SharedCaller
from pacs.services import overlays
from pacs.services.overlays import OverlayService
from pacs.services.query import QueryService
from pacs.services.retrieve import RetrieveService
from pacs.services.volumes import (
    PlaneRequest,
    ProjectionRequest,
    VolumeFacts,
    VolumeService,
    one_tenant,
)
from pacs.services.volumes_stream import HTJ2K, Frames, SeriesStream
from storage.kernel.errors import ImagingError, NotFound
from storage.kernel.limits import MIB
from storage.kernel.settings import Settings
from storage.kernel.types import Actor
from viewer import endpoints
from viewer.http import Policy
from viewer.likely import MAX_BYTES
from viewer.sources import (
    Caller,
    Form,
    FramePlace,
    ImageRef,
    KeyObject,
    Picture,
    PlaneView,
    Prior,
    ProjectionView,
    Referenced,
    SeriesFacts,
    SeriesFrames,
    SeriesRef,
    StudyFacts,
    VolumeSummary,
)

log = logging.getLogger(__name__)

Dependency = Callable[..., Any]

#: Other studies of a patient that are looked at for priors, and priors that are told.
MAX_STUDIES: Final = 200
MAX_PRIORS: Final = 10
#: Series that wait to be read ahead by one process.
MAX_WAITING: Final = 16

_STORAGE = "1.2.840.10008.5.1.4.1.1."
KEY_OBJECTS: Final = f"{_STORAGE}88.59"
#: An XDS-I manifest lists everything and selects nothing (PS3.16 CID 7010).
MANIFEST: Final = ("DCM", "113030")

#: What a browser's decoders read besides HTJ2K: JPEG, JPEG-LS, JPEG 2000, RLE.
BROWSER: Final = frozenset(
    (
        *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91)),
        "1.2.840.10008.1.2.5",
    )
)

_STUDY_KEYS: Final = (
    0x00080020, 0x00080030, 0x00080050, 0x00080061, 0x00081030,
    0x00100010, 0x00100020, 0x00100021, 0x00100030, 0x00100040,
    0x0020000D, 0x00201206,
)  # fmt: skip
_SERIES_KEYS: Final = (
    0x00080060, 0x0008103E, 0x00180015, 0x0020000D, 0x0020000E, 0x00200011,
    0x00200060,
)  # fmt: skip


def _kind(sop_class_uid: str, *, has_pixels: bool) -> str:
    for kind, classes in (
        ("seg", overlays.SEGMENTATIONS),
        ("sr", overlays.REPORTS),
        ("pr", overlays.PRESENTATIONS),
        ("rtstruct", overlays.STRUCTURES),
        ("ko", frozenset((KEY_OBJECTS,))),
    ):
        if sop_class_uid in classes:
            return kind
    if sop_class_uid.startswith(f"{_STORAGE}104."):
        return "document"
    if sop_class_uid.startswith(f"{_STORAGE}9."):
        return "waveform"
    return "image" if has_pixels else "other"


class Catalogue:
    """The archive as `viewer.sources.StudyCatalogue`."""

    def __init__(
        self, query: QueryService, retrieve: RetrieveService, volumes: VolumeService
    ) -> None:
        self._query = query
        self._retrieve = retrieve
        self._volumes = volumes

    def facts(self, actor: Actor, study_uid: str) -> StudyFacts:
        """Return what there is to show of a study."""
        narrowed = one_tenant(self._retrieve, actor, study_uid)
        stored = self._retrieve.instances(narrowed, study_uid)
        keys = dict.fromkeys(_STUDY_KEYS, "") | {0x0020000D: study_uid}
        study = next(self._query.find(narrowed, Level.STUDY, keys, root="STUDY"), None)
        if study is None:
            raise NotFound("no such study")
        keys = dict.fromkeys(_SERIES_KEYS, "") | {0x0020000D: study_uid}
        rows = {
            row[0x0020000E]: row
            for row in self._query.find(narrowed, Level.SERIES, keys, root="STUDY")
        }
        series = tuple(
            self._series(narrowed, rows.get(uid, {}), list(group))
            for uid, group in groupby(stored, key=lambda one: one.series_instance_uid)
        )
        return StudyFacts(
            study=study_uid,
            tenant=narrowed.tenant,
            date=study.get(0x00080020) or None,
            time=study.get(0x00080030) or None,
            description=study.get(0x00081030, ""),
            accession=study.get(0x00080050, ""),
            patient_id=study.get(0x00100020, ""),
            patient_name=study.get(0x00100010, ""),
            birth_date=study.get(0x00100030) or None,
            sex=study.get(0x00100040, ""),
            modalities=_listed(study.get(0x00080061, "")),
            series=series,
            key_objects=tuple(self._key_objects(stored)),
            priors=self._priors(narrowed, study, series),
        )

    def _series(
        self, actor: Actor, row: Mapping[int, str], stored: list[StoredInstance]
    ) -> SeriesFacts:
        first = stored[0]
        images = [one for one in stored if one.pixel_offset is not None]
        kind = _kind(first.sop_class_uid, has_pixels=bool(images))
        volume, reason = None, ""
        order: Sequence[ImageRef] = [
            ImageRef(one.sop_instance_uid, number)
            for one in images
            for number in _ends(one.number_of_frames or 1)
        ]
        if kind == "image":
            try:
                facts = self._volumes.describe(
                    actor, first.study_instance_uid, first.series_instance_uid
                )
                volume = summary(facts)
                order = [
                    ImageRef(*pair)
                    for pair in zip(facts.instances, facts.frames, strict=True)
                ]
            except NotAVolume as error:
                reason = str(error)
        number = row.get(0x00200011, "")
        sizes = {(one.rows, one.columns) for one in images}
        return SeriesFacts(
            series=first.series_instance_uid,
            number=int(number) if number.lstrip("-").isdigit() else None,
            modality=row.get(0x00080060, first.modality),
            description=row.get(0x0008103E, ""),
            body_part=row.get(0x00180015, ""),
            laterality=row.get(0x00200060, ""),
            kind=kind,
            n_instances=len(stored),
            n_frames=sum(one.number_of_frames or 1 for one in images),
            size_bytes=sum(one.object_length for one in stored),
            sop_classes=_different(one.sop_class_uid for one in stored),
            transfer_syntaxes=_different(one.transfer_syntax_uid for one in images),
            encoding=_encoding(images),
            rows=images[0].rows if len(sizes) == 1 else None,
            columns=images[0].columns if len(sizes) == 1 else None,
            equal_sizes=len(sizes) <= 1,
            first=order[0] if order else None,
            middle=order[len(order) // 2] if order else None,
            volume=volume,
            not_a_volume=reason,
        )

    def _key_objects(self, stored: Iterable[StoredInstance]) -> Iterator[KeyObject]:
        for one in stored:
            if one.sop_class_uid != KEY_OBJECTS:
                continue
            try:
                found = orjson.loads(self._retrieve.metadata(one))
            except ImagingError:
                continue
            title = code(item(found, "0040A043"))
            if title is not None and (title["scheme"], title["value"]) == MANIFEST:
                continue
            yield _key_object(one, found, title)

    def _priors(
        self,
        actor: Actor,
        study: Mapping[int, str],
        series: Sequence[SeriesFacts],
    ) -> tuple[Prior, ...]:
        """Return earlier studies that have a body part or a modality in common."""
        patient = study.get(0x00100020, "")
        if not patient:
            return ()
        keys = dict.fromkeys((*_STUDY_KEYS, 0x00080060, 0x00180015, 0x0020000E), "")
        keys |= {0x00100020: patient, 0x00100021: study.get(0x00100021, "")}
        modalities = {one.modality for one in series if one.kind == "image"}
        parts = {one.body_part.upper() for one in series if one.body_part}
        others: dict[str, list[Mapping[int, str]]] = {}
        found = self._query.find(
            actor, Level.SERIES, keys, root="STUDY", relational=True
        )
        for row in found:
            # An ID may look like a pattern; it is not one here.
            same = row[0x00100020] == patient and row[0x00100021] == study.get(
                0x00100021, ""
            )
            uid = row[0x0020000D]
            if same and uid != study[0x0020000D] and _is_earlier(row, study):
                if uid not in others and len(others) >= MAX_STUDIES:
                    break
                others.setdefault(uid, []).append(row)
        found.close()
        made = [_prior(uid, rows, modalities, parts) for uid, rows in others.items()]
        comparable = [one for one in made if one.match]
        comparable.sort(key=lambda one: (len(one.match), one.date), reverse=True)
        return tuple(comparable[:MAX_PRIORS])


def _prior(
    uid: str,
    rows: Sequence[Mapping[int, str]],
    modalities: set[str],
    parts: set[str],
) -> Prior:
    own = {row[0x00080060] for row in rows}
    own_parts = {row[0x00180015].upper() for row in rows if row[0x00180015]}
    match = []
    if own_parts & parts:
        match.append("body_part")
    if own & modalities and (match or not own_parts or not parts):
        match.append("modality")
    return Prior(
        uid,
        rows[0].get(0x00080020, ""),
        rows[0].get(0x00081030, ""),
        tuple(sorted(own)),
        tuple(sorted(own_parts)),
        tuple(match),
        len(rows),
    )


def _is_earlier(row: Mapping[int, str], study: Mapping[int, str]) -> bool:
    """Tell whether a study is not later than the present one; without a date, yes."""
    return (row[0x00080020], row[0x00080030]) <= (
        study[0x00080020] or "99999999",
        study[0x00080030] or "999999",
    )


def _key_object(
    stored: StoredInstance, found: Mapping[str, Any], title: dict[str, str] | None
) -> KeyObject:
    series_of = {
        text(one, "00081155"): text(series, "0020000E")
        for evidence in items(found, "0040A375")
        for series in items(evidence, "00081115")
        for one in items(series, "00081199")
    }
    description, images = "", []
    for content in items(found, "0040A730"):
        kind = text(content, "0040A040")
        if kind == "TEXT" and not description:
            description = text(content, "0040A160")
        elif kind == "IMAGE":
            named = item(content, "00081199")
            uid = text(named, "00081155")
            frames = tuple(int(one) for one in numbers(named, "00081160") or ())
            images.append(Referenced(series_of.get(uid, ""), uid, frames))
    return KeyObject(
        stored.series_instance_uid,
        stored.sop_instance_uid,
        title,
        description,
        tuple(images),
    )


def _listed(value: str) -> tuple[str, ...]:
    return tuple(part for part in value.split("\\") if part)


def _different(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _ends(n_frames: int) -> tuple[int, ...]:
    """Return the first and the middle frame number of an object, which may be huge."""
    return (1,) if n_frames < 2 else (1, n_frames // 2 + 1)


def _encoding(
    images: Sequence[StoredInstance],
) -> Literal["raw", "htj2k", "stored", "none"]:
    """Return in which form a browser should ask for the frames of a series."""
    used = {one.transfer_syntax_uid for one in images}
    if not used:
        return "none"
    if used <= HTJ2K:
        return "htj2k"
    if used <= BROWSER or not any(syntaxes.get(uid).decodes for uid in used):
        return "stored"
    return "raw"


def summary(facts: VolumeFacts) -> VolumeSummary:
    """Return what the viewer is told of a volume."""
    stack, grid = facts.stack, facts.stack.grid
    planes, rows, columns = grid.shape
    along, down, right = grid.spacing
    corners = grid.corners()
    return VolumeSummary(
        size=(columns, rows, planes),
        spacing=(right, down, along),
        origin=grid.origin,
        right=_unit(grid.column_step),
        down=_unit(grid.row_step),
        along=_unit(grid.along),
        bounds=(_vector(corners.min(axis=0)), _vector(corners.max(axis=0))),
        frame_of_reference=facts.described.frame_of_reference,
        unit=facts.described.unit,
        stacks=stack.of,
        regular=grid.regular,
        tilt=stack.tilt,
        gaps=stack.gaps,
        issues=stack.issues,
        window=facts.described.window,
        bytes=facts.n_bytes,
    )


def _unit(vector: Sequence[float]) -> tuple[float, float, float]:
    return _vector(np.array(vector) / np.linalg.norm(vector))


def _vector(values: Iterable[float]) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return (x, y, z)


class FrameStream:
    """The archive as `viewer.sources.FrameSource`."""

    def __init__(self, stream: SeriesStream) -> None:
        self._stream = stream

    def frames(
        self, actor: Actor, series_uid: str, *, form: Form, order: str, level: int
    ) -> SeriesFrames:
        """Return which frames a series has."""
        found = self._stream.frames(
            actor,
            series_uid,
            form=form,
            order="ascending" if order == "ascending" else "middle-out",
            level=level,
        )
        return SeriesFrames(
            found.study,
            found.series,
            found.version,
            [one.sop_instance_uid for one in found.stored],
            found.syntaxes,
            [FramePlace(**asdict(place)) for place in found.places],
            found,
        )

    def read(self, frames: SeriesFrames, position: int) -> tuple[int, Iterator[bytes]]:
        """Return length and bytes of one of them."""
        if not isinstance(frames.handle, Frames):
            raise TypeError("not frames of this source")
        return self._stream.read(frames.handle, position)


class Pixels:
    """The archive as `viewer.sources.PixelSource`."""

    def __init__(self, retrieve: RetrieveService, volumes: VolumeService) -> None:
        self._retrieve = retrieve
        self._volumes = volumes

    def caller(self) -> Caller:
        """Return a new one."""
        return SharedCaller()

    def volume(self, actor: Actor, ref: SeriesRef) -> VolumeSummary:
        """Return what a series is as a volume."""
        narrowed = one_tenant(self._retrieve, actor, ref.study)
        return summary(
            self._volumes.describe(narrowed, ref.study, ref.series, stack=ref.stack)
        )

    def plane(
        self, actor: Actor, ref: SeriesRef, view: PlaneView, caller: Caller
    ) -> Picture:
        """Draw a plane or a slab."""
        drawn = self._volumes.draw_plane(
            one_tenant(self._retrieve, actor, ref.study),
            ref.study,
            ref.series,
            PlaneRequest(**asdict(view)),
            stack=ref.stack,
            caller=_shared(caller),
        )
        return Picture(drawn.body, drawn.media_type, drawn.facts)

    def projection(
        self, actor: Actor, ref: SeriesRef, view: ProjectionView, caller: Caller
    ) -> Picture:
        """Draw a volume rendering."""
        drawn = self._volumes.draw_projection(
            one_tenant(self._retrieve, actor, ref.study),
            ref.study,
            ref.series,
            ProjectionRequest(**asdict(view)),
            stack=ref.stack,
            caller=_shared(caller),
        )
        return Picture(drawn.body, drawn.media_type, drawn.facts)


def _shared(caller: Caller) -> SharedCaller | None:
    return caller if isinstance(caller, SharedCaller) else None


class Overlays:
    """The archive as `viewer.sources.OverlaySource`."""

    def __init__(self, service: OverlayService) -> None:
        self._service = service

    def version(self, actor: Actor, study_uid: str, series_uid: str | None) -> str:
        """Return what names the present content of `overlays`."""
        return self._service.version(actor, study_uid, series_uid)

    def overlays(self, actor: Actor, study_uid: str, series_uid: str | None) -> bytes:
        """Return the JSON document of a study, or of one series."""
        return self._service.document(actor, study_uid, series_uid)


class ReadAhead:
    """The archive as `viewer.sources.Warmer`: one thread, a short queue.

    A series is read once through, which fills the page cache (or brings it here from
    the object store), and kept as a volume where there is room for it.
    """

    def __init__(self, retrieve: RetrieveService, volumes: VolumeService) -> None:
        self._retrieve = retrieve
        self._volumes = volumes
        self._asked: queue.Queue[tuple[Actor, str, str] | None] = queue.Queue(
            MAX_WAITING
        )
        self._pending: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def warm(self, actor: Actor, study_uid: str, series_uid: str) -> bool:
        """Begin to read a series; False when too much is under way already."""
        with self._lock:
            if self._closed:
                return False
            if (study_uid, series_uid) in self._pending:
                return True
            try:
                self._asked.put_nowait((actor, study_uid, series_uid))
            except queue.Full:
                return False
            self._pending.add((study_uid, series_uid))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="read-ahead", daemon=True
                )
                self._thread.start()
        return True

    def wait(self) -> None:
        """Return when everything that was asked for has been read; for tests."""
        self._asked.join()

    def close(self) -> None:
        """Stop reading."""
        with self._lock:
            self._closed = True
            thread = self._thread
        while thread is not None and thread.is_alive():
            try:
                self._asked.put(None, timeout=0.1)
            except queue.Full:
                continue
            thread.join(timeout=5.0)
            break

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None and not self._closed:
            actor, study_uid, series_uid = asked
            try:
                self._read(actor, study_uid, series_uid)
            except ImagingError as error:
                log.info(
                    "not read ahead: %s",
                    error,
                    extra={"event": "readahead.failed", "series": series_uid},
                )
            except Exception:
                log.exception("read-ahead failed", extra={"event": "readahead.failed"})
            finally:
                with self._lock:
                    self._pending.discard((study_uid, series_uid))
                self._asked.task_done()

    def _read(self, actor: Actor, study_uid: str, series_uid: str) -> None:
        narrowed = one_tenant(self._retrieve, actor, study_uid)
        left = MAX_BYTES
        for stored in self._retrieve.instances(narrowed, study_uid, series_uid):
            offset = 0
            while offset < stored.object_length and left > 0 and not self._closed:
                size = min(MIB, stored.object_length - offset)
                self._retrieve.read_object(stored, offset, size)
                offset += size
                left -= size
        self._volumes.warm(narrowed, study_uid, series_uid)


@dataclass(frozen=True, slots=True)
class Views:
    """Everything behind the viewer's endpoints, in one process."""

    volumes: VolumeService
    catalogue: Catalogue
    frames: FrameStream
    pixels: Pixels
    overlays: Overlays
    ahead: ReadAhead

    def close(self) -> None:
        """End processes and threads, and let go of volumes."""
        self.ahead.close()
        self.volumes.close()


def open_views(
    query: QueryService,
    retrieve: RetrieveService,
    settings: Settings,
    observer: PoolObserver | None = None,
) -> Views:
    """Build what is behind the viewer's endpoints; processes start when needed."""
    volumes = VolumeService(
        retrieve=retrieve,
        limits=settings.limits,
        cache_bytes=settings.pacs.volume_cache_bytes,
        processes=settings.pacs.renderers,
        observer=observer,
    )
    return Views(
        volumes=volumes,
        catalogue=Catalogue(query, retrieve, volumes),
        frames=FrameStream(SeriesStream(retrieve, volumes)),
        pixels=Pixels(retrieve, volumes),
        overlays=Overlays(OverlayService(retrieve, volumes, settings.limits)),
        ahead=ReadAhead(retrieve, volumes),
    )


def dependencies(
    views: Views,
    policy: Policy,
    current_actor: Dependency,
    given: Callable[[Any], Dependency],
) -> dict[Dependency, Dependency]:
    """Return what replaces each dependency of the viewer's endpoints."""
    return {
        endpoints.current_actor: current_actor,
        endpoints.access_policy: given(policy),
        endpoints.study_catalogue: given(views.catalogue),
        endpoints.frame_source: given(views.frames),
        endpoints.pixel_source: given(views.pixels),
        endpoints.overlay_source: given(views.overlays),
        endpoints.warmer: given(views.ahead),
    }
