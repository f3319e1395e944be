"""Pages of `docs/reference`, written from the program: ``make docs``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from gateway import app, face
from gateway.reference import access_reference, settings_reference
from pacs.dimse.status import Status, status_of
from pacs.web.intake import Intake
from pacs.web.problems import failure_reason, problem_response
from storage.db import migrate
from storage.kernel import errors
from storage.kernel.settings import Settings

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"
NOTE = "Written by `make docs`; do not edit.\n"
METHODS = ("get", "head", "post", "put", "patch", "delete")


def routes_page() -> str:
    """Return every route of the web face, with what its docstring says first."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder), open=True)
        migrate.upgrade(settings.database_url())
        node = app.open_node(settings)
        intake = Intake(node.ingest, settings.limits, body_seconds=1)
        try:
            paths = face.web_application(node, intake).openapi()["paths"]
        finally:
            intake.close()
            node.close()
    lines = [
        "# Routes",
        "",
        NOTE,
        "The study list is at `/`, an OpenAPI description at `/api/openapi.json`.",
        "",
        "| method | path | does |",
        "|---|---|---|",
    ]
    for path in sorted(paths):
        for method in METHODS:
            if method in paths[path]:
                about = paths[path][method]
                does = about.get("description", about["summary"]).split("\n\n")[0]
                line = " ".join(does.split()).replace("|", "\\|")
                lines.append(f"| {method.upper()} | `{path}` | {line} |")
    return "\n".join(lines) + "\n"


#: How to make one error of each class.
EXAMPLES: Mapping[str, Callable[[], errors.ImagingError]] = {
    "MalformedObject": lambda: errors.MalformedObject("ends early"),
    "InvalidParameter": lambda: errors.InvalidParameter("limit", "is negative"),
    "IdentityMismatch": lambda: errors.IdentityMismatch("missing", 0x0020000D),
    "TooLarge": lambda: errors.TooLarge("instance_bytes", 1),
    "DuplicateInstance": lambda: errors.DuplicateInstance("1.2", "00"),
}


def every_error() -> list[type[errors.ImagingError]]:
    """Return the classes that are raised, in the order of the module."""
    found = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.ImagingError)
    ]
    return [one for one in found if one is not errors.ImagingError]


def statuses_page() -> str:
    """Return what answers each error, by protocol."""
    lines = [
        "# Statuses",
        "",
        NOTE,
        "One error has one answer in each protocol. The `code` is in the problem body",
        "of HTTP answers (RFC 9457) and in logs.",
        "",
        "| code | meaning | HTTP | DIMSE | STOW-RS Failure Reason (0008,1197) |",
        "|---|---|---|---|---|",
    ]
    for kind in every_error():
        made = EXAMPLES.get(kind.__name__, lambda kind=kind: kind("example"))()
        meaning = (kind.__doc__ or "").split("\n\n")[0]
        status = status_of(made)
        lines.append(
            f"| `{made.code}` | {' '.join(meaning.split())} |"
            f" {problem_response(made).status_code} |"
            f" {status:04X} | {failure_reason(made):04X} |"
        )
    lines += ["", "## DIMSE statuses that this archive sends", ""]
    lines += ["| status | name |", "|---|---|"]
    lines += [
        f"| {status:04X} | {status.name.replace('_', ' ').lower()} |"
        for status in Status
    ]
    return "\n".join(lines) + "\n"


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings_reference,
    "routes.md": routes_page,
    "statuses.md": statuses_page,
    "../access.md": access_reference,
}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), "utf-8")
        sys.stdout.write(f"{FOLDER / name}\n")


if __name__ == "__main__":
    main()
