"""DCMTK's findscu, asked many things on one association."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from tests.support import dcmtk


def find(
    folder: Path, port: int, aet: str, root: str, queries: Sequence[Mapping[str, str]]
) -> list[Dataset]:
    """Return the responses to `queries`, each of keys by keyword.

    Parameters
    ----------
    folder : Path
        Made; holds queries and responses.
    root : str
        ``-P`` Patient Root, ``-S`` Study Root.
    """
    folder.mkdir()
    files = []
    for number, keys in enumerate(queries):
        wanted = Dataset()
        for keyword, value in keys.items():
            setattr(wanted, keyword, value)
        files.append(folder / f"query{number}.dcm")
        wanted.save_as(
            files[-1], implicit_vr=ImplicitVRLittleEndian.is_implicit_VR,
            little_endian=True,
        )  # fmt: skip
    said = dcmtk.run(
        "findscu", "-v", root, "-X", "-od", folder, "-aec", aet, "127.0.0.1", port,
        *files, timeout=300,
    ).stdout  # fmt: skip
    finals = re.findall(r"Received Final Find Response \((.*)\)", said)
    assert finals == ["Success"] * len(queries), said[-2000:]
    return [dcmread(path, force=True) for path in sorted(folder.glob("rsp*.dcm"))]
