"""Instances that arrive as JSON metadata and bulk data (PS3.18 10.5.1, 8.7.3.2).

Such requests come from small producers of single images, documents and reports; they
are held in memory, within a bound of their own.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import orjson
from pydicom import Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomFileLike
from pydicom.filewriter import write_dataset

from pacs.imaging import syntaxes
from pacs.web.multipart import ContentType, Headers, parse_content_type
from storage.kernel.errors import MalformedObject, TooLarge
from storage.kernel.limits import MIB, Limits

#: Metadata and bulk data of one such request together.
MAX_BYTES = 64 * MIB
PIXEL_DATA = 0x7FE00010

_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2,3}={1,2})?\Z")

Built = tuple[str, Callable[[], bytes], int]
"""Transfer syntax, what makes the data set, and about how many bytes that takes."""


class MetadataRequest:
    """Collects the parts of a request and makes data sets of them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._metadata = bytearray()
        self._bulk: dict[str, list[tuple[ContentType, bytearray]]] = {}
        self._target = bytearray()
        self._size = 0

    def begin(self, headers: Headers) -> None:
        """Start a part."""
        kind = parse_content_type(headers.get("content-type", ""))
        self._target = bytearray()
        if kind.media_type in {"application/dicom+json", "application/json"}:
            if self._metadata:
                raise MalformedObject("metadata come in one part")
            self._target = self._metadata
            return
        location = headers.get("content-location", "")
        if not location:
            raise MalformedObject("bulk data without Content-Location")
        self._bulk.setdefault(location, []).append((kind, self._target))

    def write(self, data: bytes) -> None:
        """Add bytes to the part."""
        self._size += len(data)
        if self._size > MAX_BYTES:
            raise TooLarge("bytes of metadata and bulk data", MAX_BYTES)
        self._target += data

    def instances(self) -> Iterator[Built]:
        """Yield the instances of the metadata, unbuilt.

        Raises
        ------
        MalformedObject
            The metadata are no array of objects.
        """
        try:
            # orjson refuses what nests deeper than 1024.
            found = orjson.loads(bytes(self._metadata))
        except orjson.JSONDecodeError as error:
            raise MalformedObject("metadata are not JSON") from error
        if isinstance(found, dict):
            found = [found]
        if not isinstance(found, list) or not all(isinstance(o, dict) for o in found):
            raise MalformedObject("metadata are no array of objects")
        if len(found) > self._limits.request_parts:
            raise TooLarge("request_parts", self._limits.request_parts)
        size = self._size // max(1, len(found))
        for one in found:
            yield self._syntax(one), partial(self._build, one), size

    def _syntax(self, attributes: Mapping[str, Any]) -> str:
        """Return the transfer syntax the object will be in.

        It is that of its pixel data; all but compressed pixels are Explicit VR Little
        Endian, whatever the sender had.
        """
        kind = self._pixel_type(attributes)
        if kind is None or not kind.media_type.startswith(("image/", "video/")):
            return syntaxes.EXPLICIT_VR_LE
        named = kind.parameters.get("transfer-syntax", "")
        for tag in ("00020010", "00083002"):
            named = named or _first(attributes, tag)
        return named or syntaxes.MEDIA_TYPE_DEFAULTS.get(kind.media_type, "")

    def _pixel_type(self, attributes: Mapping[str, Any]) -> ContentType | None:
        element = attributes.get(f"{PIXEL_DATA:08X}")
        uri = element.get("BulkDataURI") if isinstance(element, dict) else None
        parts = self._bulk.get(uri, []) if isinstance(uri, str) else []
        return parts[0][0] if parts else None

    def _build(self, attributes: dict[str, Any]) -> bytes:
        """Return the data set; runs in a thread.

        Raises
        ------
        MalformedObject
        """
        _check(attributes, self._limits.sequence_depth)
        kept = {tag: one for tag, one in attributes.items() if tag[:4] != "0002"}
        missing: list[str] = []

        def bulk(tag: str, _vr: str, uri: str) -> bytes:
            parts = self._bulk.get(uri)
            if not parts:
                missing.append(tag)
                return b""
            if len(parts) == 1:
                return bytes(parts[0][1])
            return b"".join(data for _, data in parts)

        # Tolerates: values that break the rules of their VR; ingest warns of them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = Dataset.from_json(kept, bulk)
                if not missing:
                    return self._encoded(ds, attributes)
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                raise MalformedObject("metadata cannot be encoded") from error
        raise MalformedObject("bulk data is missing", int(missing[0], 16))

    def _encoded(self, ds: Dataset, attributes: Mapping[str, Any]) -> bytes:
        ds.SpecificCharacterSet = "ISO_IR 192"
        kind = self._pixel_type(attributes)
        if kind is not None and kind.media_type.startswith(("image/", "video/")):
            uri = attributes[f"{PIXEL_DATA:08X}"]["BulkDataURI"]
            frames = [bytes(data) for _, data in self._bulk[uri]]
            ds.PixelData = encapsulate(frames)
            ds["PixelData"].VR = "OB"
            ds["PixelData"].is_undefined_length = True
        made = io.BytesIO()
        file = DicomFileLike(made)
        file.is_little_endian, file.is_implicit_VR = True, False
        write_dataset(file, ds)
        return made.getvalue()


def _first(attributes: Mapping[str, Any], tag: str) -> str:
    element = attributes.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return str(values[0]) if isinstance(values, list) and values else ""


def _check(attributes: Mapping[str, Any], depth: int) -> None:
    """Check form, VRs and nesting before pydicom recurses into it.

    Raises
    ------
    MalformedObject
    """
    pending: list[tuple[Mapping[str, Any], int]] = [(attributes, 0)]
    while pending:
        item, level = pending.pop()
        if level > depth:
            raise MalformedObject(f"sequences nested deeper than {depth}")
        for name, element in item.items():
            try:
                tag = int(name, 16) if len(name) == 8 else -1
            except ValueError:
                tag = -1
            if tag < 0 or not isinstance(element, dict):
                raise MalformedObject("metadata are not DICOM JSON")
            vr = element.get("vr")
            known = dictionary_VR(tag) if dictionary_has_tag(tag) else ""
            if not isinstance(vr, str) or (
                known and vr not in {*known.split(" or "), "UN"}
            ):
                raise MalformedObject("wrong or no VR", tag)
            inline = element.get("InlineBinary", "")
            if not isinstance(inline, str) or not _BASE64.match(inline):
                raise MalformedObject("not base64", tag)
            if vr == "SQ":
                values = element.get("Value", [])
                if not isinstance(values, list) or not all(
                    isinstance(one, dict) for one in values
                ):
                    raise MalformedObject("not a sequence of items", tag)
                pending += [(one, level + 1) for one in values]
