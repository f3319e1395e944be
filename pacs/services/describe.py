"""From a scanned data set to the index row of an instance.

All checks of identity and plausibility that an arrival must pass are here; see
the order of work in PS3.4 B.2 and the bad-input table of the fault tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache, partial
from typing import Any

from pacs.domain.fragments import series_fragment, study_fragment
from pacs.domain.study import FLAG_OWN, Warned
from pacs.imaging import sopclasses, syntaxes
from pacs.imaging.charset import (
    Charset,
    decoder,
    normalise,
    pinyin_keys,
    split_person_name,
)
from pacs.imaging.dataset import Scan, inflate, request_attributes, scan
from pacs.imaging.frames import frame_ranges
from pacs.repository.arrivals import InstanceRow, ParentKey, Parents
from storage.kernel.errors import (
    IdentityMismatch,
    MalformedObject,
    UnsupportedSopClass,
    UnsupportedTransferSyntax,
)
from storage.kernel.limits import Limits
from storage.kernel.settings import DuplicatePolicy
from storage.kernel.types import Digest, PendingDigest
from storage.kernel.uids import is_uid
from storage.packs.format import RecordHeader

CLASS_UID = 0x00080016
INSTANCE_UID = 0x00080018
STUDY_UID = 0x0020000D
SERIES_UID = 0x0020000E
PATIENT_ID = 0x00100020
ISSUER = 0x00100021
CHARSET = 0x00080005

#: Longer Patient IDs are kept with a warning (PS3.5 6.2: LO) …
PATIENT_ID_CHARS = 64
#: … and such are no identifiers.
MAX_PATIENT_ID_CHARS = 256
#: Characters of any other value that the index keeps.
INDEXED_CHARS = 512

#: Bits of `instance.flags` and `study.flags`; `FLAG_OWN` is another.
FLAG_NO_PATIENT_ID = 1
FLAG_LENIENT_UID = 2
FLAG_WARNED = 4


@dataclass(frozen=True, slots=True)
class Rules:
    """What ingest accepts."""

    limits: Limits
    settle_seconds: float = 60.0
    duplicates: DuplicatePolicy = DuplicatePolicy.NEVER
    lenient_uids: bool = False
    require_patient_id: bool = False
    replaced_keep_seconds: float = 86_400.0


def describe(
    dataset: memoryview,
    header: RecordHeader,
    *,
    rules: Rules,
    digest: Digest | PendingDigest,
    study_uid: str | None = None,
) -> tuple[InstanceRow, tuple[Warned, ...]]:
    """Scan `dataset` and return its index row; offsets count from its first byte.

    Parameters
    ----------
    dataset : memoryview
        Data set bytes as received.
    header : RecordHeader
        Its UIDs are claims that must agree with the data set; empty: no claim.
    study_uid : str, optional
        The study the request was addressed to.

    Raises
    ------
    MalformedObject, TooLarge
        The bytes are not a data set in the declared transfer syntax.
    IdentityMismatch
        Identifiers are missing, illegal or contradict each other.
    UnsupportedSopClass, UnsupportedTransferSyntax
    """
    syntax_uid = header.transfer_syntax_uid
    if not syntaxes.is_known(syntax_uid):
        raise UnsupportedTransferSyntax("transfer syntax (0002,0010) is unknown")
    syntax = syntaxes.get(syntax_uid)
    limits = rules.limits
    if not dataset.nbytes:
        raise MalformedObject("empty data set")
    body: memoryview | bytes = dataset
    if syntax.deflated:
        body = inflate(dataset, limits)
    found = scan(body, 0, len(body), syntax_uid, limits)
    values = found.values
    class_uid = _uid(values, CLASS_UID, rules)
    instance_uid = _uid(values, INSTANCE_UID, rules)
    study = _uid(values, STUDY_UID, rules)
    series = _uid(values, SERIES_UID, rules)
    _agree(header.sop_class_uid, class_uid, CLASS_UID)
    _agree(header.sop_instance_uid, instance_uid, INSTANCE_UID)
    if study_uid is not None:
        _agree(study_uid, study, STUDY_UID)
    if not sopclasses.is_storage(class_uid):
        raise UnsupportedSopClass("SOP class (0008,0016) is not stored here")
    charset = decoder(bytes(values.get(CHARSET, b"")))
    patient_id = _text(values, PATIENT_ID, charset)
    issuer = _text(values, ISSUER, charset)
    warnings = [Warned(tag, reason) for tag, reason in found.warnings]
    if charset.warning:
        warnings.append(Warned(CHARSET, charset.warning))
    for tag, value in ((PATIENT_ID, patient_id), (ISSUER, issuer)):
        if len(value) > MAX_PATIENT_ID_CHARS:
            raise IdentityMismatch("far too long:", tag)
        if len(value) > PATIENT_ID_CHARS:
            warnings.append(Warned(tag, "longer than 64 characters"))
    flags = 0
    if not patient_id:
        if rules.require_patient_id:
            raise IdentityMismatch("Patient ID is missing", PATIENT_ID)
        warnings.append(Warned(PATIENT_ID, "Patient ID is missing"))
        flags |= FLAG_NO_PATIENT_ID
    if rules.lenient_uids and not all(
        map(is_uid, (class_uid, instance_uid, study, series))
    ):
        flags |= FLAG_LENIENT_UID
    if warnings:
        flags |= FLAG_WARNED
    key = ParentKey(header.tenant, issuer, patient_id, study, series)
    frames, frame_table = _frames(found, values)
    deflated_end = dataset.nbytes if syntax.deflated else None
    pixel = found.pixel
    row = InstanceRow(
        key=key,
        sop_instance_uid=instance_uid,
        sop_class_uid=class_uid,
        transfer_syntax_uid=syntax_uid,
        modality=_text(values, 0x00080060, charset)[:INDEXED_CHARS],
        instance_number=_integer(values, 0x00200013),
        rows=_unsigned(values, 0x00280010, found),
        columns=_unsigned(values, 0x00280011, found),
        bits_allocated=_unsigned(values, 0x00280100, found),
        samples=_unsigned(values, 0x00280002, found),
        number_of_frames=frames,
        computing=digest,
        dataset_offset=0,
        header_end=deflated_end or found.header_end,
        pixel_offset=None if pixel is None or deflated_end else pixel.value_offset,
        object_length=dataset.nbytes,
        flags=flags if header.origin == "external" else flags | FLAG_OWN,
        origin=header.origin,
        received_us=header.received_us,
        parents=partial(_parents, key, dict(values), charset, header, flags, found),
        frame_table=frame_table,
        replaced_keep_us=int(rules.replaced_keep_seconds * 1e6),
    )
    return row, tuple(warnings)


def _uid(values: Mapping[int, Any], tag: int, rules: Rules) -> str:
    """Return a required UID, trailing NUL and space stripped (PS3.5 6.2)."""
    raw = bytes(values.get(tag, b""))
    text = raw.decode("ascii", "replace").rstrip("\0 ")
    if not text:
        raise IdentityMismatch("required UID is missing:", tag)
    if not is_uid(text):
        hostile = len(text) > 64 or not text.isprintable()
        if hostile or not rules.lenient_uids or set(text) & set("/\\:*?%"):
            raise IdentityMismatch("not a UID:", tag)
    return text


def _agree(claimed: str, found: str, tag: int) -> None:
    if claimed and claimed.rstrip("\0 ") != found:
        raise IdentityMismatch("differs from what the request said:", tag)


def _text(values: Mapping[int, Any], tag: int, charset: Charset, vr: str = "LO") -> str:
    raw = values.get(tag)
    if not raw:
        return ""
    if raw.isascii() and b"\x1b" not in raw:
        # Most are: the same text in every character set.
        return str(raw, "ascii").rstrip("\0 ").lstrip(" ")
    return charset.decode(bytes(raw), vr).rstrip("\0 ").lstrip(" ")


def _integer(values: Mapping[int, Any], tag: int) -> int | None:
    """Return an IS value, or None when it is absent or not one (PS3.5 6.2)."""
    raw = bytes(values.get(tag, b"")).split(b"\\")[0].strip(b" \0")
    if not raw or len(raw) > 12:
        return None
    try:
        number = int(raw)
    except ValueError:
        return None
    return number if -(2**31) <= number < 2**31 else None


def _unsigned(values: Mapping[int, Any], tag: int, found: Scan) -> int | None:
    """Return a US value, or None when it is not two bytes long."""
    raw = bytes(values.get(tag, b""))
    if len(raw) != 2:
        return None
    return int.from_bytes(raw, found.byte_order)


def _frames(found: Scan, values: Mapping[int, Any]) -> tuple[int | None, bytes | None]:
    """Return Number of Frames and the offsets of encapsulated frames.

    Offsets count from the first data set byte. Native frames need no table, and
    a single encapsulated fragment is found again without one.
    """
    declared = _integer(values, 0x00280008)
    if found.pixel is None:
        return declared, None
    count = declared if declared is not None and declared > 0 else 1
    if not found.pixel.encapsulated or count == 1:
        return count, None
    try:
        table = frame_ranges(found, count)
    except (MalformedObject, LookupError):
        return count, None
    return count, table.pack()


@lru_cache(maxsize=1024)
def _date(text: str) -> str | None:
    """Return a DA value that is a day, else None (PS3.5 6.2)."""
    text = text.strip().replace(".", "") if len(text.strip()) == 10 else text.strip()
    if len(text) != 8 or not text.isascii() or not text.isdigit():
        return None
    try:
        date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None
    return text


@lru_cache(maxsize=1024)
def _time(text: str) -> str | None:
    """Return a TM value that is a time, else None (PS3.5 6.2)."""
    text = text.strip().replace(":", "")
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    if len(whole) not in {2, 4, 6} or len(fraction) > 6 or not digits.isascii():
        return None
    if not digits.isdigit():
        return None
    hour, minute, second = (int(whole[i : i + 2] or 0) for i in (0, 2, 4))
    if hour > 23 or minute > 59 or second > 60:
        return None
    return text


def _searched(text: str) -> str:
    """Return the searched form of a name; folding can make it longer."""
    return normalise(text)[:INDEXED_CHARS]


def _parents(
    key: ParentKey,
    values: Mapping[int, Any],
    charset: Charset,
    header: RecordHeader,
    flags: int,
    found: Scan,
) -> Parents:
    """Decode the columns of patient, study and series."""

    def text(tag: int, vr: str = "LO") -> str:
        return _text(values, tag, charset, vr)[:INDEXED_CHARS]

    name = text(0x00100010, "PN")
    groups = split_person_name(name)
    birth, sex = text(0x00100030), text(0x00100040)
    referring = text(0x00080090, "PN")
    study_date, study_time = text(0x00080020), text(0x00080030)
    now = header.received_us
    # Patients without an ID are never one patient: each study gets its own.
    issuer = key.issuer if key.patient_id else f"~{key.study_instance_uid}"
    patient = {
        "tenant": key.tenant,
        "issuer": issuer,
        "patient_id": key.patient_id,
        "patient_name": name,
        "name_search": _searched(name),
        "birth_date": _date(birth),
        "sex": sex,
        "created_us": now,
    }
    study = {
        "tenant": key.tenant,
        "study_instance_uid": key.study_instance_uid,
        "study_date": _date(study_date),
        "study_time": _time(study_time),
        "accession_number": text(0x00080050),
        "study_id": text(0x00200010),
        "study_description": text(0x00081030),
        "referring_physician_name": referring,
        "referring_search": _searched(referring),
        "timezone_offset": text(0x00080201)[:16],
        "patient_id": key.patient_id,
        "issuer": key.issuer,
        "patient_name": name,
        "name_alphabetic": _searched(groups[0]),
        "name_ideographic": _searched(groups[1]),
        "name_phonetic": _searched(groups[2]),
        "name_pinyin": pinyin_keys(name),
        "birth_date": _date(birth),
        "sex": sex,
        "modalities": "",
        "sop_classes": "",
        "n_series": 0,
        "n_instances": 0,
        "size_bytes": 0,
        "json": study_fragment(
            study_date=study_date,
            study_time=study_time,
            accession_number=text(0x00080050),
            referring_physician_name=referring,
            timezone_offset=text(0x00080201),
            patient_name=name,
            patient_id=key.patient_id,
            issuer=key.issuer,
            birth_date=birth,
            sex=sex,
            study_instance_uid=key.study_instance_uid,
            study_id=text(0x00200010),
            study_description=text(0x00081030),
            has_charset=bool(values.get(0x00080005)),
        ),
        "origin": header.origin,
        "flags": flags,
        "version": 0,
        "created_us": now,
        "updated_us": now,
    }
    requests = request_attributes(found, charset)
    first = requests[0] if requests else {}
    pps_date, pps_time = text(0x00400244), text(0x00400245)
    number = _integer(values, 0x00200011)
    series = {
        "tenant": key.tenant,
        "series_instance_uid": key.series_instance_uid,
        "modality": text(0x00080060)[:64],
        "series_number": number,
        "series_description": text(0x0008103E),
        "body_part": text(0x00180015),
        "laterality": text(0x00200060),
        "station_name": text(0x00081010),
        "institution_name": text(0x00080080),
        "pps_start_date": _date(pps_date),
        "pps_start_time": _time(pps_time),
        "scheduled_step_id": first.get("ScheduledProcedureStepID", ""),
        "requested_procedure_id": first.get("RequestedProcedureID", ""),
        "n_instances": 0,
        "size_bytes": 0,
        "json": series_fragment(
            modality=text(0x00080060),
            series_description=text(0x0008103E),
            series_instance_uid=key.series_instance_uid,
            series_number=number,
            body_part=text(0x00180015),
            laterality=text(0x00200060),
            station_name=text(0x00081010),
            institution_name=text(0x00080080),
            pps_start_date=pps_date,
            pps_start_time=pps_time,
            request_attributes=requests,
        ),
        "sealed_version": 0,
        "revision": 0,
        "created_us": now,
        "updated_us": now,
    }
    return Parents(patient, study, series)
