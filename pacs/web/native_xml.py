"""DICOM JSON objects as Native DICOM Model XML (PS3.19 A.1, PS3.18 F.3)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from pydicom.datadict import keyword_for_tag

NAMESPACE = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
_COMPONENTS = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")
#: Characters that XML 1.0 has no way to write.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def native_model(attributes: Mapping[str, Any]) -> bytes:
    """Return the XML document of one DICOM JSON object."""
    body = "".join(_attributes(attributes))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<NativeDicomModel xmlns="{NAMESPACE}" xml:space="preserve">'
        f"{body}</NativeDicomModel>"
    ).encode()


def _attributes(attributes: Mapping[str, Any]) -> Iterator[str]:
    for tag, attribute in attributes.items():
        keyword = keyword_for_tag(int(tag, 16))
        named = f' keyword="{keyword}"' if keyword else ""
        yield f'<DicomAttribute tag="{tag}" vr="{attribute["vr"]}"{named}>'
        if "BulkDataURI" in attribute:
            yield f"<BulkData uri={quoteattr(_writable(attribute['BulkDataURI']))}/>"
        if "InlineBinary" in attribute:
            yield f"<InlineBinary>{attribute['InlineBinary']}</InlineBinary>"
        for number, value in enumerate(attribute.get("Value", ()), start=1):
            yield from _value(attribute["vr"], number, value)
        yield "</DicomAttribute>"


def _value(vr: str, number: int, value: Any) -> Iterator[str]:
    if vr == "SQ":
        yield f'<Item number="{number}">'
        yield from _attributes(value or {})
        yield "</Item>"
    elif vr == "PN":
        yield f'<PersonName number="{number}">'
        for group in ("Alphabetic", "Ideographic", "Phonetic"):
            if value and group in value:
                yield f"<{group}>{_components(value[group])}</{group}>"
        yield "</PersonName>"
    elif value is not None:
        yield f'<Value number="{number}">{_text(value)}</Value>'


def _components(name: str) -> str:
    parts = zip(_COMPONENTS, name.split("^"), strict=False)
    return "".join(f"<{tag}>{_text(part)}</{tag}>" for tag, part in parts if part)


def _text(value: Any) -> str:
    return escape(_writable(str(value)))


def _writable(text: str) -> str:
    return _UNWRITABLE.sub("\ufffd", text)
