"""What the commands share: their options, the settings they make, the services."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from storage.kernel.errors import InvalidParameter, NotFound
from storage.kernel.settings import Settings, load_settings

if TYPE_CHECKING:
    from gateway.app import Node

Data = Annotated[
    Path | None, typer.Option("--data", help="Data folder.", metavar="DIR")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file.", metavar="FILE"),
]
Http = Annotated[
    str | None,
    typer.Option("--http", help="Where the web listens.", metavar="HOST:PORT"),
]
Dimse = Annotated[
    str | None,
    typer.Option("--dimse", help="Where DICOM listens.", metavar="HOST:PORT"),
]
Aet = Annotated[str | None, typer.Option("--aet", help="Our AE title.", metavar="AE")]
Open = Annotated[
    bool, typer.Option("--open", help="No logins; on loopback addresses only.")
]


def address(name: str, text: str) -> dict[str, Any]:
    """Return host and port of ``HOST:PORT``.

    Raises
    ------
    InvalidParameter

    Examples
    --------
    >>> address("http", "[::1]:8080")
    {'host': '::1', 'port': 8080}
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal():
        raise InvalidParameter(name, f"{text} is not HOST:PORT")
    return {"host": host, "port": int(port)}


def settings_for(
    data: Path | None,
    config: Path | None,
    *,
    http: str | None = None,
    dimse: str | None = None,
    aet: str | None = None,
    open_access: bool = False,
) -> Settings:
    """Return the settings, with the command line's on top."""
    tree: dict[str, Any] = {}
    if data is not None:
        tree["data"] = str(data)
    if http is not None:
        tree["http"] = address("http", http)
    if dimse is not None:
        tree["dimse"] = address("dimse", dimse)
    if aet is not None:
        tree.setdefault("dimse", {})["aet"] = aet
    if open_access:
        tree["open"] = True
    return load_settings(config, overrides=tree)


class NoNode(NotFound):
    """There is no node where a command looks for one; ends it with status 2."""

    code = "node.missing"


def require_node(settings: Settings, *, folder: bool = True) -> None:
    """Raise NoNode where nothing has made a node yet; makes no folder and no file.

    Parameters
    ----------
    folder : bool
        The data folder must be there too, when the index lies elsewhere.
    """
    from storage.db import migrate

    is_here = settings.data.is_dir() or not (folder or settings.embedded)
    if not is_here or migrate.current(settings.database_url()) is None:
        raise NoNode(f"no node in {settings.data}: run huying init")


@contextmanager
def opened(settings: Settings, *, make: bool = False) -> Iterator[Node]:
    """Yield the services of this process; the index is brought up to date first.

    Parameters
    ----------
    make : bool
        Make the node where there is none.

    Raises
    ------
    NoNode
    """
    from gateway import app as composition
    from storage.db import migrate
    from storage.db.engine import FOLDER_MODE

    if make:
        settings.data.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    else:
        require_node(settings)
    migrate.upgrade(settings.database_url())
    node = composition.open_node(settings)
    try:
        yield node
    finally:
        node.close()
