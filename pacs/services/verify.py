"""Compare index, packs and object store, both ways.

Every row must find its record, whole and unchanged; every record must have a row, a
tombstone or a copy that is indexed; every sealed pack must be in the object store;
the counters must equal a recount. What is found is reported, nothing is changed. It
may run beside a node: what moves meanwhile is looked up again before it is reported.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select

from pacs.repository.tables import Deletion, Instance, Series, Study
from pacs.services.recovery import Finding
from pacs.services.scratch import Scratch, batched
from storage.db.engine import Database
from storage.db.tables import Pack
from storage.kernel.errors import CorruptData, ImagingError, NotFound, StorageFull
from storage.kernel.limits import MIB
from storage.objects.protocol import ObjectStore
from storage.packs.format import Kind, RecordInfo
from storage.packs.reader import object_key
from storage.packs.recover import (
    Damage,
    check_pack_file,
    is_alive,
    iter_pack_files,
    iter_records,
    view_object,
)
from storage.packs.writer import pack_path

#: Findings that one report keeps; the rest is only counted.
MAX_FINDINGS = 10_000
#: Records that are compared with rows at a time.
WINDOW = 500
CHUNK = 4 * MIB
PACKS = "packs/"

#: Gets (bytes done, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Verified:
    """The report of one verification.

    Attributes
    ----------
    elsewhere : int
        Local packs of other hosts, which cannot be read here.
    n_findings : int
        All of them; `findings` keeps the first `MAX_FINDINGS`.
    """

    packs: int = 0
    elsewhere: int = 0
    objects: int = 0
    records: int = 0
    instances: int = 0
    size_bytes: int = 0
    n_findings: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.n_findings

    def report(self, finding: Finding) -> None:
        self.n_findings += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(finding)


@dataclass(frozen=True, slots=True)
class _PackRow:
    pk: int
    key: str
    tenant: str
    place: str
    node_id: str
    state: str
    size_bytes: int
    sha256: bytes | None


class Verifier:
    """Verify one node.

    Parameters
    ----------
    database : Database
    folder : Path
        Local packs.
    objects : ObjectStore or None
    node_id : str
        Whose local packs lie in `folder`.
    """

    def __init__(
        self,
        *,
        database: Database,
        folder: Path,
        objects: ObjectStore | None,
        node_id: str,
    ) -> None:
        self._database = database
        self._folder = folder
        self._objects = objects
        self._node_id = node_id

    def verify(
        self, *, fast: bool = False, progress: Progress | None = None
    ) -> Verified:
        """Compare everything with everything.

        Parameters
        ----------
        fast : bool
            Leave checksums and digests out; packs in the object store are then only
            asked for their size.

        Raises
        ------
        DependencyDown
            The database does not answer.
        """
        done = Verified()
        with self._database.read() as connection:
            total = int(connection.scalar(select(func.sum(Pack.size_bytes))) or 0)
        seen = 0
        with Scratch(self._folder.parent) as scratch:
            for pack in self._pack_rows():
                self._verify_pack(pack, done, scratch, fast=fast)
                seen += pack.size_bytes
                if progress is not None:
                    progress(seen, max(seen, total))
            self._verify_files(scratch, done)
            if self._objects is not None:
                self._verify_objects(self._objects, done)
            self._settle_accounts(scratch, done)
        self._verify_counters(done)
        return done

    def _pack_rows(self) -> Iterator[_PackRow]:
        """Yield the packs by key, a page at a time."""
        last = ""
        while True:
            with self._database.read() as connection:
                rows = connection.execute(
                    select(
                        Pack.id,
                        Pack.key,
                        Pack.tenant,
                        Pack.place,
                        Pack.node_id,
                        Pack.state,
                        Pack.size_bytes,
                        Pack.sha256,
                    )
                    .where(Pack.key > last)
                    .order_by(Pack.key)
                    .limit(WINDOW)
                ).all()
            if not rows:
                return
            for row in rows:
                yield _PackRow(*row)
            last = rows[-1][1]

    def _verify_pack(
        self, pack: _PackRow, done: Verified, scratch: Scratch, *, fast: bool
    ) -> None:
        if pack.place == "local":
            if pack.node_id != self._node_id:
                done.elsewhere += 1
                return
            path = pack_path(self._folder, pack.key)
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                self._lost(pack, done, "pack.missing")
                return
            if size < pack.size_bytes and self._still(pack):
                done.report(
                    Finding("pack.short", pack.tenant, pack=pack.key, offset=size)
                )
            done.packs += 1
            self._verify_records(pack, path, done, scratch, fast=fast)
            return
        done.objects += 1
        try:
            with self._fetched(pack, done, fast=fast) as copy:
                if copy is not None:
                    self._verify_records(pack, copy, done, scratch, fast=fast)
        except NotFound:
            self._lost(pack, done, "object.missing")
        except StorageFull:
            raise
        except ImagingError as error:
            done.report(
                Finding(
                    "object.unreadable", pack.tenant, pack=pack.key, detail=error.code
                )
            )

    @contextmanager
    def _fetched(
        self, pack: _PackRow, done: Verified, *, fast: bool
    ) -> Iterator[Path | None]:
        """Check a pack in the object store as a whole; yield a copy to look into."""
        if self._objects is None:
            raise NotFound("no object store")
        name = object_key(pack.key)
        info = self._objects.stat(name)
        if info is None:
            raise NotFound("no such object")
        expected = pack.sha256.hex() if pack.sha256 else ""
        if pack.size_bytes and info.size != pack.size_bytes:
            done.report(
                Finding(
                    "object.size", pack.tenant, pack=pack.key, detail=str(info.size)
                )
            )
        if expected and info.sha256 not in {"", expected}:
            done.report(Finding("object.digest", pack.tenant, pack=pack.key))
        if fast:
            yield None
            return
        with fetched(self._objects, pack.key, info.size, self._folder.parent) as copy:
            path, digest = copy
            if expected and digest != expected:
                done.report(Finding("object.changed", pack.tenant, pack=pack.key))
            yield path

    def _lost(self, pack: _PackRow, done: Verified, kind: str) -> None:
        """Report a pack that is gone although rows need it."""
        with self._database.read() as connection:
            count = connection.scalar(
                select(func.count()).where(Instance.pack_pk == pack.pk)
            )
        if (count or pack.state == "closed") and self._still(pack):
            done.report(
                Finding(
                    kind, pack.tenant, pack=pack.key, detail=f"{count or 0} instances"
                )
            )

    def _still(self, pack: _PackRow) -> bool:
        """Tell whether a pack is still where it was when the verification began."""
        with self._database.read() as connection:
            row = connection.execute(
                select(Pack.place, Pack.state).where(Pack.id == pack.pk)
            ).first()
        return row is not None and tuple(row) == (pack.place, pack.state)

    def _verify_records(
        self,
        pack: _PackRow,
        path: Path,
        done: Verified,
        scratch: Scratch,
        *,
        fast: bool,
    ) -> None:
        """Walk a pack and its rows side by side, a window at a time."""
        start = 0
        try:
            if pack.place == "local":
                check_pack_file(path)
            found = iter_records(path, check_objects=not fast)
            for window in batched(found, WINDOW):
                end = window[-1].end
                self._compare(pack, path, window, start, end, done, scratch, fast=fast)
                start = end
        except CorruptData as error:
            done.report(
                Finding("pack.damaged", pack.tenant, pack=pack.key, detail=str(error))
            )
        self._compare(pack, path, (), start, None, done, scratch, fast=fast)

    def _compare(
        self,
        pack: _PackRow,
        path: Path,
        window: tuple[RecordInfo | Damage, ...],
        start: int,
        end: int | None,
        done: Verified,
        scratch: Scratch,
        *,
        fast: bool,
    ) -> None:
        rows = self._rows_between(pack, start, end)
        for one in window:
            if isinstance(one, Damage):
                inside = [at for at in rows if one.start <= at < one.end]
                # The tail of a pack that grows is a record on its way.
                if not inside and not (one.torn and is_alive(path)):
                    done.report(
                        Finding(
                            "pack.damaged", pack.tenant, pack=pack.key, offset=one.start
                        )
                    )
                continue
            done.records += 1
            if one.kind is Kind.TOMBSTONE:
                scratch.add_tombstone(one.header)
                continue
            row = rows.pop(one.location.record_offset, None)
            if row is None:
                scratch.add_object(one, place=pack.place)
                continue
            done.instances += 1
            done.size_bytes += one.location.object_length
            wrong = _difference(row, one, path, fast=fast)
            if wrong and self._is_at(row, pack):
                done.report(_about(row, pack, wrong))
        for row in rows.values():
            # No record begins where the index says.
            if self._is_at(row, pack):
                done.report(_about(row, pack, "record.damaged"))

    def _rows_between(
        self, pack: _PackRow, start: int, end: int | None
    ) -> dict[int, Any]:
        within = [Instance.pack_pk == pack.pk, Instance.record_offset >= start]
        if end is not None:
            within.append(Instance.record_offset < end)
        with self._database.read() as connection:
            rows = connection.execute(
                select(
                    Instance.id,
                    Instance.tenant,
                    Instance.sop_instance_uid,
                    Instance.sop_class_uid,
                    Instance.transfer_syntax_uid,
                    Instance.digest,
                    Instance.record_offset,
                    Instance.object_offset,
                    Instance.object_length,
                    Instance.dataset_offset,
                    Series.series_instance_uid,
                    Study.study_instance_uid,
                )
                .select_from(Instance)
                .join(Series, Series.id == Instance.series_pk)
                .join(Study, Study.id == Series.study_pk)
                .where(*within)
            )
            return {row.record_offset: row for row in rows}

    def _is_at(self, row: Any, pack: _PackRow) -> bool:
        """Tell whether an instance is still where it was when it was looked up."""
        with self._database.read() as connection:
            found = connection.execute(
                select(Instance.id).where(
                    Instance.id == row.id,
                    Instance.sop_instance_uid == row.sop_instance_uid,
                    Instance.pack_pk == pack.pk,
                    Instance.record_offset == row.record_offset,
                )
            ).first()
        return found is not None

    def _verify_files(self, scratch: Scratch, done: Verified) -> None:
        """Look into local packs that have no row."""
        for batch in batched(iter_pack_files(self._folder), WINDOW):
            with self._database.read() as connection:
                known = set(
                    connection.scalars(
                        select(Pack.key).where(Pack.key.in_([p.stem for p in batch]))
                    )
                )
            for path in batch:
                if path.stem in known or is_alive(path) or not path.exists():
                    continue
                self._verify_stray(path, scratch, done)

    @staticmethod
    def _verify_stray(path: Path, scratch: Scratch, done: Verified) -> None:
        """Report a pack without a row, unless it holds tombstones only."""
        has_objects = False
        try:
            for one in iter_records(path):
                if isinstance(one, Damage):
                    continue
                if one.kind is Kind.TOMBSTONE:
                    scratch.add_tombstone(one.header)
                else:
                    has_objects = True
        except CorruptData as error:
            done.report(Finding("pack.damaged", pack=path.stem, detail=str(error)))
        if has_objects:
            done.report(Finding("pack.stray", pack=path.stem))

    def _verify_objects(self, objects: ObjectStore, done: Verified) -> None:
        """Report objects that no pack row names."""
        for batch in batched(objects.list(PACKS), WINDOW):
            keys = {pack_key(one.key): one for one in batch}
            with self._database.read() as connection:
                known = set(
                    connection.scalars(select(Pack.key).where(Pack.key.in_(list(keys))))
                )
            for key, one in keys.items():
                if key not in known:
                    done.report(Finding("object.stray", pack=key, detail=one.key))

    def _settle_accounts(self, scratch: Scratch, done: Verified) -> None:
        """Account for records without rows, and for tombstones of indexed content."""
        for batch in batched(scratch.unburied(), WINDOW):
            held = self._held((one.tenant, one.uid) for one in batch)
            for one in batch:
                if held.get((one.tenant, one.uid)) == one.digest:
                    continue  # another copy of what is indexed
                if self._was_deleted(one.tenant, one.uid, one.digest, one.received_us):
                    continue
                done.report(
                    Finding(
                        "record.unindexed",
                        one.tenant,
                        instance_uid=one.uid,
                        pack=one.pack,
                        offset=one.offset,
                    )
                )
        for graves in batched(scratch.tombstones(), WINDOW):
            with self._database.read() as connection:
                found = connection.execute(
                    select(
                        Instance.tenant,
                        Instance.sop_instance_uid,
                        Series.series_instance_uid,
                        Study.study_instance_uid,
                    )
                    .select_from(Instance)
                    .join(Series, Series.id == Instance.series_pk)
                    .join(Study, Study.id == Series.study_pk)
                    .where(
                        or_(
                            *(
                                and_(
                                    Instance.tenant == tenant,
                                    Instance.sop_instance_uid == uid,
                                    Instance.digest == digest,
                                    Instance.received_us <= received_us,
                                )
                                for tenant, uid, digest, received_us in graves
                            )
                        )
                    )
                ).all()
            for tenant, uid, series, study in found:
                done.report(Finding("row.deleted", tenant, study, series, uid))

    def _held(self, keys: Any) -> dict[tuple[str, str], bytes]:
        wanted: list[ColumnElement[bool]] = [
            and_(Instance.tenant == tenant, Instance.sop_instance_uid == uid)
            for tenant, uid in keys
        ]
        with self._database.read() as connection:
            rows = connection.execute(
                select(
                    Instance.tenant, Instance.sop_instance_uid, Instance.digest
                ).where(or_(*wanted))
            )
            return {(tenant, uid): bytes(digest) for tenant, uid, digest in rows}

    def _was_deleted(
        self, tenant: str, uid: str, digest: bytes, received_us: int
    ) -> bool:
        with self._database.read() as connection:
            found = connection.execute(
                select(Deletion.id).where(
                    Deletion.tenant == tenant,
                    Deletion.sop_instance_uid == uid,
                    Deletion.digest == digest,
                    Deletion.deleted_us >= received_us,
                )
            ).first()
        return found is not None

    def _verify_counters(self, done: Verified) -> None:
        """Compare what series and studies count with their instances."""
        counted = (
            select(
                Instance.series_pk.label("pk"),
                func.count().label("n"),
                func.sum(Instance.object_length).label("size"),
            )
            .group_by(Instance.series_pk)
            .subquery()
        )
        n, size = func.coalesce(counted.c.n, 0), func.coalesce(counted.c.size, 0)
        wrong_series = (
            select(
                Series.tenant,
                Study.study_instance_uid,
                Series.series_instance_uid,
                Series.n_instances,
                Series.size_bytes,
                n,
                size,
            )
            .select_from(Series)
            .join(Study, Study.id == Series.study_pk)
            .outerjoin(counted, counted.c.pk == Series.id)
            .where(or_(Series.n_instances != n, Series.size_bytes != size))
        )
        summed = (
            select(
                Series.study_pk.label("pk"),
                func.count().label("series"),
                func.sum(n).label("n"),
                func.sum(size).label("size"),
            )
            .select_from(Series)
            .outerjoin(counted, counted.c.pk == Series.id)
            .group_by(Series.study_pk)
            .subquery()
        )
        n_series = func.coalesce(summed.c.series, 0)
        n, size = func.coalesce(summed.c.n, 0), func.coalesce(summed.c.size, 0)
        wrong_studies = (
            select(
                Study.tenant,
                Study.study_instance_uid,
                Study.n_series,
                Study.n_instances,
                Study.size_bytes,
                n_series,
                n,
                size,
            )
            .select_from(Study)
            .outerjoin(summed, summed.c.pk == Study.id)
            .where(
                or_(
                    Study.n_series != n_series,
                    Study.n_instances != n,
                    Study.size_bytes != size,
                )
            )
        )
        with self._database.read() as connection:
            for tenant, study, series, *numbers in connection.execute(wrong_series):
                done.report(
                    Finding(
                        "counter.series", tenant, study, series, detail=_told(numbers)
                    )
                )
            for tenant, study, *numbers in connection.execute(wrong_studies):
                done.report(
                    Finding("counter.study", tenant, study, detail=_told(numbers))
                )


def pack_key(name: str) -> str:
    """Return the key of the pack that the object `name` is."""
    return name.rpartition("/")[2].removesuffix(".pack")


@contextmanager
def fetched(
    objects: ObjectStore, key: str, size: int, folder: Path
) -> Iterator[tuple[Path, str]]:
    """Copy a pack out of the object store; yield the copy and its SHA-256."""
    if shutil.disk_usage(folder).free < size + CHUNK:
        raise StorageFull("no space to look into a pack of the object store")
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".verify-") as file:
        for offset in range(0, size, CHUNK):
            data = objects.read(object_key(key), offset, min(CHUNK, size - offset))
            digest.update(data)
            file.write(data)
        file.flush()
        yield Path(file.name), digest.hexdigest()


def _difference(row: Any, info: RecordInfo, path: Path, *, fast: bool) -> str:
    """Return what a row and its record do not agree about."""
    header, place = info.header, info.location
    said = (
        header.tenant,
        header.sop_instance_uid,
        header.sop_class_uid,
        header.transfer_syntax_uid,
    )
    if said != (
        row.tenant,
        row.sop_instance_uid,
        row.sop_class_uid,
        row.transfer_syntax_uid,
    ):
        return "record.header"
    if (place.object_offset, place.object_length, header.dataset_offset) != (
        row.object_offset,
        row.object_length,
        row.dataset_offset,
    ):
        return "record.place"
    if info.digest != bytes(row.digest):
        return "record.digest"
    if not fast:
        with view_object(path, info) as view, view[header.dataset_offset :] as data:
            if hashlib.sha256(data).digest() != info.digest:
                return "record.changed"
    return ""


def _about(row: Any, pack: _PackRow, kind: str) -> Finding:
    return Finding(
        kind,
        row.tenant,
        row.study_instance_uid,
        row.series_instance_uid,
        row.sop_instance_uid,
        pack.key,
        row.record_offset,
    )


def _told(numbers: list[Any]) -> str:
    half = len(numbers) // 2
    return f"{numbers[:half]} instead of {[int(n) for n in numbers[half:]]}"
