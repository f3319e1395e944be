"""Ready-made DICOM JSON (PS3.18 Annex F) for the rows that searches answer with.

A fragment is the members of a JSON object without the braces, kept with the row;
counters and the retrieve address are added when a search answers, by formatting
text: no dictionary is built on the way.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self
from urllib.parse import quote

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


def _is_plain(text: str) -> bool:
    """Tell whether text is one value, of which JSON would escape nothing."""
    return (
        text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
    )


def _name(tag: int, text: str) -> str:
    """Render a PN; most have an alphabetic group only."""
    if text and "=" not in text and _is_plain(text) and text.strip(" ") == text:
        return f'"{tag:08X}":{{"vr":"PN","Value":[{{"Alphabetic":"{text}"}}]}}'
    return member(tag, "PN", person_name(text))


def _text(tag: int, vr: str, text: str) -> str:
    """Render text; a backslash separates values (PS3.18 F.2.4, F.2.5)."""
    if not text:
        return f'"{tag:08X}":{{"vr":"{vr}"}}'
    if _is_plain(text):
        return f'"{tag:08X}":{{"vr":"{vr}","Value":["{text}"]}}'
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
        f'"00080056":{ONLINE}',
        _name(0x00080090, referring_physician_name),
        *_optional([(timezone_offset, _text(0x00080201, "SH", timezone_offset))]),
        *_optional([(study_description, _text(0x00081030, "LO", study_description))]),
        _name(0x00100010, patient_name),
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


#: Instance Availability (0008,0056): what is indexed can be retrieved.
ONLINE = '{"vr":"CS","Value":["ONLINE"]}'
_PLAIN_UID = re.compile(r"[0-9.]+")


@lru_cache(maxsize=1024)
def _string_values(vr: str, joined: str) -> str:
    """Return an attribute of a backslash-joined set; sets repeat in every row."""
    body: dict[str, Any] = {"vr": vr}
    if joined:
        body["Value"] = joined.split("\\")
    return orjson.dumps(body).decode()


def _number(vr: str, value: int | None) -> str:
    return f'{{"vr":"{vr}"}}' if value is None else f'{{"vr":"{vr}","Value":[{value}]}}'


def _known(tag: str, vr: str, value: int | None) -> str:
    """Return a member and a comma, nothing when the value is not known."""
    return "" if value is None else f'"{tag}":{{"vr":"{vr}","Value":[{value}]}},'


@lru_cache(maxsize=4096)
def _uid(value: str) -> str:
    if _PLAIN_UID.fullmatch(value):
        return f'{{"vr":"UI","Value":["{value}"]}}'
    return orjson.dumps({"vr": "UI", "Value": [value]}).decode()


def _segment(uid: str) -> str:
    """Return a UID as a segment of a path."""
    return uid if _PLAIN_UID.fullmatch(uid) else quote(uid, safe="")


def _series_url(retrieve_base: str, study_uid: str, series_uid: str) -> str:
    return (
        f"{retrieve_base}/studies/{_segment(study_uid)}/series/{_segment(series_uid)}"
    )


def _url(url: str) -> str:
    """Return a Retrieve URL (0008,1190)."""
    return f'{{"vr":"UR","Value":["{url}"]}}'


def study_object(
    fragment: str,
    *,
    retrieve_base: str,
    study_instance_uid: str,
    modalities: str,
    n_series: int,
    n_instances: int,
) -> str:
    """Return a study's JSON object: its fragment, counters and Retrieve URL.

    Members are inserted where the ascending order of tags wants them (PS3.18
    F.2.2). A member name cannot occur in a value, whose quotes are escaped.
    """
    referring = fragment.index('"00080090":')
    name = fragment.index('"00100010":')
    address = f"{retrieve_base}/studies/{_segment(study_instance_uid)}"
    return (
        f'{{{fragment[:referring]}"00080061":{_string_values("CS", modalities)},'
        f"{fragment[referring:name]}"
        f'"00081190":{_url(address)},'
        f'{fragment[name:]},"00201206":{_number("IS", n_series)},'
        f'"00201208":{_number("IS", n_instances)}}}'
    )


def series_object(
    fragment: str,
    *,
    retrieve_base: str,
    study_instance_uid: str,
    series_instance_uid: str,
    n_instances: int,
) -> str:
    """Return a series' JSON object: its fragment, counter, study and address."""
    uid = fragment.index('"0020000E":')
    here = fragment.find('"00180015":')
    if here < 0:
        here = uid
    last = _STEP.search(fragment)
    end = last.start() if last else len(fragment)
    tail = fragment[end:]
    url = _url(_series_url(retrieve_base, study_instance_uid, series_instance_uid))
    return (
        f'{{{fragment[:here]}"00081190":{url},{fragment[here:uid]}'
        f'"0020000D":{_uid(study_instance_uid)},{fragment[uid:end].rstrip(",")},'
        f'"00201209":{_number("IS", n_instances)}{"," if tail else ""}{tail}}}'
    )


_STEP = re.compile('"(?:00400244|00400245|00400275)":')
#: Tags of the members that an instance adds, in runs that nothing comes between.
_INSTANCE_RUNS = ("00080016", "00080056", "00081190", "00200013", "00280002")


@dataclass(frozen=True, slots=True)
class InstanceTemplate:
    """What all instances of one series have in common, ready to be filled.

    Attributes
    ----------
    address : str
        Retrieve URL of the series.
    gaps : tuple of str
        Members of the levels above, before, between and after the instance's own.
    """

    address: str
    gaps: tuple[str, ...]

    @classmethod
    def of(
        cls,
        *,
        retrieve_base: str,
        study_instance_uid: str,
        series_instance_uid: str,
        above: Mapping[str, Any],
    ) -> Self:
        """Make the template of a series; `above` are attributes of upper levels."""
        members = {
            **above,
            "0020000D": {"vr": "UI", "Value": [study_instance_uid]},
            "0020000E": {"vr": "UI", "Value": [series_instance_uid]},
        }
        for own in ("00080056", "00081190"):
            members.pop(own, None)
        bounds = ("", *_INSTANCE_RUNS, "~")
        gaps = []
        for low, high in itertools.pairwise(bounds):
            inside = sorted(tag for tag in members if low <= tag < high)
            gaps.append(
                "".join(f'"{t}":{orjson.dumps(members[t]).decode()},' for t in inside)
            )
        address = _series_url(retrieve_base, study_instance_uid, series_instance_uid)
        return cls(address, tuple(gaps))

    def fill(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        instance_number: int | None,
        samples: int | None,
        number_of_frames: int | None,
        rows: int | None,
        columns: int | None,
        bits_allocated: int | None,
    ) -> str:
        """Return the JSON object of one instance (PS3.18 Table 10.6.3-5)."""
        first, second, third, fourth, fifth, last = self.gaps
        url = _url(f"{self.address}/instances/{_segment(sop_instance_uid)}")
        shape = (
            _known("00280002", "US", samples)
            + _known("00280008", "IS", number_of_frames)
            + _known("00280010", "US", rows)
            + _known("00280011", "US", columns)
            + _known("00280100", "US", bits_allocated)
        )
        members = (
            f'{first}"00080016":{_uid(sop_class_uid)},'
            f'"00080018":{_uid(sop_instance_uid)},{second}"00080056":{ONLINE},'
            f'{third}"00081190":{url},"00083002":{_uid(transfer_syntax_uid)},'
            f'{fourth}"00200013":{_number("IS", instance_number)},{fifth}{shape}{last}'
        )
        return f"{{{members[:-1]}}}"


def merged(rendered: str, others: Mapping[str, Any]) -> str:
    """Add attributes to a rendered object, in the order of tags; its own win."""
    found: dict[str, Any] = {**others, **orjson.loads(rendered)}
    return orjson.dumps(found, option=orjson.OPT_SORT_KEYS).decode()
