"""The page and its files: read once, named by their content, sent compressed."""

from __future__ import annotations

import gzip
import hashlib
import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from storage.kernel.errors import NotFound

#: Every file that is served, and its type. Nothing else can be asked for.
TYPES: Mapping[str, str] = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "huying.svg": "image/svg+xml",
}
HTML = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, ready to send.

    Attributes
    ----------
    version : str
        Of this content; part of its address.
    """

    media_type: str
    body: bytes
    compressed: bytes
    version: str

    @property
    def etag(self) -> str:
        return f'"{self.version}"'


def _asset(media_type: str, body: bytes) -> Asset:
    version = hashlib.sha256(body).hexdigest()[:16]
    return Asset(media_type, body, gzip.compress(body, 9, mtime=0), version)


@cache
def _files() -> Mapping[str, Asset]:
    folder = resources.files("viewer.page")
    return {
        name: _asset(kind, (folder / name).read_bytes()) for name, kind in TYPES.items()
    }


def asset(name: str) -> Asset:
    """Return a file of the page.

    Raises
    ------
    NotFound
        It is none of them.
    """
    found = _files().get(name)
    if found is None:
        raise NotFound("no such file")
    return found


@cache
def page(aet: str, dimse_port: int, version: str) -> Asset:
    """Return the page of a node; its values are those of one node, so few."""
    text = (resources.files("viewer.page") / "index.html").read_text("utf-8")
    values = {
        "aet": aet,
        "dimse_port": str(dimse_port),
        "version": version,
        **{name: f"/assets/{name}?v={one.version}" for name, one in _files().items()},
    }
    filled = re.sub(r"\{\{([a-z_.]+)\}\}", lambda m: html.escape(values[m[1]]), text)
    return _asset(HTML, filled.encode())
