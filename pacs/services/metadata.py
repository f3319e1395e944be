"""The metadata of series, ready to send: built once for each state of a series.

A bundle is a JSON array of PS3.18 Annex F objects, once in each content coding, and
beside it the frame table of the series: where the frames of each instance end. It is
valid while its revision is the series' own; who stores or deletes instances raises
that. Building holds no transaction and no more than the compressed bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import orjson
from sqlalchemy import and_, delete, insert, select
from sqlalchemy.exc import IntegrityError

from pacs.domain.study import StoredInstance
from pacs.imaging.frames import FrameTable
from pacs.repository import locate, visible
from pacs.repository.tables import Series, SeriesMetadata, Study
from pacs.services.coding import CODINGS, GZIP, ZSTD, coder, compress, inflated
from storage.db.engine import Database
from storage.kernel.errors import Gone, MalformedObject, NotFound
from storage.kernel.limits import MIB
from storage.kernel.types import Actor, Role, TenantId

#: Larger bundles are built for each request instead of being kept.
MAX_KEPT = 32 * MIB


@dataclass(frozen=True, slots=True)
class MetadataBody:
    """The metadata of a series: a JSON array, compressed, and its entity tag.

    Attributes
    ----------
    frames : bytes
        The frame table: a JSON array with an object for each instance, in the same
        order; see `FrameLengths`.
    """

    etag: str
    gzip_body: bytes
    zstd_body: bytes
    frames: bytes

    def text(self) -> Iterator[bytes]:
        """Yield the JSON array."""
        return inflated(self.gzip_body)

    def coded(self, coding: str) -> bytes:
        """Return the JSON array in a coding of `CODINGS`."""
        return self.zstd_body if coding == ZSTD else self.gzip_body


class FrameLengths(TypedDict):
    """What the frame table says of an instance.

    `frames` counts them. `length` is that of each frame as stored, in bytes, if they
    are all as long; else `lengths` has one for each. `version` names the content: it
    changes with the pixels, never without.
    """

    sop_instance_uid: str
    transfer_syntax_uid: str
    version: str
    frames: int
    length: NotRequired[int]
    lengths: NotRequired[list[int]]


def frame_lengths(instance: StoredInstance, table: FrameTable) -> FrameLengths:
    """Return the entry of an instance in the frame table of its series."""
    entry: FrameLengths = {
        "sop_instance_uid": instance.sop_instance_uid,
        "transfer_syntax_uid": instance.transfer_syntax_uid,
        "version": instance.digest.hex()[:32],
        "frames": len(table),
    }
    if table.fragments is None:
        if len(table):
            entry["length"] = table.size
        return entry
    lengths = [
        sum(size for _, size in table.ranges(number))
        for number in range(1, len(table) + 1)
    ]
    if len(set(lengths)) == 1:
        entry["length"] = lengths[0]
    else:
        entry["lengths"] = lengths
    return entry


@dataclass(frozen=True, slots=True)
class _State:
    """One series as a request found it."""

    pk: int
    revision: int
    tenant: str
    study_uid: str
    series_uid: str


class SeriesBundles:
    """Keeps the bundles of all series.

    Parameters
    ----------
    database : Database
    write : callable
        Returns the JSON object of one instance.
    table : callable
        Returns the frame table of one instance.
    """

    def __init__(
        self,
        database: Database,
        write: Callable[[StoredInstance], bytes],
        table: Callable[[StoredInstance], FrameTable],
    ) -> None:
        self._database = database
        self._write = write
        self._table = table

    def series(self, actor: Actor, study_uid: str, series_uid: str) -> MetadataBody:
        """Return the metadata of a series.

        Raises
        ------
        NotFound
        """
        states = self._states(actor, study_uid, series_uid)
        bodies = [self._bundle(state) for state in states]
        if len(bodies) == 1:
            return bodies[0]
        # The same series in several tenants of this actor.
        packed = _Packer()
        for chunk in _joined(iter(bodies)):
            packed.add(chunk)
        tables = [orjson.loads(body.frames) for body in bodies]
        return packed.body(orjson.dumps([one for table in tables for one in table]))

    def study(self, actor: Actor, study_uid: str) -> tuple[str, Iterator[bytes]]:
        """Return entity tag and JSON array of a whole study, series after series.

        Raises
        ------
        NotFound
        """
        states = self._states(actor, study_uid, None)
        etag = hashlib.sha256()
        for state in states:
            etag.update(self._bundle(state).etag.encode())

        def bodies() -> Iterator[MetadataBody]:
            # Bound: one bundle at a time, whatever the study's size.
            check = hashlib.sha256()
            for state in states:
                body = self._bundle(state)
                check.update(body.etag.encode())
                yield body
            if check.digest() != etag.digest():
                raise Gone("the study changed while it was read")

        return etag.hexdigest()[:32], _joined(bodies())

    def prepare(self, study_uid: str, tenant: str) -> int:
        """Build what is missing for a study; return how many series it has."""
        actor = Actor(TenantId(tenant), "metadata", roles=frozenset({Role.SYSTEM}))
        try:
            states = self._states(actor, study_uid, None)
        except NotFound:
            return 0
        for state in states:
            self._bundle(state)
        return len(states)

    def _states(
        self, actor: Actor, study_uid: str, series_uid: str | None
    ) -> list[_State]:
        query = (
            select(
                Series.id,
                Series.revision,
                Series.tenant,
                Study.study_instance_uid,
                Series.series_instance_uid,
            )
            .join(Study, Study.id == Series.study_pk)
            .where(
                visible.studies(actor),
                Study.study_instance_uid == study_uid,
                Series.n_instances > 0,
            )
            .order_by(Study.id, Series.series_number.nulls_last(), Series.id)
        )
        if series_uid is not None:
            query = query.where(Series.series_instance_uid == series_uid)
        with self._database.read() as connection:
            found = [_State(*row) for row in connection.execute(query)]
        if not found:
            raise NotFound("no such study, series or instance")
        return found

    def _bundle(self, state: _State) -> MetadataBody:
        with self._database.read() as connection:
            kept = connection.execute(
                select(
                    SeriesMetadata.etag,
                    SeriesMetadata.gzip_body,
                    SeriesMetadata.zstd_body,
                    SeriesMetadata.frames_body,
                ).where(
                    SeriesMetadata.series_pk == state.pk,
                    SeriesMetadata.revision == state.revision,
                    # Rows of earlier releases are built again.
                    SeriesMetadata.frames_body.is_not(None),
                )
            ).first()
        if kept is not None:
            etag, gzip_body, zstd_body, frames = kept
            return MetadataBody(
                etag, gzip_body, zstd_body or b"", b"".join(inflated(frames or b""))
            )
        return self._build(state)

    def _build(self, state: _State) -> MetadataBody:
        actor = Actor(TenantId(state.tenant), "metadata")
        with self._database.read() as connection:
            found = locate.instances(
                connection,
                actor,
                study_uid=state.study_uid,
                series_uid=state.series_uid,
            )
        packed = _Packer()
        packed.add(b"[")
        lengths = []
        for i, instance in enumerate(found):
            packed.add(b"," + self._write(instance) if i else self._write(instance))
            lengths.append(self._lengths(instance))
        packed.add(b"]")
        body = packed.body(orjson.dumps(lengths))
        if len(body.gzip_body) <= MAX_KEPT:
            self._keep(state, body)
        return body

    def _lengths(self, instance: StoredInstance) -> FrameLengths:
        try:
            table = self._table(instance)
        except MalformedObject:
            # Its frames cannot be told apart, and cannot be asked for.
            table = FrameTable.empty()
        return frame_lengths(instance, table)

    def _keep(self, state: _State, body: MetadataBody) -> None:
        """Keep a bundle unless the series has moved on."""
        unchanged = select(Series.id).where(
            and_(Series.id == state.pk, Series.revision == state.revision)
        )
        row = {
            "series_pk": state.pk,
            "revision": state.revision,
            "etag": body.etag,
            "gzip_body": body.gzip_body,
            "zstd_body": body.zstd_body,
            "frames_body": compress(body.frames, GZIP),
        }
        try:
            with self._database.ingest() as connection:
                if connection.execute(unchanged).first() is None:
                    return
                connection.execute(
                    delete(SeriesMetadata).where(SeriesMetadata.series_pk == state.pk)
                )
                connection.execute(insert(SeriesMetadata), row)
        except IntegrityError:
            # Another process kept the same bundle at the same moment.
            return


class _Packer:
    """Compresses and digests what is added."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._coders = {coding: coder(coding) for coding in CODINGS}
        self._parts: dict[str, list[bytes]] = {coding: [] for coding in CODINGS}

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        for coding, made in self._coders.items():
            self._parts[coding].append(made.compress(data))

    def body(self, frames: bytes) -> MetadataBody:
        packed = {
            coding: b"".join((*self._parts[coding], made.flush()))
            for coding, made in self._coders.items()
        }
        etag = self._digest.hexdigest()[:32]
        return MetadataBody(etag, packed[GZIP], packed[ZSTD], frames)


def _joined(bodies: Iterator[MetadataBody]) -> Iterator[bytes]:
    """Yield one JSON array of the items of several."""
    yield b"["
    separator = b""
    for body in bodies:
        for chunk in _inside(body):
            yield separator + chunk
            separator = b""
        separator = b","
    yield b"]"


def _inside(body: MetadataBody) -> Iterator[bytes]:
    """Yield a JSON array without its brackets."""
    held, opened = b"", False
    for chunk in body.text():
        data = held + chunk
        if data and not opened:
            data, opened = data[1:], True
        # The last byte may be the closing bracket.
        held = data[-1:]
        if len(data) > 1:
            yield data[:-1]
