"""A node loses processes and is started again; its users notice a pause."""

from __future__ import annotations

from pathlib import Path

from tests.support import dcmtk, process, web
from tests.support.datasets import ct_slice, part10
from tests.support.node import RunningNode
from tests.support.waiting import wait_until


def send(node: RunningNode, file: Path) -> None:
    dcmtk.run("storescu", "-aec", node.aet, "127.0.0.1", node.dimse_port, file)


def n_studies(node: RunningNode) -> int:
    return len(node.get("/dicom-web/studies", accept="application/dicom+json").json())


def test_every_process_has_a_name(node: RunningNode) -> None:
    assert set(node.processes()) == {
        "huying-web-1", "huying-web-2", "huying-dimse-1", "huying-dimse-2",
        "huying-worker-1",
    }  # fmt: skip


def test_a_process_that_dies_is_started_again(
    node: RunningNode, tmp_path: Path
) -> None:
    before = node.processes()
    for name in before:
        node.kill(name)
    wait_until(
        lambda: (
            {*node.processes()} == {*before}
            and not {*node.processes().values()} & {*before.values()}
        ),
        "new processes under the old names",
    )
    wait_until(lambda: web.answers(f"{node.http}/readyz"), "/readyz to be 200")
    file = tmp_path / "one.dcm"
    file.write_bytes(part10(ct_slice()))

    send(node, file)

    assert n_studies(node) == 1


def test_nothing_outlives_the_supervisor_and_everything_is_kept(
    node: RunningNode, tmp_path: Path
) -> None:
    file = tmp_path / "one.dcm"
    file.write_bytes(part10(ct_slice()))
    send(node, file)
    before = node.processes().values()
    ports = node.http_port, node.dimse_port

    node.kill()
    assert not any(map(process.is_running, before))
    node.restart()

    assert (node.http_port, node.dimse_port) == ports
    assert n_studies(node) == 1


def test_metrics_need_their_token_and_count_all_processes(
    node: RunningNode, tmp_path: Path
) -> None:
    file = tmp_path / "one.dcm"
    for number in range(1, 5):
        file.write_bytes(part10(ct_slice(number=number)))
        send(node, file)

    assert node.get("/metrics").status == 401
    accepted = 'huying_associations_total{outcome="accepted"}'
    assert node.metrics()[accepted] == 4
