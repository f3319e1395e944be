"""The settings reference, written from the settings themselves."""

from __future__ import annotations

import types
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from storage.kernel.settings import Settings

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
