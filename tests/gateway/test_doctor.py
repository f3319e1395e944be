"""The doctor's findings, one problem at a time."""

from __future__ import annotations

import socket
import sqlite3
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway import doctor
from storage.db import migrate
from storage.kernel.errors import DependencyDown
from storage.kernel.settings import Settings, load_settings
from storage.objects.protocol import ObjectStore


def settings(folder: Path, **tree: Any) -> Settings:
    return load_settings(
        overrides={"data": str(folder), "http": {"port": 0}, "dimse": {"port": 0}}
        | tree,
        environ={},
    )


class DownStore:
    """An object store that does not answer."""

    def health(self) -> None:
        raise DependencyDown("object store: connection refused")


def open_objects(_: Settings) -> ObjectStore:
    return DownStore()  # type: ignore[return-value]


def problems(configured: Settings) -> dict[str, str]:
    return {
        one.subject: one.problem
        for one in doctor.examine(configured, open_objects)
        if one.problem
    }


def with_node(configured: Settings) -> Settings:
    migrate.upgrade(configured.database_url())
    return configured


def test_a_new_node_is_healthy(tmp_path: Path) -> None:
    assert problems(with_node(settings(tmp_path / "new"))) == {}


def test_a_folder_without_a_node_is_named_and_stays_empty(tmp_path: Path) -> None:
    folder = tmp_path / "new"

    assert problems(settings(folder)) == {
        "node": f"no node in {folder}: run huying init"
    }
    assert list(tmp_path.iterdir()) == []


def test_what_others_may_read_is_named_with_what_to_do(tmp_path: Path) -> None:
    configured = with_node(settings(tmp_path / "data"))
    configured.data.chmod(0o755)
    index = configured.data / "index.db"
    index.chmod(0o644)

    found = problems(configured)

    assert list(found) == ["files"]
    assert "index.db too" in found["files"]
    subprocess.run(found["files"].partition(": ")[2].split(), check=True)
    assert problems(configured) == {}
    assert stat.S_IMODE(index.stat().st_mode) == 0o640


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")

    assert "is not a folder" in problems(settings(tmp_path / "data"))["data"]


def test_too_little_space_is_named(tmp_path: Path) -> None:
    configured = settings(tmp_path, packs={"min_free_bytes": 1 << 60})

    assert "nothing can be stored" in problems(configured)["space"]


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = problems(with_node(settings(tmp_path, dimse={"port": port})))
    assert found == {
        "ports": f"dimse: port {port} of 127.0.0.1 is in use by another program"
    }


def test_a_database_that_is_down_is_named(tmp_path: Path) -> None:
    configured = settings(
        tmp_path, database={"url": "postgresql://nobody@127.0.0.1:1/none"}
    )
    assert problems(configured) == {"database": "database does not answer"}


def test_an_index_of_a_newer_version_is_named(tmp_path: Path) -> None:
    migrate.upgrade(f"sqlite:///{tmp_path / 'index.db'}")
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num='9999'")
    connection.close()

    assert "9999" in problems(settings(tmp_path))["database"]


@pytest.mark.parametrize(
    ("tls", "problem"),
    [
        ({"port": 2762}, "dimse.tls.certificate is needed because"),
        (
            {"port": 2762, "certificate": "/none.pem", "key": "/none.key"},
            "dimse.tls.certificate: /none.pem cannot be read",
        ),
    ],
)
def test_tls_without_its_files_is_named(
    tmp_path: Path, tls: dict[str, Any], problem: str
) -> None:
    configured = settings(tmp_path, dimse={"port": 0, "tls": tls})

    assert problems(configured)["tls"].startswith(problem)


def test_an_object_store_that_is_down_is_named(tmp_path: Path) -> None:
    configured = with_node(settings(tmp_path, objects={"kind": "s3"}))

    assert problems(configured) == {"objects": "object store: connection refused"}


def test_an_old_python_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "PYTHONS", ((3, 98), (3, 99)))

    assert (
        "is not supported: use 3.98 to 3.99" in problems(settings(tmp_path))["python"]
    )


def test_a_missing_codec_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "CODECS", ("JPEG8", "NOSUCH"))

    assert problems(settings(tmp_path))["codecs"].startswith("imagecodecs lacks NOSUCH")
