"""What is compared: one function for each group, each within ten minutes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench import dataset
from tests.bench.dataset import CLASSES, PLANS, ROOT, retagged
from tests.bench.encoding import htj2k
from tests.bench.measure import (
    Comparison,
    MemoryWatch,
    Sample,
    Target,
    clients,
    interleaved,
)
from tests.bench.senders import warm_memory
from tests.bench.servers import (
    Huying,
    OrthancServer,
    Server,
    cpu_seconds,
    pss_mib,
    pynetdicom_qrscp,
    pynetdicom_scp,
    scratch,
    sink,
    storescp,
)
from tests.support import dcmtk
from tests.support.waiting import wait_until

#: Settling and sealing stay out of the measured time, as they would at a pause.
QUIET: dict[str, Any] = {"pacs__settle_seconds": 36_000}
ORTHANC, ORTHANC_NOSYNC = "orthanc NODELAY", "orthanc NODELAY nosync"
ORTHANC_INSTALLED = "orthanc as installed"
TINY_REPEATS = 20

Report = Callable[[Comparison], None]
Make = Callable[[Path], Server]


def files_of(cache: Path, name: str) -> list[str]:
    """Return the files of a kind of series, in order."""
    return sorted(map(str, dataset.folder(cache, name).rglob("*.dcm")))


@contextmanager
def running(root: Path, makers: Sequence[Make]) -> Iterator[list[Server]]:
    """Yield servers on fresh folders; the folders go with them."""
    with ExitStack() as stack:
        stack.enter_context(scratch(root))
        servers = []
        for number, make in enumerate(makers):
            server = make(root / str(number))
            stack.callback(server.stop)
            servers.append(server)
        yield servers


def huying(label: str = "huying", **settings: Any) -> Make:
    return lambda folder: Huying(folder, label, **{**QUIET, **settings})


def orthanc(*, sync: bool = True, nodelay: bool = True) -> Make:
    label = ORTHANC_INSTALLED if not nodelay else ORTHANC if sync else ORTHANC_NOSYNC
    return lambda folder: OrthancServer(folder, label, nodelay=nodelay, sync=sync)


class Tags:
    """Hands out UID components, so that no instance is stored twice."""

    def __init__(self) -> None:
        self._next = 2000

    def take(self, count: int) -> int:
        first, self._next = self._next, self._next + count
        return first


def storing(
    files: Sequence[str], associations: int, repeats: int, tags: Tags
) -> Callable[[Server, int], Sample]:
    """Return a job that stores `files` over several associations."""

    def run(server: Server, _round: int) -> Sample:
        wanted = [
            {
                "kind": "store",
                "port": server.dimse_port,
                "aet": server.aet,
                "files": list(files[k::associations]),
                "tag": tags.take(repeats),
                "repeats": repeats,
            }
            for k in range(associations)
        ]
        return clients(server, wanted)

    return run


def cstore(cache: Path, rounds: int, report: Report) -> None:
    """C-STORE by a client that costs nothing."""
    ct, dr, tiny = (files_of(cache, name) for name in ("ct", "dr", "tiny"))
    weak = huying("huying sync none", packs__sync="none")
    durable = (huying(), orthanc())
    weaker: tuple[Make, ...] = (weak, orthanc(sync=False), storescp)
    on = ORTHANC
    jobs: list[tuple[str, list[str], int, int, Sequence[Make], list[Target]]] = [
        (
            "C-STORE CT, 1 association, durable", ct, 1, 1,
            (*durable, pynetdicom_scp, pynetdicom_qrscp),
            [
                Target(on, 2, 3.5),
                Target("pynetdicom qrscp", 3, 8, by_cpu=True),
                Target("pynetdicom", 1, 3, by_cpu=True),
            ],
        ),
        ("C-STORE CT, 4 associations, durable", ct, 4, 1, durable, [Target(on, 2, 4)]),
        ("C-STORE CT, 8 associations, durable", ct, 8, 1, durable, []),
        (
            "C-STORE CT, 1 association, not synced", ct, 1, 1, weaker,
            [
                Target(ORTHANC_NOSYNC, 2, 4, "huying sync none"),
                Target("storescp", 0.5, 0.8, "huying sync none"),
            ],
        ),
        (
            "C-STORE TINY, 4 associations, durable", tiny, 4, 1,
            (*durable, storescp), [Target(on, 2, 4), Target("storescp", 0.25, 0.5)],
        ),
        ("C-STORE DR, 1 association, durable", dr, 1, 2, durable, [Target(on, 2, 4)]),
    ]  # fmt: skip
    for name, files, associations, repeats, makers, targets in jobs:
        compared = Comparison(name, "instances", targets)
        with running(cache / "run", makers) as servers:
            run = storing(files, associations, repeats, Tags())
            for server in servers:
                run(server, -1)  # a first round warms caches and is not counted
            report(interleaved(compared, servers, run, rounds=rounds))


def storescu(cache: Path, rounds: int, report: Report) -> None:
    """300 CT by DCMTK's own sender, as it comes (Nagle's algorithm on)."""
    ct = files_of(cache, "ct")
    weak = huying("huying sync none", packs__sync="none")
    makers = (huying(), weak, storescp, orthanc(), orthanc(nodelay=False))
    targets = [
        Target(ORTHANC_INSTALLED, 8, 15),
        # It syncs nothing either.
        Target("storescp", 1.2, 2, "huying sync none"),
    ]
    compared = Comparison("storescu as it comes, 300 CT", "instances", targets)
    with running(cache / "run", makers) as servers:

        def run(server: Server, number: int) -> Sample:
            folder = cache / "run" / f"send{number}"
            if not folder.exists():
                shutil.rmtree(cache / "run" / f"send{number - 1}", ignore_errors=True)
                folder.mkdir()
                for name in ct:
                    path = Path(name)
                    (folder / path.name).write_bytes(
                        retagged(path.read_bytes(), 2000 + number)
                    )
            warm_memory()
            before = cpu_seconds(server.pid)
            started = time.perf_counter()
            dcmtk.run(
                "storescu", "-aec", server.aet, "+sd", "127.0.0.1", server.dimse_port,
                folder, timeout=300,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            size = sum(Path(name).stat().st_size for name in ct)
            spent = cpu_seconds(server.pid) - before
            return Sample(len(ct), size, seconds, spent, 0)

        report(interleaved(compared, servers, run, rounds=rounds))


def stow(cache: Path, rounds: int, report: Report) -> None:
    """STOW-RS, 30 instances a request."""
    ct = files_of(cache, "ct")
    tags = Tags()
    compared = Comparison(
        "STOW CT, 30 a request", "instances", [Target(ORTHANC, 2.5, 4)]
    )
    with running(cache / "run", (huying(), orthanc())) as servers:

        def run(server: Server, _round: int) -> Sample:
            wanted = {
                "kind": "stow",
                "port": server.http_port,
                "path": "/dicom-web/studies",
                "files": ct,
                "tag": tags.take(1),
                "per_request": 30,
            }
            return clients(server, [wanted])

        for server in servers:
            run(server, -1)
        report(interleaved(compared, servers, run, rounds=rounds))


def _asking(
    paths: Sequence[str], accept: str, connections: int, seconds: float, at_least: int
) -> Callable[[Server, int], Sample]:
    """Return a job that asks for `paths` over several connections."""

    def run(server: Server, _round: int) -> Sample:
        one = {
            "kind": "http",
            "port": server.http_port,
            "paths": list(paths),
            "accept": accept,
            "seconds": seconds,
            "at_least": at_least,
        }
        return clients(server, [dict(one) for _ in range(connections)])

    return run


JSON = "application/dicom+json"


def query(cache: Path, rounds: int, report: Report) -> None:
    """QIDO-RS and C-FIND on 20,000 studies."""
    tiny = files_of(cache, "tiny")
    with running(cache / "run", (huying(), orthanc(sync=False))) as servers:
        for server in servers:
            clients(
                server,
                [
                    {
                        "kind": "store",
                        "port": server.dimse_port,
                        "aet": server.aet,
                        "files": tiny[k::4],
                        "tag": 2000,
                        "repeats": TINY_REPEATS,
                    }
                    for k in range(4)
                ],
            )
        studies = len(tiny) * TINY_REPEATS
        base = "/dicom-web/studies"
        jobs = [
            (f"QIDO 50 of {studies:,} studies", f"{base}?limit=50", 4, 20, 100),
            ("QIDO by Patient ID", f"{base}?PatientID=PID0002501", 4, None, None),
            ("QIDO by name", f"{base}?PatientName=Kim*&limit=50", 4, None, None),
        ]  # fmt: skip
        for name, path, connections, must, aim in jobs:
            targets = [Target(ORTHANC_NOSYNC, must, aim)] if must and aim else []
            compared = Comparison(name, "requests", targets)
            run = _asking([path], JSON, connections, 1.0, 2)
            report(interleaved(compared, servers, run, rounds=rounds))

        def find(server: Server, _round: int) -> Sample:
            one = {"kind": "find", "port": server.dimse_port, "aet": server.aet}
            return clients(server, [one])

        compared = Comparison(
            f"C-FIND, {studies:,} matches", "matches", [Target(ORTHANC_NOSYNC, 5, 10)]
        )
        report(interleaved(compared, servers, find, rounds=rounds))


def retrieve(cache: Path, rounds: int, report: Report) -> None:
    """Metadata, frames, series, C-GET and C-MOVE of a settled CT series."""
    ct = files_of(cache, "ct")
    plan = PLANS["ct"]
    study = f"{ROOT}.2000.3000"
    series = f"/dicom-web/studies/{study}/series/{study}.1"
    instance = f"{series}/instances/{study}.1"
    with running(
        cache / "run",
        (huying(pacs__settle_seconds=2), orthanc(sync=False), sink),
    ) as (ours, theirs, receiver):
        servers = [ours, theirs]
        for server in servers:
            _fill(server, ct)
            _add_destination(server, receiver)
        if isinstance(ours, Huying):
            _wait_for_sealing(ours)
        multipart = 'multipart/related; type="application/{}"'.format
        frames = [f"{instance}.{n}/frames/1" for n in range(1, plan.n + 1)]
        jobs: list[tuple[str, list[str], str, int, list[Target]]] = [
            (
                "QIDO 300 instances", [f"{series}/instances?limit=300"], JSON, 1,
                [Target(ORTHANC_NOSYNC, 10, 50)],
            ),
            (
                "WADO-RS metadata of 300", [f"{series}/metadata"], JSON, 1,
                [Target(ORTHANC_NOSYNC, 10, 50)],
            ),
            ("WADO-RS metadata of 1", [f"{instance}.7/metadata"], JSON, 1, []),
            (
                "WADO-RS frame, 1 connection", frames, multipart("octet-stream"), 1, [],
            ),
            (
                "WADO-RS frame, 8 connections", frames, multipart("octet-stream"), 8,
                [Target(ORTHANC_NOSYNC, 1.3, 2)],
            ),
            (
                "WADO-RS series of 300", [series], multipart("dicom"), 1,
                [Target(ORTHANC_NOSYNC, 1.2, 2)],
            ),
        ]  # fmt: skip
        for name, paths, accept, connections, targets in jobs:
            run = _asking(paths, accept, connections, 1.0, 2)
            compared = Comparison(name, "requests", targets)
            for server in servers:
                run(server, -1)
            report(interleaved(compared, servers, run, rounds=rounds))
        dimse: list[tuple[str, dict[str, Any]]] = [
            ("C-GET 300 CT", {"kind": "get", "class_uid": CLASSES["CT"]}),
            (
                "C-MOVE 300 CT to storescp --ignore",
                {"kind": "move", "destination": "STORE"},
            ),
        ]
        for name, job in dimse:

            def fetch(server: Server, _round: int, job: dict[str, Any] = job) -> Sample:
                one = {
                    **job, "port": server.dimse_port, "aet": server.aet,
                    "study_uid": study,
                }  # fmt: skip
                return clients(server, [one])

            compared = Comparison(name, "instances", [Target(ORTHANC_NOSYNC, 1.5, 3)])
            for server in servers:
                fetch(server, -1)
            report(interleaved(compared, servers, fetch, rounds=rounds))


def render(cache: Path, rounds: int, report: Report) -> None:
    """Pictures: frames as JPEG, thumbnails of instances and of a settled series.

    No picture is asked for twice, by a quality, window or size of its own, but where
    the row says so: we keep pictures that were made lately, Orthanc does not.
    """
    ct = files_of(cache, "ct")
    plan = PLANS["ct"]
    study = f"{ROOT}.2000.3000"
    series = f"/dicom-web/studies/{study}/series/{study}.1"
    images = [f"{series}/instances/{study}.1.{n}" for n in range(1, plan.n + 1)]
    frame = "{}/frames/1/rendered"
    must = [Target(ORTHANC_NOSYNC, 2, 3)]
    #: What is asked for, of us and of Orthanc, which has no thumbnails; the targets.
    jobs: list[tuple[str, list[str], str, str, list[Target]]] = [
        (
            "Rendered CT frame to JPEG", images,
            f"{frame}?quality={{}}", f"{frame}?quality={{}}", must,
        ),
        (
            "Rendered CT frame, windows of its own", images,
            f"{frame}?window=10{{}},1500,linear", f"{frame}?window=10{{}},1500,linear",
            [],
        ),
        ("Rendered CT frame, asked for again", images, frame, frame, must),
        (
            "Thumbnail of an instance", images,
            "{}/thumbnail?viewport=256,10{}", "{}/rendered?viewport=256,10{}", [],
        ),
        (
            "Thumbnail of a settled series", [series],
            "{}/thumbnail", "{}/rendered?viewport=256,256", must,
        ),
    ]  # fmt: skip
    with running(
        cache / "run", (huying(pacs__settle_seconds=2), orthanc(sync=False))
    ) as servers:
        for server in servers:
            _fill(server, ct)
        ours = servers[0]
        if isinstance(ours, Huying):
            _wait_for_sealing(ours)
        for name, places, our, their, targets in jobs:
            for connections in (1, 8):
                run = _drawing(places, our, their, connections)
                unit = "connection" if connections == 1 else "connections"
                compared = Comparison(
                    f"{name}, {connections} {unit}",
                    "pictures",
                    targets if connections > 1 else [],
                )
                for server in servers:
                    # Every process of a server has its own workers to start.
                    _drawing(places, our, their, 8)(server, -1)
                    run(server, -1)
                report(interleaved(compared, servers, run, rounds=rounds))


def _drawing(
    places: Sequence[str], our: str, their: str, connections: int
) -> Callable[[Server, int], Sample]:
    """Return a job that asks for pictures; each round has two-digit values of its own.

    The connections share the places, so that no two ask for the same picture.
    """

    def run(server: Server, number: int) -> Sample:
        form = our if isinstance(server, Huying) else their
        first = 50 + 8 * (number + 1)
        values = (
            range(first, first + 3) if connections == 1 else range(first + 3, first + 8)
        )
        wanted = []
        for k in range(connections):
            mine = places[k::connections] or places
            wanted.append({
                "kind": "http",
                "port": server.http_port,
                "paths": [form.format(place, n) for n in values for place in mine],
                "accept": "image/jpeg",
                "seconds": 1.0,
                "at_least": 2,
            })  # fmt: skip
        return clients(server, wanted)

    return run


def encode(cache: Path, rounds: int, report: Report) -> None:
    """Frames of a settled series in HTJ2K, beside what was received."""
    report(htj2k(files_of(cache, "ct"), rounds))


def _fill(server: Server, files: Sequence[str]) -> None:
    one = {
        "kind": "store", "port": server.dimse_port, "aet": server.aet,
        "files": list(files), "tag": 2000, "repeats": 1,
    }  # fmt: skip
    clients(server, [one])


def _add_destination(server: Server, receiver: Server) -> None:
    """Tell a server where STORE is."""
    if isinstance(server, Huying):
        body = f'{{"host":"127.0.0.1","port":{receiver.dimse_port}}}'
        answer = server.node.request("PUT", "/api/v1/peers/STORE", body.encode())
        if answer.status >= 300:
            raise RuntimeError(f"peer: {answer.text}")
    elif isinstance(server, OrthancServer):
        server.orthanc.add_modality("STORE", receiver.aet, receiver.dimse_port)


def _wait_for_sealing(server: Huying) -> None:
    """Wait until the settled series lies in the object store."""
    folder = server.node.data / "objects"
    wait_until(
        lambda: any(folder.rglob("*.pack")), "the series to be sealed", seconds=120
    )
    time.sleep(2)  # swapping the locations and building the metadata


def memory(cache: Path, _rounds: int, report: Report) -> None:
    """Memory over 20,000 instances and a 2 GB request, and beside Orthanc."""
    mr, ct = files_of(cache, "mr"), files_of(cache, "ct")
    said: list[str] = []
    with running(cache / "run", (huying(), orthanc())) as servers:
        for server in servers:
            levels = []
            with MemoryWatch(server.pid) as watch:
                for part in range(5):
                    one = {
                        "kind": "store", "port": server.dimse_port, "aet": server.aet,
                        "tag": 2000 + 20 * part, "repeats": 5,
                    }  # fmt: skip
                    wanted = [
                        {**one, "tag": 2000 + 20 * part + 5 * k, "files": mr}
                        for k in range(4)
                    ]
                    clients(server, wanted)
                    levels.append(pss_mib(server.pid))
            said.append(
                f"{server.label}: PSS after each 4,000 of 20,000 instances:"
                f" {', '.join(f'{level:.0f}' for level in levels)} MiB,"
                f" peak {watch.peak_mib:.0f}"
            )
            before = pss_mib(server.pid)
            with MemoryWatch(server.pid, 0.1) as watch:
                request = {
                    "kind": "stow", "port": server.http_port, "tag": 4000,
                    "path": "/dicom-web/studies", "files": (ct * 14)[:4000],
                    "per_request": 4000,
                }  # fmt: skip
                sample = clients(server, [request])
            said.append(
                f"{server.label}: one STOW request of {sample.n_bytes / 1e9:.2f} GB:"
                f" peak {watch.peak_mib - before:+.0f} MiB from {before:.0f} MiB,"
                f" {sample.n_bytes / sample.seconds / 1e6:.0f} MB/s,"
                f" failed {sample.failed}"
            )
            with MemoryWatch(server.pid, 0.1) as watch:
                study = f"{ROOT}.4000.3000"
                series = f"/dicom-web/studies/{study}/series/{study}.1"
                accept = 'multipart/related; type="application/dicom"'
                _asking([series], accept, 8, 1.0, 1)(server, 0)
            said.append(
                f"{server.label}: eight retrievals of 300 CT at a time:"
                f" peak {watch.peak_mib:.0f} MiB, afterwards {pss_mib(server.pid):.0f}"
            )
            if isinstance(server, Huying):
                said.append(
                    f"{server.label}: worker {pss_mib(server.pid, worker=True):.0f} MiB"
                )
    compared = Comparison("Memory (PSS of all processes but the worker)", "MiB")
    compared.notes = said
    report(compared)


GROUPS: dict[str, Callable[[Path, int, Report], None]] = {
    "cstore": cstore,
    "storescu": storescu,
    "stow": stow,
    "query": query,
    "retrieve": retrieve,
    "render": render,
    "encode": encode,
    "memory": memory,
}
