"""Matching keys of C-FIND and QIDO-RS as rules (PS3.4 C.2.2.2).

One table says what can be asked; one parser per value representation turns a key
into a rule. Rules are plain values: how a database looks them up is not said here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pacs.domain.study import Level
from pacs.imaging.charset import normalise
from storage.kernel.errors import InvalidParameter, TooLarge
from storage.kernel.limits import Limits

LEVELS = (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE)
_RANK = {level: rank for rank, level in enumerate(LEVELS)}


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute that searches answer with.

    Attributes
    ----------
    column : str
        Column of the level's table that is matched; empty: return key only.
    many : bool
        The column holds a backslash-joined set (Modalities in Study).
    """

    tag: int
    keyword: str
    vr: str
    level: Level
    column: str = ""
    many: bool = False


_P, _T, _S, _I = LEVELS

#: Keys of PS3.4 C.6.1.1.2 to C.6.1.1.5 and C.3.4 that the index holds.
ATTRIBUTES = (
    Attribute(0x00100010, "PatientName", "PN", _P, "patient_name"),
    Attribute(0x00100020, "PatientID", "LO", _P, "patient_id"),
    Attribute(0x00100021, "IssuerOfPatientID", "LO", _P, "issuer"),
    Attribute(0x00100030, "PatientBirthDate", "DA", _P, "birth_date"),
    Attribute(0x00100040, "PatientSex", "CS", _P, "sex"),
    Attribute(0x00201200, "NumberOfPatientRelatedStudies", "IS", _P),
    Attribute(0x00201202, "NumberOfPatientRelatedSeries", "IS", _P),
    Attribute(0x00201204, "NumberOfPatientRelatedInstances", "IS", _P),
    Attribute(0x00080020, "StudyDate", "DA", _T, "study_date"),
    Attribute(0x00080030, "StudyTime", "TM", _T, "study_time"),
    Attribute(0x00080050, "AccessionNumber", "SH", _T, "accession_number"),
    Attribute(0x00080056, "InstanceAvailability", "CS", _T),
    Attribute(0x00080061, "ModalitiesInStudy", "CS", _T, "modalities", many=True),
    Attribute(0x00080062, "SOPClassesInStudy", "UI", _T, "sop_classes", many=True),
    Attribute(
        0x00080090, "ReferringPhysicianName", "PN", _T, "referring_physician_name"
    ),
    Attribute(0x00080201, "TimezoneOffsetFromUTC", "SH", _T),
    Attribute(0x00081030, "StudyDescription", "LO", _T, "study_description"),
    Attribute(0x0020000D, "StudyInstanceUID", "UI", _T, "study_instance_uid"),
    Attribute(0x00200010, "StudyID", "SH", _T, "study_id"),
    Attribute(0x00201206, "NumberOfStudyRelatedSeries", "IS", _T),
    Attribute(0x00201208, "NumberOfStudyRelatedInstances", "IS", _T),
    Attribute(0x00080060, "Modality", "CS", _S, "modality"),
    Attribute(0x00080080, "InstitutionName", "LO", _S, "institution_name"),
    Attribute(0x00081010, "StationName", "SH", _S, "station_name"),
    Attribute(0x0008103E, "SeriesDescription", "LO", _S, "series_description"),
    Attribute(0x00180015, "BodyPartExamined", "CS", _S, "body_part"),
    Attribute(0x0020000E, "SeriesInstanceUID", "UI", _S, "series_instance_uid"),
    Attribute(0x00200011, "SeriesNumber", "IS", _S, "series_number"),
    Attribute(0x00200060, "Laterality", "CS", _S, "laterality"),
    Attribute(0x00201209, "NumberOfSeriesRelatedInstances", "IS", _S),
    Attribute(
        0x00400244, "PerformedProcedureStepStartDate", "DA", _S, "pps_start_date"
    ),
    Attribute(
        0x00400245, "PerformedProcedureStepStartTime", "TM", _S, "pps_start_time"
    ),
    # Within Request Attributes Sequence (0040,0275): its first item is indexed.
    Attribute(0x00400009, "ScheduledProcedureStepID", "SH", _S, "scheduled_step_id"),
    Attribute(0x00401001, "RequestedProcedureID", "SH", _S, "requested_procedure_id"),
    Attribute(0x00080016, "SOPClassUID", "UI", _I, "sop_class_uid"),
    Attribute(0x00080018, "SOPInstanceUID", "UI", _I, "sop_instance_uid"),
    Attribute(
        0x00083002, "AvailableTransferSyntaxUID", "UI", _I, "transfer_syntax_uid"
    ),
    Attribute(0x00200013, "InstanceNumber", "IS", _I, "instance_number"),
    Attribute(0x00280002, "SamplesPerPixel", "US", _I, "samples"),
    Attribute(0x00280008, "NumberOfFrames", "IS", _I, "number_of_frames"),
    Attribute(0x00280010, "Rows", "US", _I, "rows"),
    Attribute(0x00280011, "Columns", "US", _I, "columns"),
    Attribute(0x00280100, "BitsAllocated", "US", _I, "bits_allocated"),
)
BY_TAG: Mapping[int, Attribute] = {found.tag: found for found in ATTRIBUTES}

#: Unique key of each level (PS3.4 C.6.1.1).
UNIQUE_KEYS: Mapping[Level, int] = {
    Level.PATIENT: 0x00100020,
    Level.STUDY: 0x0020000D,
    Level.SERIES: 0x0020000E,
    Level.IMAGE: 0x00080018,
}
REQUEST_ATTRIBUTES_SEQUENCE = 0x00400275
#: Keys that live in an item of Request Attributes Sequence.
REQUEST_KEYS = frozenset({0x00400009, 0x00401001})


def supported(level: Level) -> frozenset[int]:
    """Return the tags that a search at `level` knows, upper levels included."""
    return frozenset(
        found.tag for found in ATTRIBUTES if _RANK[found.level] <= _RANK[level]
    )


@dataclass(frozen=True, slots=True)
class OneOf:
    """Single value or list of UID matching: one of these, exactly."""

    values: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Wildcard:
    """Wild card matching: ``*`` any characters, ``?`` one.

    `prefix` is what stands before the first wild card.
    """

    pattern: str
    prefix: str

    @property
    def is_prefix(self) -> bool:
        """True when the prefix says it all."""
        return self.pattern == f"{self.prefix}*"


@dataclass(frozen=True, slots=True)
class Range:
    """Range matching on strings: `low` <= value < `below`, None is open."""

    low: str | None
    below: str | None


@dataclass(frozen=True, slots=True)
class NamePattern:
    """What one component group of a name must be: `exact`, or like `wildcard`.

    Normalised, without trailing delimiters; a stored group equals `exact` with or
    without trailing empty components (PS3.5 6.2.1).
    """

    exact: str | None
    wildcard: Wildcard | None


@dataclass(frozen=True, slots=True)
class NameIs:
    """Match a person name.

    Attributes
    ----------
    any_group : NamePattern or None
        A key with one component group, matched against each stored group.
    groups : tuple of NamePattern or None
        A key with several groups, each matched against its own.
    phonetic : bool
        The key is written in a phonetic script (kana, hangul, bopomofo).
    """

    any_group: NamePattern | None
    groups: tuple[NamePattern | None, ...] = ()
    phonetic: bool = False


@dataclass(frozen=True, slots=True)
class NameLike:
    """Fuzzy matching: each word begins a component of any group or its pinyin."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blank:
    """Empty value matching (PS3.4 C.2.2.2.7)."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """A legal key that no value can match: a reversed range."""


Rule = OneOf | Wildcard | Range | NameIs | NameLike | Blank | Nothing


@dataclass(frozen=True, slots=True)
class Condition:
    """A rule for one attribute."""

    attribute: Attribute
    rule: Rule


def conditions(
    level: Level, keys: Mapping[int, str], limits: Limits, *, fuzzy: bool = False
) -> tuple[Condition, ...]:
    """Return what `keys` demand of a match at `level`, in tag order.

    Keys of lower levels, return keys and unknown keys demand nothing.

    Raises
    ------
    InvalidParameter
        A key has the wrong form; named by its keyword.
    TooLarge
        ``matching_key_chars``, ``matching_wildcards`` or ``uid_list``.
    """
    found = []
    for tag in sorted(keys):
        attribute = BY_TAG.get(tag)
        if attribute is None or not attribute.column:
            continue
        if _RANK[attribute.level] > _RANK[level]:
            continue
        rule = parse_key(attribute, keys[tag], limits, fuzzy=fuzzy)
        if rule is not None:
            found.append(Condition(attribute, rule))
    return tuple(found)


def parse_key(
    attribute: Attribute, value: str, limits: Limits, *, fuzzy: bool = False
) -> Rule | None:
    """Return the rule of one key, None for universal matching.

    Examples
    --------
    >>> parse_key(BY_TAG[0x00080020], "20240101-20240131", Limits())
    Range(low='20240101', below='20240132')
    >>> parse_key(BY_TAG[0x00100020], "*", Limits())
    """
    text = value.strip(" \0")
    if not text.strip("*"):
        return None
    if text == '""':
        return Blank()
    if attribute.vr == "UI":
        # Bound: a list of UIDs may be long, by their number.
        if len(text) > limits.uid_list * 65:
            raise TooLarge("uid_list", limits.uid_list)
    elif len(text) > limits.matching_key_chars:
        raise TooLarge("matching_key_chars", limits.matching_key_chars)
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        raise InvalidParameter(attribute.keyword, "holds a character no text may have")
    if attribute.vr == "PN":
        return _name_like(attribute, text) if fuzzy else _name(text, limits)
    return _PARSERS[attribute.vr](attribute, text, limits)


def wildcard(text: str, limits: Limits) -> Wildcard:
    """Return `text` with runs of wild cards put into their shortest form.

    Raises
    ------
    TooLarge
        More than ``matching_wildcards`` runs remain (bound of the comparison).
    """

    def shortest(run: re.Match[str]) -> str:
        # Order matters: "?" before "*" lets the fixed length be checked first.
        return "?" * run[0].count("?") + "*" * ("*" in run[0])

    pattern = re.sub(r"[*?]+", shortest, text)
    if pattern.count("*") > limits.matching_wildcards:
        raise TooLarge("matching_wildcards", limits.matching_wildcards)
    prefix = re.split(r"[*?]", pattern, maxsplit=1)[0]
    return Wildcard(pattern, prefix)


def has_wildcard(text: str) -> bool:
    """Tell whether ``*`` or ``?`` stands in `text`."""
    return "*" in text or "?" in text


def _text(_attribute: Attribute, text: str, limits: Limits) -> Rule:
    return wildcard(text, limits) if has_wildcard(text) else OneOf((text,))


def _code(attribute: Attribute, text: str, limits: Limits) -> Rule:
    """Match a CS; several values mean one of them (C.2.2.2.8)."""
    values = tuple(dict.fromkeys(part.strip() for part in text.split("\\")))
    if len(values) == 1:
        return _text(attribute, values[0], limits)
    if has_wildcard(text) or "" in values:
        raise InvalidParameter(attribute.keyword, "a list holds plain values only")
    return OneOf(values)


def _uids(attribute: Attribute, text: str, limits: Limits) -> Rule:
    values = tuple(dict.fromkeys(part.strip(" \0") for part in text.split("\\")))
    if len(values) > limits.uid_list:
        raise TooLarge("uid_list", limits.uid_list)
    # Tolerates: UIDs that are no UIDs, for archives that accepted them.
    if not all(re.fullmatch(r"[!-~]{1,64}", uid) for uid in values) or has_wildcard(
        text
    ):
        raise InvalidParameter(attribute.keyword, "not a UID or a list of UIDs")
    return OneOf(values)


def _number(attribute: Attribute, text: str, _limits: Limits) -> Rule:
    if re.fullmatch(r"[+-]?[0-9]{1,10}", text, re.ASCII) is None:
        raise InvalidParameter(attribute.keyword, "not a number")
    return OneOf((int(text),))


def _date_bound(attribute: Attribute, text: str) -> str:
    """Return a DA as eight digits; the older dotted form is read (PS3.5 6.2)."""
    digits = text.replace(".", "") if len(text) == 10 else text
    if (
        re.fullmatch(r"[0-9]{8}", digits) is None
        or not 1 <= int(digits[4:6]) <= 12
        or not 1 <= int(digits[6:]) <= 31
    ):
        raise InvalidParameter(attribute.keyword, "not a date or a range of dates")
    return digits


def _time_bound(attribute: Attribute, text: str) -> str:
    """Return a TM, which may be partial; the older colons are read (PS3.5 6.2)."""
    digits = text.replace(":", "")
    found = re.fullmatch(
        r"([01][0-9]|2[0-3])(?:[0-5][0-9](?:(?:[0-5][0-9]|60)(?:\.[0-9]{1,6})?)?)?",
        digits,
    )
    if found is None:
        raise InvalidParameter(attribute.keyword, "not a time or a range of times")
    return digits


def _earliest(time: str) -> str:
    """Return the shortest string that sorts with the first instant of `time`.

    Stored times may be partial too: 10 is 10:00:00, so 1000 begins at "10".
    """
    whole, _, fraction = time.partition(".")
    fraction = fraction.rstrip("0")
    if fraction:
        return f"{whole}.{fraction}"
    while len(whole) > 2 and whole.endswith("00"):
        whole = whole[:-2]
    return whole


def _range(
    attribute: Attribute,
    text: str,
    bound: Callable[[Attribute, str], str],
    earliest: Callable[[str], str],
    after: Callable[[str], str],
) -> Rule:
    """Match a single value or a range, to the precision given (C.2.2.2.5).

    A range that ends before it begins matches nothing; ranges of times do not
    cross midnight.
    """
    low_text, dash, high_text = (part.strip() for part in text.partition("-"))
    if not dash:
        value = bound(attribute, low_text)
        return Range(earliest(value), after(value))
    if not low_text and not high_text:
        raise InvalidParameter(attribute.keyword, "a range needs a beginning or an end")
    low = earliest(bound(attribute, low_text)) if low_text else None
    below = after(bound(attribute, high_text)) if high_text else None
    if low is not None and below is not None and low >= below:
        return Nothing()
    return Range(low, below)


def _after_date(date: str) -> str:
    """Return the next eight digits, a date or not: digits sort alike everywhere."""
    return f"{int(date) + 1:08d}"


def _after_time(time: str) -> str:
    """Return what sorts, by bytes, behind every time that begins with `time`."""
    return f"{time}:"  # the character behind "9"


def _date(attribute: Attribute, text: str, _limits: Limits) -> Rule:
    return _range(attribute, text, _date_bound, str, _after_date)


def _time(attribute: Attribute, text: str, _limits: Limits) -> Rule:
    return _range(attribute, text, _time_bound, _earliest, _after_time)


_PARSERS: Mapping[str, Callable[[Attribute, str, Limits], Rule]] = {
    "CS": _code,
    "DA": _date,
    "IS": _number,
    "LO": _text,
    "SH": _text,
    "TM": _time,
    "UI": _uids,
    "US": _number,
}


def _name(text: str, limits: Limits) -> Rule | None:
    """Match component groups without regard to case, accents and width."""
    folded = normalise(text)
    groups = [_name_pattern(group, limits) for group in folded.split("=")[:3]]
    phonetic = any(map(_is_phonetic, folded))
    if all(group is None for group in groups):
        return None
    if len(groups) == 1:
        return NameIs(groups[0], phonetic=phonetic)
    return NameIs(None, tuple(groups), phonetic)


def _name_pattern(group: str, limits: Limits) -> NamePattern | None:
    """Return the pattern of one component group, None for universal."""
    stem = group.strip().rstrip("^")
    if not stem.strip("*^"):
        return None
    if not has_wildcard(stem):
        return NamePattern(stem, None)
    # Trailing components may be missing altogether: "zhang^*" is also "zhang".
    bare = re.sub(r"(?:\^\*+)+\Z", "", stem)
    if bare != stem and not has_wildcard(bare):
        return NamePattern(bare, wildcard(f"{bare}^*", limits))
    return NamePattern(None, wildcard(stem, limits))


_SEPARATORS = re.compile(r"[\s\x00-\x1f\ud800-\udfff^=,*?\\]+")
MAX_WORDS = 8


def words(text: str) -> tuple[str, ...]:
    """Return the words of a free-text or fuzzy key, normalised."""
    return tuple(dict.fromkeys(filter(None, _SEPARATORS.split(normalise(text)))))


def _name_like(attribute: Attribute, text: str) -> Rule | None:
    found = words(text)
    if len(found) > MAX_WORDS:
        raise InvalidParameter(attribute.keyword, f"more than {MAX_WORDS} words")
    return NameLike(found) if found else None


def _is_phonetic(char: str) -> bool:
    point = ord(char)
    return (
        0x1100 <= point <= 0x11FF  # hangul jamo
        or 0x3040 <= point <= 0x31BF  # kana, bopomofo, hangul compatibility jamo
        or 0x31F0 <= point <= 0x31FF  # katakana extensions
        or 0xAC00 <= point <= 0xD7AF  # hangul
    )


#: Attributes of the Patient and General Study modules that are not indexed
#: (PS3.3 C.7.1.1, C.7.1.3, C.7.2.1, C.7.2.2).
_OTHER_OF_STUDY = frozenset(
    {
        0x00081032, 0x00081048, 0x00081049, 0x00081060, 0x00081062, 0x00081080,
        0x00081084, 0x00081110, 0x00081120, 0x00100022, 0x00100024, 0x00100026,
        0x00100032, 0x00100033, 0x00100034, 0x00100035, 0x00100101, 0x00100102,
        0x00100200, 0x00100212, 0x00100213, 0x00100214, 0x00100215, 0x00100216,
        0x00101000, 0x00101001, 0x00101002, 0x00101010, 0x00101020, 0x00101030,
        0x00101040, 0x00101060, 0x00101100, 0x00102000, 0x00102110, 0x00102154,
        0x00102155, 0x00102160, 0x00102180, 0x001021A0, 0x001021B0, 0x001021C0,
        0x001021D0, 0x001021F0, 0x00102201, 0x00102202, 0x00102203, 0x00102297,
        0x00102298, 0x00102299, 0x00104000, 0x0008009C, 0x00080096, 0x00080051,
        0x00120062, 0x00120063, 0x00120064, 0x00321033, 0x00321034, 0x00321060,
        0x00321064, 0x00380010, 0x00380014, 0x00380060, 0x00380062, 0x00380064,
        0x00380500, 0x00401012, 0x00081111,
    }
)  # fmt: skip
#: The same of the General Series and General Equipment modules, and Frame of
#: Reference (PS3.3 C.7.3.1, C.7.4.1, C.7.5.1).
_OTHER_OF_SERIES = frozenset(
    {
        0x00080021, 0x00080031, 0x00080064, 0x00080068, 0x00080070, 0x00080081,
        0x00081040, 0x00081041, 0x0008103F, 0x00081050, 0x00081052, 0x00081070,
        0x00081072, 0x00081090, 0x00081250, 0x0008010D, 0x00180010, 0x00181000,
        0x00181002, 0x00181008, 0x00181016, 0x00181018, 0x00181020, 0x00181030,
        0x00181050, 0x00181200, 0x00181201, 0x00185100, 0x00200052, 0x00201040,
        0x00280108, 0x00280109, 0x00400250, 0x00400251, 0x00400253, 0x00400254,
        0x00400260, 0x00400280,
    }
)  # fmt: skip


def level_of(tag: int) -> Level:
    """Return the lowest level at which `tag` says the same of all instances.

    What is in no module of an upper level belongs to the instance (PS3.3 A.1.2).
    """
    known = BY_TAG.get(tag)
    if known is not None:
        return known.level
    if tag == REQUEST_ATTRIBUTES_SEQUENCE or tag in _OTHER_OF_SERIES:
        return Level.SERIES
    return Level.STUDY if tag in _OTHER_OF_STUDY else Level.IMAGE


def reaches(level: Level, tag: int) -> bool:
    """Tell whether a search at `level` may answer with `tag`."""
    return _RANK[level_of(tag)] <= _RANK[level]
