"""Matching keys become rules, or are refused by name (PS3.4 C.2.2.2)."""

from __future__ import annotations

import string
from datetime import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacs.domain.matching import (
    ATTRIBUTES,
    BY_TAG,
    Attribute,
    Blank,
    NameIs,
    NameLike,
    NamePattern,
    Nothing,
    OneOf,
    Range,
    Rule,
    Wildcard,
    conditions,
    level_of,
    parse_key,
    reaches,
    supported,
    words,
)
from pacs.domain.study import Level
from storage.kernel.errors import InvalidParameter, TooLarge
from storage.kernel.limits import Limits

LIMITS = Limits()
BY_KEYWORD = {found.keyword: found for found in ATTRIBUTES}


def parse(keyword: str, value: str, *, fuzzy: bool = False) -> Rule | None:
    return parse_key(BY_KEYWORD[keyword], value, LIMITS, fuzzy=fuzzy)


@pytest.mark.parametrize("value", ["", "*", "**", "  ", "\0"])
@pytest.mark.parametrize("attribute", ATTRIBUTES, ids=lambda a: a.keyword)
def test_empty_and_star_are_universal_for_every_vr(
    attribute: Attribute, value: str
) -> None:
    assert parse_key(attribute, value, LIMITS) is None


@pytest.mark.parametrize(
    ("keyword", "value", "rule"),
    [
        ("PatientID", "P1", OneOf(("P1",))),
        ("PatientID", " P1 ", OneOf(("P1",))),
        ("PatientID", "a\\b", OneOf(("a\\b",))),
        ("PatientID", "P*", Wildcard("P*", "P")),
        ("PatientID", "P?*?*", Wildcard("P??*", "P")),
        ("StudyDescription", "100%_x", OneOf(("100%_x",))),
        ("AccessionNumber", '""', Blank()),
        ("Modality", "CT", OneOf(("CT",))),
        ("ModalitiesInStudy", "CT\\MR\\CT", OneOf(("CT", "MR"))),
        ("StudyInstanceUID", "1.2\\1.3\\1.2", OneOf(("1.2", "1.3"))),
        ("SeriesNumber", "007", OneOf((7,))),
        ("Rows", "512", OneOf((512,))),
        ("StudyDate", "20240131", Range("20240131", "20240132")),
        ("StudyDate", "2024.01.31", Range("20240131", "20240132")),
        ("StudyDate", "20240101-", Range("20240101", None)),
        ("StudyDate", "-20240101", Range(None, "20240102")),
        ("StudyDate", "20240101 - 20240102", Range("20240101", "20240103")),
        ("StudyDate", "20240102-20240101", Nothing()),
        ("StudyTime", "10", Range("10", "10:")),
        ("StudyTime", "1000", Range("10", "1000:")),
        ("StudyTime", "10:30:00", Range("1030", "103000:")),
        ("StudyTime", "000000-", Range("00", None)),
        ("StudyTime", "103000.500-", Range("103000.5", None)),
        ("StudyTime", "1000-1159", Range("10", "1159:")),
        ("StudyTime", "2300-0100", Nothing()),
    ],
)
def test_a_key_becomes_the_rule_of_its_vr(
    keyword: str, value: str, rule: Rule | None
) -> None:
    assert parse(keyword, value) == rule


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("StudyDate", "-"),
        ("StudyDate", "2024*"),
        ("StudyDate", "202401"),
        ("StudyDate", "20241301"),
        ("StudyDate", "20240101-20240102-20240103"),
        ("StudyDate", "20240101\\20240102"),
        ("StudyDate", "２０２４０１０１"),
        ("StudyTime", "-"),
        ("StudyTime", "25"),
        ("StudyTime", "10*"),
        ("StudyTime", "103000.1234567"),
        ("SeriesNumber", "1.5"),
        ("SeriesNumber", "1*"),
        ("SeriesNumber", "99999999999"),
        ("StudyInstanceUID", "1.2.*"),
        ("StudyInstanceUID", "1.2\\\\1.3"),
        ("StudyInstanceUID", "1." * 40),
        ("Modality", "CT\\M*"),
        ("PatientID", "a\0b"),
        ("PatientID", "a\udc80"),
    ],
)
def test_a_malformed_key_is_refused_by_its_name(keyword: str, value: str) -> None:
    with pytest.raises(InvalidParameter) as refusal:
        parse(keyword, value)

    assert refusal.value.name == keyword
    assert value not in str(refusal.value)


def exactly(stem: str) -> NamePattern:
    return NamePattern(stem, None)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("Zhang^San", NameIs(exactly("zhang^san"))),
        ("ZHANG^SAN^^", NameIs(exactly("zhang^san"))),
        ("Ｍüller^Zoë", NameIs(exactly("muller^zoe"))),
        ("Wang*", NameIs(NamePattern(None, Wildcard("wang*", "wang")))),
        ("Wang^*", NameIs(NamePattern("wang", Wildcard("wang^*", "wang^")))),
        ("Wang^*^*", NameIs(NamePattern("wang", Wildcard("wang^*", "wang^")))),
        ("=王^伟", NameIs(None, (None, exactly("王^伟")))),
        ("Wang^Wei=*=", NameIs(None, (exactly("wang^wei"), None, None))),
        ("やまだ*", NameIs(NamePattern(None, Wildcard("やまた*", "やまた")), (), True)),
        ("^^^", None),
        ("*=*", None),
    ],
)
def test_names_are_folded_and_padded(value: str, rule: Rule | None) -> None:
    assert parse("PatientName", value) == rule


def test_fuzzy_names_are_words() -> None:
    assert parse("PatientName", "zhang* San", fuzzy=True) == NameLike(("zhang", "san"))
    assert words("王^小东=Wang") == ("王", "小东", "wang")


def test_too_many_words_are_refused() -> None:
    with pytest.raises(InvalidParameter):
        parse("PatientName", "a b c d e f g h i", fuzzy=True)


def test_b20_runs_of_wildcards_collapse_or_are_refused() -> None:
    with pytest.raises(TooLarge):
        parse("PatientName", "*?" * 32_768)
    with pytest.raises(TooLarge):
        parse("PatientID", "*a" * 40)

    assert parse("PatientID", "a" + "*?" * 100) == Wildcard("a" + "?" * 100 + "*", "a")


def test_a_key_is_as_long_as_the_limit_and_no_longer() -> None:
    most = LIMITS.matching_key_chars

    assert parse("PatientID", "a" * most) == OneOf(("a" * most,))
    with pytest.raises(TooLarge) as failure:
        parse("PatientID", "a" * (most + 1))
    assert failure.value.limit == "matching_key_chars"
    with pytest.raises(TooLarge) as failure:
        parse("StudyInstanceUID", "1" * (LIMITS.uid_list * 65 + 1))
    assert failure.value.limit == "uid_list"


def test_b22_ten_thousand_uids_are_one_rule_and_more_than_the_limit_are_refused() -> (
    None
):
    many = [f"1.2.{number}" for number in range(10_000)]

    rule = parse("SOPInstanceUID", "\\".join(many))

    assert rule == OneOf(tuple(many))
    with pytest.raises(TooLarge):
        parse_key(
            BY_TAG[0x00080018],
            "\\".join(many),
            LIMITS.model_copy(update={"uid_list": 9}),
        )


def test_lower_levels_and_return_keys_demand_nothing() -> None:
    keys = {0x00080060: "CT", 0x00201206: "3", 0x00080056: "OFFLINE", 0x00091001: "x"}

    assert conditions(Level.STUDY, keys, LIMITS) == ()
    assert [c.attribute.keyword for c in conditions(Level.IMAGE, keys, LIMITS)] == [
        "Modality"
    ]


def test_levels_are_known_for_attributes_that_are_not_indexed() -> None:
    assert level_of(0x00102160) is Level.STUDY
    assert level_of(0x00080070) is Level.SERIES
    assert level_of(0x00180050) is Level.IMAGE
    assert reaches(Level.SERIES, 0x00400275)
    assert not reaches(Level.STUDY, 0x00080070)
    assert supported(Level.PATIENT) < supported(Level.STUDY) < supported(Level.IMAGE)


@settings(max_examples=150, deadline=None)
@given(
    attribute=st.sampled_from(ATTRIBUTES),
    value=st.text(alphabet=string.printable + "*?\\^=张三ｱé%_[]\0", max_size=40),
    fuzzy=st.booleans(),
)
def test_any_text_is_a_rule_or_a_named_refusal(
    *, attribute: Attribute, value: str, fuzzy: bool
) -> None:
    try:
        rule = parse_key(attribute, value, LIMITS, fuzzy=fuzzy)
    except (InvalidParameter, TooLarge):
        return
    assert rule is None or hash(rule) is not None


@settings(max_examples=150, deadline=None)
@given(st.times(), st.times(), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6]))
def test_partial_times_lie_in_the_range_their_first_instant_lies_in(
    stored: time, bound: time, stored_digits: int, bound_digits: int
) -> None:
    value = stored.strftime("%H%M%S")[:stored_digits]
    low = bound.strftime("%H%M%S")[:bound_digits]

    rule = parse("StudyTime", f"{low}-")

    assert isinstance(rule, Range)
    assert (value >= str(rule.low)) == (value.ljust(6, "0") >= low.ljust(6, "0"))
