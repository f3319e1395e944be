"""DCMTK's tools, as peers that we did not write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

#: pynetdicom installs commands of the same names; DCMTK's are outside its folder.
_PATH = os.pathsep.join(
    folder
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)
    if Path(folder).resolve() != Path(sys.executable).parent.resolve()
)


def tool(name: str) -> str:
    """Return the path of one of DCMTK's commands.

    Raises
    ------
    RuntimeError
        It is not installed.
    """
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise RuntimeError(
            f"DCMTK's {name} is not installed: run `make system` as root,"
            " or install the package dcmtk"
        )
    return found


def run(
    name: str, *arguments: object, timeout: float = 60.0, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run one of DCMTK's commands; its output is text, errors together with it.

    Raises
    ------
    AssertionError
        It failed, and `check` is set.
    """
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        text=True,
        errors="replace",
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        )
    return done
