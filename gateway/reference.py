"""References written from the program itself: settings, access."""

from __future__ import annotations

import types
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from gateway.http.rules import RULES
from pacs.services.permissions import (
    ALONE,
    COLUMNS,
    PERMISSIONS,
    PURPOSES,
    SEPARATE,
    Relation,
)
from storage.kernel.settings import Settings
from storage.kernel.types import Role

HEADER = """# Settings

Written by `huying doctor --settings`; do not edit.

Settings come from the command line, then the environment (`HUYING_HTTP__PORT=8080`
sets `http.port`), then `huying.toml` (named by `--config` or `HUYING_CONFIG`, else
`huying.toml` in the data folder), then the defaults below. An unknown name is an
error that suggests the nearest one. `huying doctor` says what is wrong in one
sentence each.
"""


def settings_reference() -> str:
    """Return the reference page in Markdown."""
    return "\n".join([HEADER, *_section("", "", Settings)]) + "\n"


def _section(
    title: str, meaning: str, model: type[BaseModel], prefix: str = ""
) -> Iterator[str]:
    own: list[str] = []
    parts: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        nested = _model_of(field.annotation)
        if nested is not None:
            parts.append((name, nested))
        else:
            own.append(_row(prefix + name, field))
    if title:
        yield f"## `[{title}]`\n"
        yield f"{meaning}\n"
    if own:
        yield "| setting | type | default | meaning |"
        yield "|---|---|---|---|"
        yield from own
        yield ""
    for name, nested in parts:
        doc = (nested.__doc__ or "").strip().split("\n")[0]
        yield from _section(prefix + name, doc, nested, f"{prefix}{name}.")


def _row(name: str, field: FieldInfo) -> str:
    meaning = field.description or ""
    bounds = _bounds(field)
    kind = _type_name(field.annotation) + (f", {bounds}" if bounds else "")
    cells = (f"`{name}`", kind, _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _bounds(field: FieldInfo) -> str:
    low, high = "", ""
    for one in field.metadata:
        if isinstance(one, Ge):
            low = f"≥ {one.ge}"
        elif isinstance(one, Gt):
            low = f"> {one.gt}"
        elif isinstance(one, Le):
            high = f"≤ {one.le}"
    return ", ".join(part for part in (low, high) if part)


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        return "(empty)"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, frozenset):
        return "`[" + ", ".join(f'"{one}"' for one in sorted(value)) + "]`"
    if value is None or value in ("", ()):
        return "(empty)"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _type_name(annotation: Any) -> str:
    """Return a type as an operator would name it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in args)
    if origin in {Union, types.UnionType}:
        return " or ".join(_type_name(one) for one in args if one is not type(None))
    if origin in {tuple, frozenset}:
        nested = _model_of(args[0])
        if nested is not None:
            keys = ", ".join(f"`{name}`" for name in nested.model_fields)
            return f"tables with {keys}"
        return f"list of {_type_name(args[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f"`{one.value}`" for one in annotation)
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(
        annotation, {"SecretStr": "secret"}.get(annotation.__name__, "path")
    )


ACCESS_HEADER = """# Who may do what

Written by `make docs` from `pacs/services/permissions.py` and `gateway/http/rules.py`;
do not edit. One function, `AccessPolicy.decide`, answers every door by this table, and
denies what is not in it.

An account has a home tenant (an institution) and may be granted others to read. A cell
says whose things a role may do something to:

| cell | means |
|---|---|
| own | what belongs to the actor's home tenant |
| granted | what belongs to a tenant the account may read |
| patient | the studies of the patient that it is, or what a launch ticket names |
| self | the own account, session, page |

What belongs to anybody else does not exist for the actor: queries do not return it, its
UIDs are answered 404, and the attempt is in the audit.
"""
ROLE_MEANINGS = {
    Role.ADMINISTRATOR: "keeps the node: peers, processes; sees no patient data",
    Role.SECURITY_ADMINISTRATOR: "keeps accounts, roles, tokens; never the own account",
    Role.AUDITOR: "reads the audit and the list of accounts; changes nothing",
    Role.ARCHIVE_MANAGER: "keeps an institution's archive: corrects, deletes, forwards",
    Role.RADIOLOGIST: "reads images, stores what comes of it, gives out launch tickets",
    Role.REVIEWER: "looks at studies for quality control",
    Role.CLINICIAN: "looks at studies in treatment, gives out launch tickets",
    Role.PATIENT: "sees the own studies",
    Role.DEVICE: "a machine with a token: a RIS, a viewer's server, a script",
    Role.TICKET: "a session that a launch ticket opened",
    Role.MODALITY: "a remote AE over DIMSE; needs the grant of its peer entry as well",
    Role.PENDING: "must change the password or set up a second factor first",
}
CELLS = {
    Relation.OWN: "own",
    Relation.GRANTED: "granted",
    Relation.PATIENT: "patient",
    Relation.SELF: "self",
}


def access_reference() -> str:
    """Return the page of roles and what each may do, in Markdown."""
    lines = [
        ACCESS_HEADER,
        "## Roles",
        "",
        "| role | is | looks for |",
        "|---|---|---|",
    ]
    for role in COLUMNS:
        purposes = ", ".join(PURPOSES.get(role, ())) or "–"
        lines.append(f"| `{role}` | {ROLE_MEANINGS[role]} | {purposes} |")
    apart = ", ".join(f"`{role}`" for role in COLUMNS if role in SEPARATE)
    alone = ", ".join(f"`{role}`" for role in COLUMNS if role in ALONE)
    lines += [
        "",
        f"At most one of {apart} is in one hand; {alone} goes with no other role.",
        "The first of several purposes is taken for granted. An open node's user and",
        "the node itself may do everything.",
        "",
        "## Actions",
        "",
        "| action | on | " + " | ".join(f"`{role}`" for role in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for action, (kind, row) in PERMISSIONS.items():
        cells = (
            ", ".join(CELLS[one] for one in CELLS if one in row.get(role, ())) or "–"
            for role in COLUMNS
        )
        lines.append(f"| `{action}` | {kind} | " + " | ".join(cells) + " |")
    lines += ["", "## Routes", "", "| method | path | needs |", "|---|---|---|"]
    for rule in RULES:
        needs = "nothing" if rule.action is None else f"`{rule.action}`"
        lines.append(f"| {', '.join(rule.methods)} | `{rule.path}` | {needs} |")
    lines += [
        "",
        "`**` is any rest. A path that is not here does not exist. `/metrics` has a",
        "token of its own, `/viewer` a ticket or a session.",
    ]
    return "\n".join(lines) + "\n"
