"""Structured reports and key object selections as text (PS3.3 A.35, C.17.3).

Everything that a document says is escaped; nothing of it is markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from pacs.rendering.fonts import is_chinese
from pacs.rendering.header import Header, Item, read_header
from pacs.rendering.softcopy import MAX_REFERENCES, Reference
from storage.kernel.errors import TooLarge, Unsupported

CONTENT: Final = 0x0040A730
VALUE_TYPE: Final = 0x0040A040
CONCEPT_NAME: Final = 0x0040A043
EVIDENCE: Final = 0x0040A375
SOP_SEQUENCE: Final = 0x00081199

HTML, TEXT = "text/html", "text/plain"
#: Content items of one document.
MAX_ITEMS: Final = 100_000

_DATES: Final = {"DATETIME": 0x0040A120, "DATE": 0x0040A121, "TIME": 0x0040A122}
_STYLE: Final = (
    "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
    "dl{margin:0 0 0 1em}dt{font-weight:600}"
    "dd{margin:0 0 .4em 1em;white-space:pre-wrap}"
    "table{border-collapse:collapse}th{text-align:left;padding-right:1em}"
)


@dataclass(frozen=True, slots=True)
class Line:
    """One content item.

    Attributes
    ----------
    depth : int
        0 for the items right under the root.
    is_container : bool
        A heading rather than a value.
    """

    depth: int
    name: str
    value: str
    is_container: bool


def code_meaning(item: Item, tag: int) -> str:
    """Return Code Meaning of a coded entry, else its value."""
    code = item.first(tag)
    if code is None:
        return ""
    return code.text(0x00080104) or code.text(0x00080100) or code.text(0x00080119)


def _value(item: Item, kind: str) -> str:
    if kind in _DATES:
        return item.text(_DATES[kind])
    if kind == "TEXT":
        return item.text(0x0040A160, "UT")
    if kind == "CODE":
        return code_meaning(item, 0x0040A168)
    if kind == "PNAME":
        return person(item.text(0x0040A123, "PN"))
    if kind == "UIDREF":
        return item.code(0x0040A124)
    if kind == "NUM":
        measured = item.first(0x0040A300)
        if measured is None:
            return code_meaning(item, 0x0040A301)
        unit = measured.first(0x004008EA)
        sign = unit.text(0x00080100) if unit is not None else ""
        number = measured.code(0x0040A30A)
        return number if sign in {"", "1"} else f"{number} {sign}"
    if kind in {"IMAGE", "COMPOSITE", "WAVEFORM"}:
        reference = item.first(SOP_SEQUENCE)
        return reference.code(0x00081155) if reference is not None else ""
    if kind in {"SCOORD", "SCOORD3D"}:
        return item.code(0x00700023)
    return ""


def person(name: str) -> str:
    """Return a name as it is read: the ideographic group if there is one."""
    groups = [part for part in name.split("=") if part]
    chosen = next((one for one in groups if is_chinese(one)), "")
    return " ".join((chosen or next(iter(groups), "")).replace("^", " ").split())


def lines(root: Item) -> Iterator[Line]:
    """Yield the content items under a root, in reading order.

    Raises
    ------
    TooLarge
    """
    stack = [(0, item) for item in reversed(root.items(CONTENT))]
    count = 0
    while stack:
        depth, item = stack.pop()
        count += 1
        if count > MAX_ITEMS:
            raise TooLarge("elements", MAX_ITEMS)
        kind = item.code(VALUE_TYPE)
        name = code_meaning(item, CONCEPT_NAME)
        inner = item.items(CONTENT)
        yield Line(depth, name, _value(item, kind), kind == "CONTAINER")
        stack += [(depth + 1, one) for one in reversed(inner)]


def _facts(header: Header) -> list[tuple[str, str]]:
    """Return what stands above a document, in Chinese and English."""
    facts = [
        ("患者 Patient", person(header.text(0x00100010, "PN"))),
        ("患者编号 Patient ID", header.text(0x00100020)),
        ("出生日期 Birth date", header.text(0x00100030)),
        ("性别 Sex", header.text(0x00100040)),
        ("检查日期 Study date", header.text(0x00080020)),
        ("检查号 Accession", header.text(0x00080050)),
        ("机构 Institution", header.text(0x00080080)),
        ("完成 Completion", header.text(0x0040A491)),
        ("审核 Verification", header.text(0x0040A493)),
        *(
            ("审核者 Verified by", person(observer.text(0x0040A075, "PN")))
            for observer in header.items(0x0040A073)
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _title(header: Header) -> str:
    return code_meaning(header, CONCEPT_NAME) or header.text(0x0008103E) or "SR"


def as_html(header: Header) -> str:
    """Return a document as a page without scripts, links or outside resources."""
    title = escape(_title(header))
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in _facts(header)
    )
    head = (
        '<!doctype html><html lang="zh-CN"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1><table>{rows}</table>"
    )
    parts = [head]
    depth = -1
    for line in lines(header):
        if line.depth > depth:
            # A nested list lies in the description of what it is part of.
            parts.append("<dl>")
            depth = line.depth
        else:
            parts.append("</dd>")
            parts += ["</dl></dd>"] * (depth - line.depth)
            depth = line.depth
        name, value = escape(line.name), escape(line.value)
        parts.append(f"<dt>{name}</dt><dd>{value}")
    if depth >= 0:
        parts += ["</dd></dl>"] * (depth + 1)
    return "".join(parts) + "</body></html>"


def as_text(header: Header) -> str:
    """Return a document as plain text, nested by two spaces."""
    out = [_title(header), ""]
    out += [f"{name}: {value}" for name, value in _facts(header)]
    out.append("")
    for line in lines(header):
        indent = "  " * line.depth
        value = line.value.replace("\r\n", "\n").replace("\n", f"\n{indent}  ")
        mark = ":" if line.name and (value or line.is_container) else ""
        out.append(f"{indent}{line.name}{mark} {value}".rstrip())
    return "\n".join(out) + "\n"


def document(
    arguments: dict[str, Any], payloads: list[bytearray]
) -> tuple[dict[str, Any], bytes]:
    """Render a structured report; a job's handler.

    Arguments: `syntax` of the data set that is the payload, `media_type`.

    Raises
    ------
    Unsupported
        The object is no document with content.
    """
    header = read_header(payloads[0], arguments["syntax"])
    if CONTENT not in header and header.code(VALUE_TYPE) != "CONTAINER":
        raise Unsupported("this object is no structured document")
    text = as_html(header) if arguments["media_type"] == HTML else as_text(header)
    return {}, text.encode("utf-8", "replace")


def selected(root: Item) -> Iterator[Reference]:
    """Yield the images that a key object selection names, in its order."""
    series: dict[str, str] = {}
    for study in root.items(EVIDENCE):
        for one in study.items(0x00081115):
            for image in one.items(SOP_SEQUENCE):
                series[image.code(0x00081155)] = one.code(0x0020000E)
                if len(series) >= MAX_REFERENCES:
                    break
    for item in root.items(CONTENT):
        if item.code(VALUE_TYPE) != "IMAGE":
            continue
        for image in item.items(SOP_SEQUENCE):
            uid = image.code(0x00081155)
            frames = tuple(int(n) for n in image.numbers(0x00081160))
            yield Reference(series.get(uid, ""), uid, frames)
