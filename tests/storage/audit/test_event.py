"""Text from outside: on one line, within its length, and never in the way of others."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from storage.audit import AuditEvent, AuditTrail
from storage.audit.event import CUT, LENGTHS, Detail, clean, detail_text
from storage.audit.search import AuditQuery, AuditReader, as_json, as_line
from storage.db.engine import Database
from storage.kernel.clock import SystemClock
from tests.support.auditing import records, verified

MIB = 1 << 20
FORGED = 'eve\n{"actor":"root"}\r\n2026-01-01 allow root'
HOSTILE = {
    "line": FORGED,
    "nul": "eve\0root",
    "escape": "eve\x1b[2J\x1b]0;root\x07",
    "delete": "eve\x7f\x08\x08\x08root",
    "c1": "eve\x85\x9broot",
    "separators": "eve\u2028root\u2029",
    "right to left": "eve\u202etoor\u2066",
    "surrogate": "eve\udc80\ud800",
    "megabyte": "e" * MIB,
    "megabyte of lines": "\n" * MIB,
    "json": '"],"outcome":"allow","x":["',
    "sql": "'; DROP TABLE audit_record; --",
    "astral": "\U0001f3e5" * 200,
}
#: Fields whose values are given as they are, and not as text.
TEXTS = sorted(set(LENGTHS) - {"roles", "outcome"})


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_recorded_and_read_as_one_line(
    database: Database, trail: AuditTrail, folder: Path, name: str
) -> None:
    text = HOSTILE[name]
    fields: dict[str, Any] = dict.fromkeys(TEXTS, text)
    trail.record_now(
        AuditEvent(**fields, roles=(text,), detail={text: text, "list": [text, text]})
    )

    (row,) = records(database)
    for field, length in LENGTHS.items():
        kept = getattr(row, field)
        assert len(kept) <= length
        assert kept.isprintable()
    assert verified(database, folder).is_clean
    for line in (as_line(row), orjson.dumps(as_json(row)) + b"\n"):
        assert line.count(b"\n") == 1
        assert len(line.decode().splitlines()) == 1
        assert orjson.loads(line)["actor"] == row.actor


def test_text_that_is_harmless_is_kept_as_it_is(
    database: Database, trail: AuditTrail
) -> None:
    name = "王 芳　O'Brien-Müller \\ ไทย"
    trail.record_now(AuditEvent(action="login", actor=name))

    assert records(database)[0].actor == name


@pytest.mark.parametrize("field", TEXTS)
def test_a_field_is_kept_whole_up_to_its_length(field: str) -> None:
    length = LENGTHS[field]

    assert clean("字" * length, length) == "字" * length
    assert clean("字" * (length + 1), length) == "字" * (length - 1) + CUT


def test_hostile_text_is_found_again_by_itself(
    database: Database, trail: AuditTrail
) -> None:
    trail.record_now(AuditEvent(action="login", actor=FORGED))

    page = AuditReader(database).search(None, AuditQuery(actor=FORGED), 10)

    assert [row.actor for row in page.records] == [clean(FORGED, 128)]


class TestDetail:
    def test_up_to_its_length_is_kept(self) -> None:
        whole = detail_text({"q": "x" * (256 - len('{"q":""}'))}, 256)

        assert len(whole) == 256
        assert orjson.loads(whole)["q"].strip("x") == ""

    @pytest.mark.parametrize(
        "detail",
        [
            {"q": "x" * 249},
            {"q": "x" * MIB},
            {"q": "字" * 200},
            {"q": '"\\' * 200},
            {f"key-{n}": "x" for n in range(1000)},
            {"q": ["x"] * 100_000},
            {"q": 10**5000},
            {"k" * MIB: 1, "q": "x" * 300},
        ],
        ids=["one more", "huge", "wide", "quotes", "keys", "list", "number", "key"],
    )
    def test_beyond_it_is_cut_and_says_so(self, detail: dict[str, object]) -> None:
        text = detail_text(detail, 256)  # type: ignore[arg-type]

        assert len(text.encode()) <= 256
        orjson.loads(text)
        assert "cut" in text or CUT in text

    @pytest.mark.parametrize("value", [1.5, {"a": 1}, b"x", object()], ids=str)
    def test_of_another_type_is_the_callers_mistake(self, value: object) -> None:
        with pytest.raises(TypeError):
            detail_text({"q": value}, 256)  # type: ignore[dict-item]

    def test_values_keep_their_types(self) -> None:
        detail: Detail = {"a": 1, "b": True, "c": None, "d": "x", "e": ["y", "z"]}

        assert orjson.loads(detail_text(detail, 256)) == detail


def test_a_bad_event_costs_its_caller_and_nobody_else(
    database: Database, folder: Path
) -> None:
    trail = AuditTrail(database, SystemClock(), folder, flush_seconds=60)
    good = AuditEvent(action="get", actor="li", study_uid="1.2")
    trail.record(good)

    for bad in (
        replace(good, actor=None),  # type: ignore[arg-type]
        replace(good, detail={"x": 1.5}),  # type: ignore[dict-item]
        replace(good, time_us="now", study_uid="1.3"),  # type: ignore[arg-type]
        replace(good, time_us="now"),  # type: ignore[arg-type]
        replace(good, time_us=1 << 63, study_uid="1.3"),
        replace(good, before="text", study_uid="1.4"),  # type: ignore[arg-type]
    ):
        with pytest.raises((TypeError, AttributeError)):
            trail.record(bad)
        with pytest.raises((TypeError, AttributeError)):
            trail.record_now(bad)

    trail.close()
    assert [(row.actor, row.count) for row in records(database)] == [("li", 1)]


def test_long_texts_do_not_stay_in_memory(database: Database, folder: Path) -> None:
    trail = AuditTrail(database, SystemClock(), folder, flush_seconds=60)
    trail.record(AuditEvent(action="get", actor="li"))
    tracemalloc.start()
    try:
        for number in range(50):
            name = f"{number}" + "x" * MIB
            trail.record(AuditEvent(action="get", actor=name, object_id=name))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert held < 4 * MIB
    trail.close()
    assert len(records(database)) == 51
