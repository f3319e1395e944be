"""Row D16 of the fault table: what must never be written where operators look."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from storage.kernel.settings import S3, Objects
from tests.fault.test_storage import SUCCESS, store, stow
from tests.support.datasets import ct_slice, part10
from tests.support.node import METRICS_TOKEN, RunningNode
from tests.support.ports import free_port

NAME = "Verysecret^Patient"
PATIENT_ID = "PID-NOBODY-KNOWS"
KEY = "key-nobody-knows"
MULTIPART = 'multipart/related; type="application/dicom"; boundary=b'


def test_d16_neither_logs_nor_metrics_hold_patients_or_secrets(tmp_path: Path) -> None:
    away = S3(
        endpoint=f"127.0.0.1:{free_port()}",
        access_key=SecretStr(KEY),
        secret_key=SecretStr(KEY),
        secure=False,
        timeout_seconds=1,
    )
    node = RunningNode.start(tmp_path, objects=Objects(kind="s3", s3=away))
    kept = ct_slice(seed=1, PatientName=NAME, PatientID=PATIENT_ID)
    assert store(node, kept) == SUCCESS
    assert stow(node, kept).status == 200
    other = ct_slice(seed=1, size=16, PatientName=NAME, PatientID=PATIENT_ID)
    assert stow(node, other).status == 409
    assert store(node, other) != SUCCESS
    cut = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + part10(kept)[:-9]
    for path, method, body in (
        (f"/dicom-web/studies?PatientName={NAME}", "GET", None),
        (f"/dicom-web/studies?PatientName={NAME}&limit=x", "GET", None),
        (f"/dicom-web/studies/{NAME}", "GET", None),
        (f"/api/v1/study-list?q={PATIENT_ID}", "GET", None),
        (f"/nowhere/{PATIENT_ID}?token={KEY}", "GET", None),
        ("/dicom-web/studies", "POST", cut + b"\r\n--b--\r\n"),
    ):
        node.request(method, path, body, {"Content-Type": MULTIPART} if body else {})
    answer = node.get("/metrics", authorization=f"Bearer {METRICS_TOKEN}")
    assert answer.status == 200
    assert node.get("/metrics", authorization=f"Bearer {KEY}").status == 401
    node.stop()

    written = node.log_bytes() + answer.body
    assert b"study.settled" in written or b"huying_ingest" in written
    for secret in (NAME, NAME.partition("^")[0], PATIENT_ID, KEY, METRICS_TOKEN):
        assert secret.encode() not in written, secret
