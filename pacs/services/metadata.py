"""The metadata of series, ready to send: built once for each state of a series.

A bundle is a gzip-compressed JSON array of PS3.18 Annex F objects. It is valid while
its revision is the series' own; who stores or deletes instances raises that. Building
holds no transaction and no more than the compressed bundle.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import and_, delete, insert, select
from sqlalchemy.exc import IntegrityError

from pacs.domain.study import StoredInstance
from pacs.repository import locate, visible
from pacs.repository.tables import Series, SeriesMetadata, Study
from storage.db.engine import Database
from storage.kernel.errors import Gone, NotFound
from storage.kernel.limits import MIB
from storage.kernel.types import Actor, Role, TenantId

#: Larger bundles are built for each request instead of being kept.
MAX_KEPT = 32 * MIB
CHUNK = 256 * 1024
GZIP = 31


@dataclass(frozen=True, slots=True)
class MetadataBody:
    """The metadata of a series: a gzip-compressed JSON array and its entity tag."""

    etag: str
    gzip_body: bytes

    def text(self) -> Iterator[bytes]:
        """Yield the JSON array."""
        inflater = zlib.decompressobj(GZIP)
        data = self.gzip_body
        while data:
            yield inflater.decompress(data, CHUNK)
            data = inflater.unconsumed_tail
        yield inflater.flush()


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
    """

    def __init__(
        self, database: Database, write: Callable[[StoredInstance], bytes]
    ) -> None:
        self._database = database
        self._write = write

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
        return packed.body()

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
                select(SeriesMetadata.etag, SeriesMetadata.gzip_body).where(
                    SeriesMetadata.series_pk == state.pk,
                    SeriesMetadata.revision == state.revision,
                )
            ).first()
        if kept is not None:
            return MetadataBody(kept[0], kept[1])
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
        for i, instance in enumerate(found):
            packed.add(b"," + self._write(instance) if i else self._write(instance))
        packed.add(b"]")
        body = packed.body()
        if len(body.gzip_body) <= MAX_KEPT:
            self._keep(state, body)
        return body

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
        self._deflater = zlib.compressobj(1, zlib.DEFLATED, GZIP)
        self._parts: list[bytes] = []

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self._parts.append(self._deflater.compress(data))

    def body(self) -> MetadataBody:
        self._parts.append(self._deflater.flush())
        return MetadataBody(self._digest.hexdigest()[:32], b"".join(self._parts))


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
