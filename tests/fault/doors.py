"""The three doors through which an object comes in, and what each answers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import orjson
from pydicom.uid import UID
from pynetdicom.ae import ApplicationEntity
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.presentation import build_context
from sqlalchemy import text

from gateway.importer import import_paths
from pacs.domain.study import Accepted, Arrival, Outcome, StoredInstance
from pacs.imaging.codecs import DecoderPool
from pacs.imaging.part10 import read_file_meta
from pacs.services.describe import Rules
from pacs.services.ingest import IngestService
from pacs.services.query import QueryService
from pacs.services.retrieve import RetrieveService
from storage.db import migrate
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from storage.kernel.errors import (
    DuplicateInstance,
    IdentityMismatch,
    ImagingError,
    MalformedObject,
    TooLarge,
    UnsupportedSopClass,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits
from storage.kernel.settings import SyncPolicy
from storage.kernel.types import Actor, TenantId
from storage.packs.reader import PackReader
from storage.packs.writer import PackWriter
from tests.support.datasets import dataset_bytes
from tests.support.node import RunningNode

ACTOR = Actor(TenantId("default"), "tests")


class Kind(StrEnum):
    """What became of an object."""

    STORED = "stored"
    WARNED = "stored, B007"
    DUPLICATE = "duplicate"
    CONFLICT = "duplicate of other content, 0111"
    NOT_DICOM = "no DICOM file"
    MALFORMED = "cannot be understood, C000"
    IDENTITY = "does not match, A900"
    SOP_CLASS = "SOP class, 0122"
    SYNTAX = "transfer syntax"
    TOO_LARGE = "too large, A700"

    @property
    def is_kept(self) -> bool:
        return self in {Kind.STORED, Kind.WARNED, Kind.DUPLICATE}


@dataclass(frozen=True)
class Answer:
    """What a door said.

    Attributes
    ----------
    tags : set of int
        Attributes that it named.
    """

    kind: Kind
    tags: frozenset[int] = frozenset()
    text: str = ""


class Door(Protocol):
    """Takes Part-10 files."""

    name: str

    def send(self, file: bytes, *, claimed: tuple[str, str] | None = None) -> Answer:
        """Send one object; `claimed`: SOP class and instance of the command."""
        ...

    def has(self, instance_uid: str) -> bool:
        """Tell whether the index shows an instance."""
        ...


_ERRORS: tuple[tuple[type[ImagingError], Kind], ...] = (
    (DuplicateInstance, Kind.CONFLICT),
    (UnsupportedSopClass, Kind.SOP_CLASS),
    (UnsupportedTransferSyntax, Kind.SYNTAX),
    (IdentityMismatch, Kind.IDENTITY),
    (TooLarge, Kind.TOO_LARGE),
    (MalformedObject, Kind.MALFORMED),
)
_TAG = re.compile(r"\(([0-9A-F]{4}),([0-9A-F]{4})\)")


def _named(sentence: str) -> frozenset[int]:
    return frozenset(int(a + b, 16) for a, b in _TAG.findall(sentence))


@dataclass
class _Seen:
    """Passes arrivals on and keeps what became of them."""

    ingest: IngestService
    answers: list[Answer] = field(default_factory=list)

    def check(self, *args: Any, **kwargs: Any) -> None:
        self._note(lambda: self.ingest.check(*args, **kwargs), None)

    def open_spool(self, *args: Any, **kwargs: Any) -> Any:
        return self.ingest.open_spool(*args, **kwargs)

    def flush(self) -> None:
        self.ingest.flush()

    def accept(self, arrival: Arrival) -> Accepted:
        accepted: Accepted = self._note(lambda: self.ingest.accept(arrival), _kind_of)
        return accepted

    def _note(self, act: Callable[[], Any], describe: Any) -> Any:
        try:
            result = act()
        except ImagingError as error:
            kind = next(kind for class_, kind in _ERRORS if isinstance(error, class_))
            tag = getattr(error, "tag", None)
            tags = _named(str(error)) | ({tag} if tag else set())
            self.answers.append(Answer(kind, frozenset(tags), str(error)))
            raise
        if describe is not None:
            self.answers.append(describe(result))
        return result


def _kind_of(accepted: Accepted) -> Answer:
    if accepted.outcome is Outcome.DUPLICATE:
        return Answer(Kind.DUPLICATE)
    tags = frozenset(one.tag for one in accepted.warnings)
    return Answer(Kind.WARNED if tags else Kind.STORED, tags)


class Archive:
    """The services of a node in this process, with the door of imports."""

    name = "import"

    def __init__(self, folder: Path, **rules: Any) -> None:
        self.folder = folder
        self.limits = rules.pop("limits", Limits())
        url = f"sqlite:///{folder / 'index.db'}"
        migrate.upgrade(url)
        self.database = Database(url)
        self.packs = PackWriter(folder / "packs", roll_bytes=1 << 30)
        self.ingest = IngestService(
            database=self.database,
            packs=self.packs,
            rules=Rules(self.limits, **rules),
            clock=SystemClock(),
            sync=SyncPolicy.INSTANCE,
            node_id="node-1",
        )
        self.reader = PackReader(folder / "packs")
        self.decoders = DecoderPool(self.limits)
        self.retrieve = RetrieveService(
            database=self.database,
            reader=self.reader,
            decoders=self.decoders,
            limits=self.limits,
        )
        self.query = QueryService(
            database=self.database, limits=self.limits, headers=self.retrieve
        )
        self._inbox = folder / "inbox"
        self._inbox.mkdir()

    def send(self, file: bytes, *, claimed: tuple[str, str] | None = None) -> Answer:
        path = self._inbox / "object"
        path.write_bytes(file)
        seen = _Seen(self.ingest)
        try:
            summary = import_paths(seen, [path], limits=self.limits)
        finally:
            path.unlink()
        if seen.answers:
            return seen.answers[-1]
        (rejected,) = summary.rejected
        is_part10 = file[128:132] == b"DICM"
        kind = Kind.MALFORMED if is_part10 else Kind.NOT_DICOM
        return Answer(kind, _named(rejected.reason), rejected.reason)

    def find(self, instance_uid: str) -> StoredInstance:
        return self.retrieve.find_instance(ACTOR, instance_uid)

    def has(self, instance_uid: str) -> bool:
        with self.database.read() as connection:
            statement = text("SELECT 1 FROM instance WHERE sop_instance_uid = :uid")
            return (
                connection.execute(statement, {"uid": instance_uid}).first() is not None
            )

    def left_behind(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return rows of each table, and bytes of each file that is no database."""
        rows = {}
        with self.database.read() as connection:
            names = "SELECT name FROM sqlite_master WHERE type = 'table'"
            for table in connection.execute(text(names)).scalars().all():
                rows[table] = connection.execute(
                    text(f"SELECT count(*) FROM {table}")  # noqa: S608
                ).scalar_one()
        files = {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith("index.db")
        }
        return rows, files

    def close(self) -> None:
        self.decoders.close()
        self.packs.close()
        self.reader.close()
        self.database.close()


class _NodeDoor:
    def __init__(self, node: RunningNode) -> None:
        self._node = node

    def has(self, instance_uid: str) -> bool:
        found = self._node.get(
            f"/dicom-web/instances?SOPInstanceUID={instance_uid}",
            accept="application/dicom+json",
        )
        return found.status == 200 and bool(orjson.loads(found.body or b"[]"))


_STATUSES = {
    0x0000: Kind.STORED, 0xB007: Kind.WARNED, 0x0111: Kind.CONFLICT,
    0x0122: Kind.SOP_CLASS, 0xA700: Kind.TOO_LARGE, 0xA900: Kind.IDENTITY,
    0xA901: Kind.IDENTITY, 0x0117: Kind.IDENTITY,
    0xC000: Kind.MALFORMED, 0xC122: Kind.SYNTAX,
}  # fmt: skip


class StoreDoor(_NodeDoor):
    """C-STORE through the real listener."""

    name = "cstore"

    def send(self, file: bytes, *, claimed: tuple[str, str] | None = None) -> Answer:
        meta = read_file_meta(file)
        assert meta is not None
        class_uid, instance_uid = claimed or (
            meta.sop_class_uid,
            meta.sop_instance_uid,
        )
        entity = ApplicationEntity(ae_title="FAULTS")
        association = entity.associate(
            "127.0.0.1",
            self._node.dimse_port,
            ae_title=self._node.aet,
            contexts=[build_context(class_uid, meta.transfer_syntax_uid)],
        )
        if not association.accepted_contexts:
            assert association.rejected_contexts[0].result in {3, 4}
            refused = association.rejected_contexts[0].result
            association.abort()
            return Answer(Kind.SYNTAX if refused == 4 else Kind.SOP_CLASS)
        request = C_STORE()
        request.MessageID = 1
        request.AffectedSOPClassUID = UID(class_uid)
        request.AffectedSOPInstanceUID = UID(instance_uid)
        request.Priority = 0
        # A group length says where File Meta ends; else its elements do.
        has_length = file[132:136] == b"\2\0\0\0"
        offset = meta.dataset_offset
        request.DataSet = BytesIO(dataset_bytes(file) if has_length else file[offset:])
        association._reactor_checkpoint.clear()  # noqa: SLF001
        association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
        _, answer = association.dimse.get_msg(block=True)
        association._reactor_checkpoint.set()  # noqa: SLF001
        association.release()
        assert answer is not None
        named = answer.OffendingElement or []
        tags = [named] if isinstance(named, int) else list(named)
        comment = str(answer.ErrorComment or "")
        return Answer(
            _STATUSES[answer.Status],
            frozenset(int(tag) for tag in tags) | _named(comment),
            comment,
        )


class StowDoor(_NodeDoor):
    """STOW-RS through the real listener."""

    name = "stow"

    def send(self, file: bytes, *, claimed: tuple[str, str] | None = None) -> Answer:
        boundary = "faults-of-table-A"
        body = (
            f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
            + file
            + f"\r\n--{boundary}--\r\n".encode()
        )
        answer = self._node.request(
            "POST",
            "/dicom-web/studies",
            body,
            {
                "Content-Type": 'multipart/related; type="application/dicom"; '
                f"boundary={boundary}",
                "Accept": "application/dicom+json",
            },
        )
        if answer.status == 413:
            return Answer(Kind.TOO_LARGE)
        if answer.status == 400:
            return Answer(Kind.MALFORMED)
        assert answer.status in {200, 202, 409}, (answer.status, answer.body)
        report = orjson.loads(answer.body)
        stored = report.get("00081199", {}).get("Value", [])
        failed = report.get("00081198", report.get("0008119A", {})).get("Value", [])
        (one,) = stored + failed
        sentence = answer.body.decode()
        if stored:
            warned = one.get("00081196", {}).get("Value")
            named = one.get("00741048", {}).get("Value", [])
            return Answer(
                Kind.WARNED if warned else Kind.STORED, _attributes(named), sentence
            )
        (reason,) = one["00081197"]["Value"]
        if reason == 0xC000 and file[128:132] != b"DICM":
            return Answer(Kind.NOT_DICOM, text=sentence)
        return Answer(_STATUSES[reason], _named(sentence), sentence)


def _attributes(items: list[Any]) -> frozenset[int]:
    """Return the tags that Failure or Warning attributes name, wherever they lie."""
    found: set[int] = set()
    pending: list[Any] = list(items)
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list):
            pending += one
        elif isinstance(one, str) and len(one) == 8:
            with suppress(ValueError):
                found.add(int(one, 16))
    return frozenset(found)


def alive(door: Door, file: bytes, instance_uid: str) -> None:
    """Assert that a good object still comes in and is found."""
    assert door.send(file).kind in {Kind.STORED, Kind.DUPLICATE}
    assert door.has(instance_uid)
    assert threading.active_count() < 200
