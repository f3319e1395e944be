"""Kill processes of a storing node at random; what was acknowledged must stay.

``python -m tests.fault.crash_loop --kills 50`` is the full run. Four associations and
a STOW-RS client store all the time. The model keeps, for every SOP Instance UID, the
contents that were sent and the one that was acknowledged. At the end every
acknowledged instance is there, bit for bit; whatever else is visible was sent whole;
index, packs and objects agree and the counters equal a recount.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from sqlalchemy import text

from gateway.app import open_objects, pack_folder
from pacs.dimse.client import connect, propose
from pacs.dimse.dial import Address, Timeouts
from pacs.domain.study import ByteStream
from pacs.imaging.part10 import file_meta
from pacs.services.verify import Verified, Verifier
from storage.db.engine import Database
from storage.kernel.errors import ImagingError
from storage.kernel.settings import load_settings
from storage.packs.reader import PackReader
from tests.support.datasets import ct_slice, dataset_bytes, part10, uid
from tests.support.node import RunningNode
from tests.support.waiting import wait_until

N_ASSOCIATIONS = 4
#: Instances of one association, and of one STOW-RS request.
BURST, REQUEST = 12, 4
SIZES = (32, 64, 128, 256, 512)
#: Above the limit of what is received in memory.
LARGE = 1500
TIMEOUTS = Timeouts(connect=2, acse=10, dimse=30, write=10)
SUCCESS, DUPLICATE, OUT_OF_RESOURCES = 0x0000, 0x0111, 0xA700
#: Of whom one is killed at a time; a supervisor takes all with it.
VICTIMS = ("dimse", "dimse", "dimse", "web", "worker", "supervisor")
PAUSE_SECONDS = (0.2, 1.2)
_FIRST = 100_000_000_000
_MARK = 999_999_999_999
_BOUNDARY = "burst"


class TryAgain(Exception):
    """The node asked for another try."""


@dataclass(frozen=True, slots=True)
class Made:
    """One instance in one content."""

    uid: str
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


class Maker:
    """Make instances quickly: encoded once, then only UID and pixels change."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._forms = [
            dataset_bytes(part10(ct_slice(size=size, SOPInstanceUID=uid(1, _MARK))))
            for size in (*SIZES, LARGE)
        ]

    def make(self, number: int, version: int) -> Made:
        """Return instance `number`, always the same; a version has its own content."""
        chance = random.Random(f"{self._seed}/{number}")  # noqa: S311  # repeatable
        weights = [20] * len(SIZES) + [1]
        [form] = chance.choices(self._forms, weights)
        data = form.replace(str(_MARK).encode(), str(number).encode(), 1)
        return Made(uid(1, number), data[:-8] + version.to_bytes(8, "little"))


@dataclass
class Model:
    """What was sent and what was acknowledged."""

    sent: dict[str, set[str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    interruptions: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    _number: int = _FIRST
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, count: int) -> list[int]:
        with self._lock:
            self._number += count
            return list(range(self._number - count, self._number))

    def offer(self, made: Made) -> None:
        with self._lock:
            self.sent.setdefault(made.uid, set()).add(made.digest)

    def acknowledge(self, made: Made) -> None:
        with self._lock:
            self.kept[made.uid] = made.digest

    def interrupt(self) -> None:
        with self._lock:
            self.interruptions += 1

    def refuse(self, answer: str) -> None:
        with self._lock:
            self.refusals[answer] += 1


#: Sends a burst; yields once for each instance that needs no further try.
Send = Callable[[RunningNode, Model, Sequence[Made]], Iterator[None]]


def by_association(
    node: RunningNode, model: Model, burst: Sequence[Made]
) -> Iterator[None]:
    """Store each instance of `burst` with C-STORE on one association."""
    contexts = propose([(CTImageStorage, (ExplicitVRLittleEndian,))])
    address = Address("127.0.0.1", node.dimse_port, node.aet)
    with connect(address, "CRASHLOOP", contexts, timeouts=TIMEOUTS) as association:
        offer = association.offer(CTImageStorage)
        for made in burst:
            model.offer(made)
            stream = ByteStream(
                len(made.data), iter([made.data]), ExplicitVRLittleEndian
            )
            status = association.store(made.uid, CTImageStorage, stream, offer)
            if status == SUCCESS:
                model.acknowledge(made)
            elif status & 0xFF00 == OUT_OF_RESOURCES:
                raise TryAgain
            elif status != DUPLICATE:
                model.refuse(f"{status:04X}")
            yield


def by_request(
    node: RunningNode, model: Model, burst: Sequence[Made]
) -> Iterator[None]:
    """Store all of `burst` with one STOW-RS request (PS3.18 10.5)."""
    body = b""
    for made in burst:
        model.offer(made)
        meta = file_meta(CTImageStorage, made.uid, ExplicitVRLittleEndian)
        body += f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body += meta + made.data + b"\r\n"
    body += f"--{_BOUNDARY}--\r\n".encode()
    answer = node.request(
        "POST",
        "/dicom-web/studies",
        body,
        {
            "Content-Type": 'multipart/related; type="application/dicom";'
            f" boundary={_BOUNDARY}",
            "Accept": "application/dicom+json",
        },
        timeout=30,
    )
    if answer.status in {503, 507}:
        raise TryAgain
    if answer.status not in {200, 202, 409}:
        model.refuse(f"HTTP {answer.status}")
        return
    stored = {
        item["00081155"]["Value"][0]
        for item in answer.json().get("00081199", {}).get("Value", ())
    }
    for made in burst:
        if made.uid in stored:
            model.acknowledge(made)
        yield


class Sender(threading.Thread):
    """Store bursts of new instances; what failed comes again, sometimes changed."""

    def __init__(
        self,
        send: Callable[[Sequence[Made]], Iterator[None]],
        model: Model,
        maker: Maker,
        stop: threading.Event,
        *,
        size: int,
        seed: str,
    ) -> None:
        super().__init__(name=seed, daemon=True)
        self._send = send
        self._model = model
        self._maker = maker
        self._stopping = stop
        self._size = size
        self._chance = random.Random(seed)  # noqa: S311  # repeatable
        self._again: list[int] = []

    def run(self) -> None:
        while not self._stopping.is_set():
            numbers = self._again or self._model.take(self._size)
            version = 2 if self._again and self._chance.random() < 0.2 else 1
            burst = [self._maker.make(number, version) for number in numbers]
            done = 0
            try:
                for _ in self._send(burst):
                    done += 1
            except (TryAgain, ImagingError, OSError, http.client.HTTPException):
                self._model.interrupt()
                self._stopping.wait(0.05)
            self._again = numbers[done:] if done < len(numbers) else []


@dataclass(slots=True)
class Outcome:
    """What a run came to; `faults` is empty when all is well."""

    kills: Counter[str]
    acknowledged: int
    sent: int
    visible: int
    interruptions: int
    seconds: float
    verified: Verified
    faults: list[str]

    def line(self) -> str:
        """Return the result in one line."""
        killed = ", ".join(f"{n} {name}" for name, n in sorted(self.kills.items()))
        return (
            f"crash loop: {'FAILED' if self.faults else 'ok'}:"
            f" {self.kills.total()} kills ({killed}) in {self.seconds:.0f} s;"
            f" {self.sent} instances sent, {self.acknowledged} acknowledged,"
            f" {self.visible} stored, {self.interruptions} senders interrupted;"
            f" {len(self.faults)} faults,"
            f" {self.verified.n_findings} findings of the verifier"
        )


def run(folder: Path, *, kills: int, seed: int) -> Outcome:
    """Run the loop on an empty node below `folder`."""
    started = time.monotonic()
    chance = random.Random(seed)  # noqa: S311  # repeatable
    model, maker, stop = Model(), Maker(seed), threading.Event()
    node = RunningNode.start(
        folder,
        packs__roll_bytes=8 << 20,
        packs__seal_grace_seconds=1,
        log__level="WARNING",
    )
    senders = [
        Sender(
            lambda burst, way=way: way(node, model, burst),  # type: ignore[misc]
            model,
            maker,
            stop,
            size=size,
            seed=f"{seed}/{number}",
        )
        for number, (way, size) in enumerate(
            [(by_association, BURST)] * N_ASSOCIATIONS + [(by_request, REQUEST)]
        )
    ]
    killed: Counter[str] = Counter()
    try:
        for sender in senders:
            sender.start()
        for _ in range(kills):
            _wait_for_progress(model)
            time.sleep(chance.uniform(*PAUSE_SECONDS))
            killed[_kill_one(node, chance)] += 1
        _wait_for_progress(model)
        # The end is a crash too, with all senders under way.
        node.kill()
        stop.set()
        for sender in senders:
            sender.join(60)
        node.restart()
    finally:
        stop.set()
        node.stop()
    return _judge(node, model, killed, time.monotonic() - started)


def _wait_for_progress(model: Model) -> None:
    before = len(model.kept)
    wait_until(lambda: len(model.kept) > before, "an acknowledgement", seconds=90)


def _kill_one(node: RunningNode, chance: random.Random) -> str:
    """Kill a process at random; the supervisor starts it again, or we all."""
    kind = chance.choice(VICTIMS)
    names = sorted(name for name in node.processes() if kind in name)
    if not names:
        node.kill()
        node.restart()
        return "supervisor"
    with suppress(ProcessLookupError, KeyError):  # it was being started again
        node.kill(chance.choice(names))
    return kind


def _judge(
    node: RunningNode, model: Model, killed: Counter[str], seconds: float
) -> Outcome:
    """Compare what the stopped node holds with the model."""
    settings = load_settings(overrides={"data": str(node.data)}, environ={})
    database = Database(settings.database_url())
    objects = open_objects(settings)
    reader = PackReader(pack_folder(settings), objects)
    faults = [
        f"unexpected answer {answer} ({n} times)"
        for answer, n in model.refusals.items()
    ]
    visible: dict[str, str] = {}
    with database.read() as connection:
        rows = connection.execute(
            text(
                "SELECT sop_instance_uid, key, object_offset + dataset_offset,"
                " object_length - dataset_offset"
                " FROM instance JOIN pack ON pack.id = pack_pk"
            )
        )
        for name, key, start, length in rows:
            digest = hashlib.sha256()
            for data in reader.iter_range(key, start, length):
                digest.update(data)
            visible[name] = digest.hexdigest()
    for name, kept in model.kept.items():
        if name not in visible:
            faults.append(f"{name} was acknowledged and is gone")
        elif visible[name] != kept:
            faults.append(f"{name} is not what was acknowledged")
    faults += [
        f"{name} is visible and was never sent like that"
        for name, held in visible.items()
        if held not in model.sent.get(name, ())
    ]
    verified = Verifier(
        database=database,
        folder=pack_folder(settings),
        objects=objects,
        node_id=settings.node.id,
    ).verify()
    faults += [f"verifier: {finding}" for finding in verified.findings]
    reader.close()
    database.close()
    return Outcome(
        killed,
        len(model.kept),
        len(model.sent),
        len(visible),
        model.interruptions,
        seconds,
        verified,
        faults,
    )


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="huying-crash-"))
    try:
        outcome = run(folder, kills=given.kills, seed=given.seed)
    finally:
        if given.keep:
            print(f"kept {folder}")  # noqa: T201
        else:
            shutil.rmtree(folder, ignore_errors=True)
    for fault in outcome.faults[:50]:
        print(fault)  # noqa: T201
    print(outcome.line())  # noqa: T201
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
