"""What keeps a node from working, in one sentence each."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from gateway import supervisor
from gateway.options import NoNode, require_node
from storage.db import migrate
from storage.kernel.errors import Conflict, ImagingError, Unavailable
from storage.kernel.limits import GIB
from storage.kernel.settings import Settings
from storage.objects.protocol import ObjectStore

PYTHONS = ((3, 11), (3, 13))
PACKAGES = ("ai", "gateway", "pacs", "storage", "viewer", "xds")
#: Codecs of `imagecodecs` that the transfer syntaxes of PS3.5 A.4 need.
CODECS = ("JPEG8", "LJPEG", "JPEGLS", "JPEG2K", "HTJ2K", "JPEGXL", "DICOMRLE")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes
    ----------
    subject : str
        What was looked at, e.g. ``http``.
    problem : str
        One sentence; empty when all is well.
    """

    subject: str
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem


def examine(
    settings: Settings, open_objects: Callable[[Settings], ObjectStore]
) -> Iterator[Finding]:
    """Check everything a node needs; yields every finding, good ones too.

    Parameters
    ----------
    open_objects : callable
        Returns the configured object store.
    """
    checks: dict[str, Callable[[Settings], str]] = {
        "python": _python,
        "packages": _packages,
        "codecs": _codecs,
        "data": _data,
        "node": _node,
        "files": _files,
        "space": _space,
        "ports": _ports,
        "tls": _tls,
        "database": _database,
        "objects": partial(_objects, open_objects),
    }
    for subject, check in checks.items():
        try:
            yield Finding(subject, check(settings))
        except ImagingError as error:
            yield Finding(subject, str(error))


def _python(_: Settings) -> str:
    low, high = PYTHONS
    if low <= sys.version_info[:2] <= high:
        return ""
    return (
        f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported: use"
        f" {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    )


def _packages(_: Settings) -> str:
    """All packages must come from one place; their names are common ones."""
    folders = {
        name: Path(import_module(name).__file__ or "").resolve().parent.parent
        for name in PACKAGES
    }
    home = folders["gateway"]
    strangers = [name for name, folder in folders.items() if folder != home]
    if not strangers:
        return ""
    return (
        f"another distribution hides our package {strangers[0]}"
        f" ({folders[strangers[0]]}): install Huying into an environment of its own"
    )


def _codecs(_: Settings) -> str:
    try:
        import imagecodecs
    except ImportError as error:
        return f"imagecodecs cannot be imported ({error}): compressed images stay so"
    missing = [
        name
        for name in CODECS
        if not getattr(getattr(imagecodecs, name, None), "available", False)
    ]
    if not missing:
        return ""
    return f"imagecodecs lacks {', '.join(missing)}: such images cannot be decoded"


def _data(settings: Settings) -> str:
    folder = settings.data
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"data: {existing} is not a folder"
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        return f"data: {existing} cannot be written ({error.strerror})"
    return ""


def _node(settings: Settings) -> str:
    try:
        require_node(settings)
    except NoNode as error:
        return str(error)
    except Unavailable:
        # The database's own line says so.
        return ""
    return ""


def _files(settings: Settings) -> str:
    """Others of this machine may read neither the folder nor, through it, an index."""
    folder = settings.data
    if not folder.is_dir() or not folder.stat().st_mode & stat.S_IRWXO:
        return ""
    open_ones = [
        path.name
        for path in (*folder.glob("*.db"), *folder.glob("*.db-*"))
        if path.stat().st_mode & stat.S_IRWXO
    ]
    command = " ".join(
        [f"chmod o-rwx {folder}", *(str(folder / name) for name in sorted(open_ones))]
    )
    what = f"; {', '.join(sorted(open_ones))} too" if open_ones else ""
    return f"others may look into {folder}, which holds patients{what}: {command}"


def _space(settings: Settings) -> str:
    existing = settings.data.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    kept = settings.packs.min_free_bytes
    if free > kept:
        return ""
    return (
        f"only {free / GIB:.1f} GiB are free in {existing} and"
        f" packs.min_free_bytes keeps {kept / GIB:.1f}: nothing can be stored"
    )


def _ports(settings: Settings) -> str:
    try:
        sockets = supervisor.listen(settings)
    except Conflict:
        # Our own node may be what holds the port.
        if supervisor.is_ready(settings):
            return ""
        raise
    for one in sockets.all():
        one.close()
    return ""


def _tls(settings: Settings) -> str:
    tls = settings.dimse.tls
    if not tls.port:
        return ""
    for name, path in (("certificate", tls.certificate), ("key", tls.key)):
        if path is None:
            return f"dimse.tls.{name} is needed because dimse.tls.port is set"
    for name, path in (
        ("certificate", tls.certificate),
        ("key", tls.key),
        ("client_ca", tls.client_ca),
    ):
        if path is not None and not os.access(path, os.R_OK):
            return f"dimse.tls.{name}: {path} cannot be read"
    return ""


def _database(settings: Settings) -> str:
    url = settings.database_url()
    found = migrate.current(url)
    if found is not None:
        try:
            migrate.require_current(url)
        except Conflict as error:
            return f"database: {error}"
    return ""


def _objects(
    open_objects: Callable[[Settings], ObjectStore], settings: Settings
) -> str:
    """Files lie in the data folder, which has been looked at."""
    if settings.objects.kind != "files":
        open_objects(settings).health()
    return ""
