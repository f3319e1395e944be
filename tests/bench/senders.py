"""Clients that cost next to nothing, so that the servers are what is measured.

Everything is encoded before the clock starts. Each client runs in a process of its
own (``python -m tests.bench.senders``, a JSON list on its input) and prints one JSON
line.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pacs.dimse import command as cmd
from pacs.dimse.command import CommandField
from pacs.dimse.pdu import (
    COMMAND,
    RELEASE_RQ,
    PduType,
    ProposedContext,
    data_pdus,
    encode_associate_rq,
    parse_associate_ac,
)
from pacs.imaging.part10 import read_file_meta
from tests.bench.dataset import retagged

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
PDU = 1 << 20
SECONDS = 300.0


@dataclass(slots=True)
class Result:
    """What one client did; `seconds` is from the first byte out to the last in."""

    n: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    failed: int = 0
    latencies: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Wire:
    """One association, without any checks."""

    def __init__(
        self, port: int, aet: str, contexts: list[ProposedContext], **roles: Any
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self.socket.makefile("rb", 1 << 20)
        self.socket.sendall(
            encode_associate_rq(
                called_ae=aet,
                calling_ae="BENCH",
                contexts=contexts,
                max_length=PDU,
                **roles,
            )
        )
        kind, body = self.read()
        if kind != PduType.ASSOCIATE_AC:
            raise RuntimeError(f"association refused: PDU {kind}, {body!r}")
        answer = parse_associate_ac(body)
        self.max_pdu = min(answer.max_length or PDU, PDU)
        self.accepted = {
            one.context_id: one.transfer_syntax
            for one in answer.contexts
            if not one.result
        }

    def read(self) -> tuple[int, bytes]:
        head = self._stream.read(6)
        if len(head) < 6:
            raise EOFError("the server closed the association")
        kind, length = struct.unpack(">BxI", head)
        return kind, self._stream.read(length)

    def pdvs(self) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (context, flags, fragment) of the next P-DATA-TF."""
        kind, body = self.read()
        if kind != PduType.DATA:
            raise RuntimeError(f"unexpected PDU {kind}: {body!r}")
        view = memoryview(body)
        position = 0
        while position < len(body):
            length, context, flags = struct.unpack_from(">IBB", body, position)
            yield context, flags, view[position + 6 : position + 4 + length]
            position += 4 + length

    def release(self) -> None:
        self.socket.sendall(RELEASE_RQ)
        with suppress(EOFError):
            self.read()
        self.socket.close()


def _message(
    context: int, command: dict[int, cmd.Value], data: bytes | None, max_pdu: int
) -> bytes:
    parts = [*data_pdus(context, COMMAND, cmd.encode(command), max_pdu, last=True)]
    if data is not None:
        parts += data_pdus(context, 0, data, max_pdu, last=True)
    return b"".join(parts)


def store(
    port: int, aet: str, files: list[str], tag: int, repeats: int, gate: Gate
) -> Result:
    """Send files with new UIDs, one association."""
    objects = []
    for name in files:
        data = Path(name).read_bytes()
        meta = read_file_meta(data)
        assert meta is not None
        objects.append((meta, data[meta.dataset_offset :]))
    classes = sorted({meta.sop_class_uid for meta, _ in objects})
    ids = {uid: 2 * i + 1 for i, uid in enumerate(classes)}
    wire = Wire(
        port, aet, [ProposedContext(i, uid, (EXPLICIT,)) for uid, i in ids.items()]
    )
    jobs: list[bytes] = []
    for repeat in range(repeats):
        for meta, data in objects:
            uid = retagged(meta.sop_instance_uid.encode(), tag + repeat).decode()
            command: dict[int, cmd.Value] = {
                cmd.AFFECTED_CLASS: meta.sop_class_uid,
                cmd.FIELD: CommandField.C_STORE_RQ,
                cmd.MESSAGE_ID: len(jobs) % 65535 + 1,
                cmd.PRIORITY: 0,
                cmd.DATASET_TYPE: 1,
                cmd.AFFECTED_INSTANCE: uid,
            }
            body = retagged(data, tag + repeat)
            context = ids[meta.sop_class_uid]
            jobs.append(_message(context, command, body, wire.max_pdu))
    done = Result(n=len(jobs), n_bytes=sum(map(len, jobs)))
    gate.ready()
    started = time.perf_counter()
    for job in jobs:
        sent = time.perf_counter()
        wire.socket.sendall(job)
        for _, _, fragment in wire.pdvs():
            done.failed += cmd.number(cmd.decode(fragment), cmd.STATUS, 1) != 0
        done.latencies.append(time.perf_counter() - sent)
    done.seconds = time.perf_counter() - started
    wire.release()
    return done


def find(port: int, aet: str, gate: Gate) -> Result:
    """Find all studies, study root, seven keys."""
    keys = b"".join(
        struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value
        for tag, value in (
            (0x00080020, b""), (0x00080050, b""), (0x00080052, b"STUDY "),
            (0x00100010, b""), (0x00100020, b""), (0x0020000D, b""),
            (0x00201208, b""),
        )
    )  # fmt: skip
    wire = Wire(port, aet, [ProposedContext(1, STUDY_ROOT_FIND, (IMPLICIT,))])
    gate.ready()
    done = Result()
    started = time.perf_counter()
    wire.socket.sendall(
        _message(1, _request(CommandField.C_FIND_RQ, STUDY_ROOT_FIND), keys, 16384)
    )
    while True:
        for _, flags, fragment in wire.pdvs():
            done.n_bytes += len(fragment)
            if not flags & COMMAND:
                continue
            status = cmd.number(cmd.decode(fragment), cmd.STATUS)
            if status in {0xFF00, 0xFF01}:
                done.n += 1
                continue
            done.failed = int(status != 0)
            done.seconds = time.perf_counter() - started
            wire.release()
            return done


def _request(field_: int, class_uid: str, **more: cmd.Value) -> dict[int, cmd.Value]:
    request: dict[int, cmd.Value] = {
        cmd.AFFECTED_CLASS: class_uid,
        cmd.FIELD: field_,
        cmd.MESSAGE_ID: 1,
        cmd.PRIORITY: 0,
        cmd.DATASET_TYPE: 1,
    }
    if "destination" in more:
        request[cmd.MOVE_DESTINATION] = more["destination"]
    return request


def _study_keys(study_uid: str) -> bytes:
    uid = study_uid.encode() + b"\0" * (len(study_uid) % 2)
    return (
        struct.pack("<HHI", 0x0008, 0x0052, 6)
        + b"STUDY "
        + struct.pack("<HHI", 0x0020, 0x000D, len(uid))
        + uid
    )


def get(port: int, aet: str, study_uid: str, class_uid: str, gate: Gate) -> Result:
    """Retrieve a study on the same association."""
    wire = Wire(
        port,
        aet,
        [
            ProposedContext(1, STUDY_ROOT_GET, (IMPLICIT,)),
            ProposedContext(3, class_uid, (EXPLICIT,)),
        ],
        roles={class_uid: (False, True)},
    )
    gate.ready()
    done = Result()
    started = time.perf_counter()
    request = _request(CommandField.C_GET_RQ, STUDY_ROOT_GET)
    wire.socket.sendall(_message(1, request, _study_keys(study_uid), 16384))
    store_request: dict[int, cmd.Value] = {}
    while True:
        for context, flags, fragment in wire.pdvs():
            if flags & COMMAND:
                values = cmd.decode(fragment)
                if cmd.number(values, cmd.FIELD) == CommandField.C_STORE_RQ:
                    store_request = values
                    continue
                status = cmd.number(values, cmd.STATUS)
                if status != 0xFF00:
                    done.failed = int(status != 0)
                    done.seconds = time.perf_counter() - started
                    wire.release()
                    return done
                continue
            done.n_bytes += len(fragment)
            if flags & 2 and context == 3:
                done.n += 1
                answer = cmd.response(store_request, 0)
                wire.socket.sendall(_message(3, answer, None, 16384))


def move(port: int, aet: str, study_uid: str, destination: str, gate: Gate) -> Result:
    """Have a study sent to a third party; the third party counts nothing."""
    wire = Wire(port, aet, [ProposedContext(1, STUDY_ROOT_MOVE, (IMPLICIT,))])
    gate.ready()
    started = time.perf_counter()
    request = _request(CommandField.C_MOVE_RQ, STUDY_ROOT_MOVE, destination=destination)
    wire.socket.sendall(_message(1, request, _study_keys(study_uid), 16384))
    while True:
        for _, flags, fragment in wire.pdvs():
            if not flags & COMMAND:
                continue
            values = cmd.decode(fragment)
            status = cmd.number(values, cmd.STATUS)
            if status == 0xFF00:
                continue
            done = Result(
                n=cmd.number(values, cmd.COMPLETED),
                failed=int(status != 0),
                seconds=time.perf_counter() - started,
            )
            wire.release()
            return done


def stow(
    port: int, path: str, files: list[str], tag: int, per_request: int, gate: Gate
) -> Result:
    """POST files in requests of `per_request` instances, one connection."""
    bodies = []
    for first in range(0, len(files), per_request):
        parts = [
            b"--bench\r\nContent-Type: application/dicom\r\n\r\n"
            + retagged(Path(name).read_bytes(), tag)
            + b"\r\n"
            for name in files[first : first + per_request]
        ]
        bodies.append(b"".join(parts) + b"--bench--\r\n")
    heads = [
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/"
        'related; type="application/dicom"; boundary=bench\r\nAccept: application/'
        f"dicom+json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for body in bodies
    ]
    wire = Http(port)
    gate.ready()
    done = Result(n=len(files), n_bytes=sum(map(len, bodies)))
    started = time.perf_counter()
    for head, body in zip(heads, bodies, strict=True):
        status, _ = wire.exchange(head, body)
        done.failed += status != 200
    done.seconds = time.perf_counter() - started
    return done


class Http:
    """A connection that is kept; bodies are counted, not kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connect()

    def _connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self._port), SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = memoryview(bytearray(1 << 20))
        self._ahead = b""

    def exchange(self, head: bytes, body: bytes = b"") -> tuple[int, int]:
        """Send a request; return the status and the length of the answer's body."""
        self.socket.sendall(head)
        if body:
            self.socket.sendall(body)
        raw = self._ahead
        while (end := raw.find(b"\r\n\r\n")) < 0:
            more = self.socket.recv(1 << 16)
            if not more:
                raise EOFError("the server closed the connection")
            raw += more
        status = int(raw[9:12])
        headers = raw[:end].lower()
        rest = raw[end + 4 :]
        if b"transfer-encoding: chunked" in headers:
            size = self._chunked(rest)
        elif b"content-length:" in headers:
            length = headers.partition(b"content-length:")[2]
            size = self._counted(rest, int(length.split()[0]))
        elif b"connection: close" in headers:
            size = len(rest)
            while n := self.socket.recv_into(self._buffer):
                size += n
        else:
            size = 0
        if b"connection: close" in headers:
            self.socket.close()
            self._connect()
        return status, size

    def _counted(self, rest: bytes, size: int) -> int:
        got = len(rest)
        self._ahead = rest[size:]
        while got < size:
            n = self.socket.recv_into(
                self._buffer[: min(len(self._buffer), size - got)]
            )
            if not n:
                raise EOFError("the server closed the connection")
            got += n
        return size

    def _chunked(self, rest: bytes) -> int:
        """Count a chunked body, chunk by chunk."""
        total = 0
        while True:
            while (end := rest.find(b"\r\n")) < 0:
                rest += self._more()
            size = int(rest[:end].split(b";")[0], 16)
            rest = rest[end + 2 :]
            if not size:
                while len(rest) < 2:
                    rest += self._more()
                self._ahead = rest[2:]
                return total
            total += size
            missing = size + 2 - len(rest)
            if missing <= 0:
                rest = rest[size + 2 :]
                continue
            self._counted(b"", missing)
            rest = b""

    def _more(self) -> bytes:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError("the server closed the connection")
        return data


def http(
    port: int, paths: list[str], accept: str, seconds: float, at_least: int, gate: Gate
) -> Result:
    """GET `paths` in turn for `seconds`, and `at_least` so often."""
    heads = [
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: {accept}\r\n"
        "\r\n".encode()
        for path in paths
    ]
    wire = Http(port)
    gate.ready()
    done = Result()
    started = time.perf_counter()
    while done.n < at_least or time.perf_counter() - started < seconds:
        asked = time.perf_counter()
        status, size = wire.exchange(heads[done.n % len(heads)])
        done.failed += status not in {200, 206}
        done.n_bytes += size
        done.n += 1
        done.latencies.append(time.perf_counter() - asked)
    done.seconds = time.perf_counter() - started
    return done


class Gate:
    """Holds the clients back until all of them are ready."""

    def __init__(self, parties: int) -> None:
        self._barrier = multiprocessing.Barrier(parties)

    def ready(self) -> None:
        if self._barrier.wait(SECONDS) == 0:
            warm_memory()
        self._barrier.wait(SECONDS)
        self.cpu = time.process_time()


def warm_memory(mib: int = 500) -> None:
    """Touch as much memory as a run will fill with cached file pages.

    In a virtual machine the first touch of a page costs more than all the rest, and
    falls on whichever server comes to it; free pages go back to the host after
    seconds, so it is done when everything else is ready.
    """
    block = bytes(1 << 20)
    with tempfile.TemporaryFile(dir=".bench") as file:
        for _ in range(mib):
            file.write(block)


CLIENTS: dict[str, Callable[..., Result]] = {
    "store": store, "find": find, "get": get, "move": move, "stow": stow, "http": http,
}  # fmt: skip


def main() -> None:
    """Run the clients that the input describes; print their sum."""
    clients: list[dict[str, Any]] = json.load(sys.stdin)
    gate = Gate(len(clients))
    answers: multiprocessing.Queue[dict[str, Any] | str] = multiprocessing.Queue()

    def run(kind: str, arguments: dict[str, Any]) -> None:
        try:
            done = CLIENTS[kind](**arguments, gate=gate)
            done.cpu_seconds = time.process_time() - gate.cpu
            answers.put(asdict(done))
        except Exception as error:  # noqa: BLE001  # said to the one who asked
            answers.put(f"{type(error).__name__}: {error}")

    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run, args=(one.pop("kind"), one)) for one in clients
    ]
    for process in processes:
        process.start()
    parts = [answers.get(timeout=SECONDS) for _ in processes]
    for process in processes:
        process.join()
    for part in parts:
        if isinstance(part, str):
            sys.exit(part)
    results = [Result(**part) for part in parts if isinstance(part, dict)]
    total = Result(
        n=sum(one.n for one in results),
        n_bytes=sum(one.n_bytes for one in results),
        seconds=max(one.seconds for one in results),
        failed=sum(one.failed for one in results),
        latencies=sorted(x for one in results for x in one.latencies),
        cpu_seconds=sum(one.cpu_seconds for one in results),
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sys.stdout.write(json.dumps({**asdict(total), "peak_kib": peak}))


if __name__ == "__main__":
    main()
