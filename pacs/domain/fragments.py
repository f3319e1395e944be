"""Ready-made DICOM JSON (PS3.18 Annex F) for the rows that searches answer with.

A fragment is the members of a JSON object without the braces; counters and the
retrieve address are added when a search answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

NAMES = ("Alphabetic", "Ideographic", "Phonetic")


def member(tag: int, vr: str, values: Sequence[Any]) -> str:
    """Return one JSON member; without values only the VR (PS3.18 F.2.5)."""
    body: dict[str, Any] = {"vr": vr}
    if values:
        body["Value"] = list(values)
    return f'"{tag:08X}":{orjson.dumps(body).decode()}'


def person_name(text: str) -> list[dict[str, str]]:
    """Return the JSON values of a decoded PN (PS3.18 F.2.2)."""
    values = []
    for value in text.split("\\"):
        groups = [group.strip(" \0") for group in value.split("=")[:3]]
        named = {
            name: group for name, group in zip(NAMES, groups, strict=False) if group
        }
        if named:
            values.append(named)
    return values


def _text(tag: int, vr: str, text: str) -> str:
    """Render text; a backslash separates values (PS3.18 F.2.4, F.2.5)."""
    return member(tag, vr, [part or None for part in text.split("\\")] if text else [])


def _optional(parts: Iterable[tuple[str, str]]) -> list[str]:
    """Return members whose text is not empty."""
    return [rendered for text, rendered in parts if text]


def study_fragment(
    *,
    study_date: str,
    study_time: str,
    accession_number: str,
    referring_physician_name: str,
    timezone_offset: str,
    patient_name: str,
    patient_id: str,
    issuer: str,
    birth_date: str,
    sex: str,
    study_instance_uid: str,
    study_id: str,
    study_description: str,
    has_charset: bool,
) -> str:
    """Return the study and patient attributes (PS3.18 Table 10.6.3-3).

    Values are as received, also where they are no legal date or time.
    """
    members = [
        *([member(0x00080005, "CS", ["ISO_IR 192"])] if has_charset else []),
        _text(0x00080020, "DA", study_date),
        _text(0x00080030, "TM", study_time),
        _text(0x00080050, "SH", accession_number),
        member(0x00080056, "CS", ["ONLINE"]),
        member(0x00080090, "PN", person_name(referring_physician_name)),
        *_optional([(timezone_offset, _text(0x00080201, "SH", timezone_offset))]),
        *_optional([(study_description, _text(0x00081030, "LO", study_description))]),
        member(0x00100010, "PN", person_name(patient_name)),
        _text(0x00100020, "LO", patient_id),
        *_optional([(issuer, _text(0x00100021, "LO", issuer))]),
        _text(0x00100030, "DA", birth_date),
        _text(0x00100040, "CS", sex),
        _text(0x0020000D, "UI", study_instance_uid),
        _text(0x00200010, "SH", study_id),
    ]
    return ",".join(members)


def series_fragment(
    *,
    modality: str,
    series_description: str,
    series_instance_uid: str,
    series_number: int | None,
    body_part: str,
    laterality: str,
    station_name: str,
    institution_name: str,
    pps_start_date: str,
    pps_start_time: str,
    request_attributes: Sequence[dict[str, str]],
) -> str:
    """Return the series attributes (PS3.18 Table 10.6.3-4)."""
    requests = [
        {
            tag: {"vr": "SH", "Value": [request[name]]}
            for name, tag in (
                ("ScheduledProcedureStepID", "00400009"),
                ("RequestedProcedureID", "00401001"),
            )
            if request.get(name)
        }
        for request in request_attributes
    ]
    members = [
        _text(0x00080060, "CS", modality),
        *_optional(
            [
                (institution_name, _text(0x00080080, "LO", institution_name)),
                (station_name, _text(0x00081010, "SH", station_name)),
            ]
        ),
        _text(0x0008103E, "LO", series_description),
        *_optional(
            [
                (body_part, _text(0x00180015, "CS", body_part)),
            ]
        ),
        _text(0x0020000E, "UI", series_instance_uid),
        member(0x00200011, "IS", [] if series_number is None else [series_number]),
        *_optional([(laterality, _text(0x00200060, "CS", laterality))]),
        *_optional(
            [
                (pps_start_date, _text(0x00400244, "DA", pps_start_date)),
                (pps_start_time, _text(0x00400245, "TM", pps_start_time)),
            ]
        ),
        *([member(0x00400275, "SQ", requests)] if requests else []),
    ]
    return ",".join(members)
