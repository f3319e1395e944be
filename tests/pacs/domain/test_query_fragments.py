"""Stored fragments become ordered, valid JSON whatever the values hold."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from pacs.domain.fragments import (
    InstanceTemplate,
    merged,
    series_fragment,
    series_object,
    study_fragment,
    study_object,
)

NASTY = '"00100010":\\{},张\u202e\x07^=é𠮷'
texts = st.text(alphabet=st.sampled_from(NASTY), max_size=24)


def ordered(rendered: str) -> dict[str, Any]:
    """Parse; member names are unique and ascend (PS3.18 F.2.2)."""
    pairs: list[str] = []
    found: dict[str, Any] = orjson.loads(rendered)
    pairs += found
    assert pairs == sorted(pairs)
    return found


def one_value(text: str) -> list[str | None]:
    return [part or None for part in text.split("\\")] if text else []


@settings(max_examples=80, deadline=None)
@given(st.lists(texts, min_size=11, max_size=11), st.booleans())
def test_a_study_keeps_every_value(values: list[str], has_charset: object) -> None:
    names = (
        "study_date", "study_time", "accession_number", "referring_physician_name",
        "timezone_offset", "patient_name", "patient_id", "issuer", "birth_date",
        "sex", "study_id",
    )  # fmt: skip
    fragment = study_fragment(
        **dict(zip(names, values, strict=True)),
        study_instance_uid="1.2",
        study_description=values[0],
        has_charset=bool(has_charset),
    )

    found = ordered(
        study_object(
            fragment,
            retrieve_base="http://h/dicom-web",
            study_instance_uid='1.2"',
            modalities="CT\\MR",
            n_series=2,
            n_instances=3,
        )
    )

    assert found["00080050"].get("Value", []) == one_value(values[2])
    assert found["00100020"].get("Value", []) == one_value(values[6])
    assert found["00080061"]["Value"] == ["CT", "MR"]
    assert found["00081190"]["Value"] == ["http://h/dicom-web/studies/1.2%22"]
    assert found["00201208"]["Value"] == [3]
    assert ("00080005" in found) == bool(has_charset)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(texts, min_size=8, max_size=8),
    st.none() | st.integers(-5, 5),
    st.lists(st.fixed_dictionaries({"RequestedProcedureID": texts}), max_size=2),
)
def test_a_series_and_its_instances_keep_every_value(
    values: list[str], number: int | None, requests: list[dict[str, str]]
) -> None:
    names = (
        "modality", "series_description", "body_part", "laterality", "station_name",
        "institution_name", "pps_start_date", "pps_start_time",
    )  # fmt: skip
    fragment = series_fragment(
        **dict(zip(names, values, strict=True)),
        series_instance_uid="1.3",
        series_number=number,
        request_attributes=requests,
    )

    series = ordered(
        series_object(
            fragment,
            retrieve_base="",
            study_instance_uid="1.2",
            series_instance_uid="1.3",
            n_instances=4,
        )
    )
    template = InstanceTemplate.of(
        retrieve_base="", study_instance_uid="1.2", series_instance_uid="1.3",
        above=series,
    )  # fmt: skip
    instance = ordered(
        template.fill(
            sop_class_uid="1.4", sop_instance_uid="1.5", transfer_syntax_uid="1.6",
            instance_number=number, samples=None, number_of_frames=None, rows=1,
            columns=2, bits_allocated=None,
        )
    )  # fmt: skip

    assert series["0008103E"].get("Value", []) == one_value(values[1])
    assert series["0020000D"]["Value"] == ["1.2"]
    assert series["00201209"]["Value"] == [4]
    assert ("00400275" in series) == bool(requests)
    assert instance["0008103E"] == series["0008103E"]
    assert instance["00081190"]["Value"] == ["/studies/1.2/series/1.3/instances/1.5"]
    assert ("Value" in instance["00200013"]) == (number is not None)


def test_merged_attributes_never_replace_the_rows_own() -> None:
    found = ordered(merged('{"00100020":{"vr":"LO"}}', {"00080020": 1, "00100020": 2}))

    assert found == {"00080020": 1, "00100020": {"vr": "LO"}}
