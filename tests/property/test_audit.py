"""Laws of the audit: any text can be recorded, and any change of it is located."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from storage.audit import AuditEvent, AuditTrail, Outcome
from storage.audit.event import LENGTHS, clean, detail_text
from storage.audit.findings import Damage
from storage.db import migrate
from storage.db.engine import Database
from storage.db.tables import AuditRecord
from storage.kernel.clock import SystemClock
from tests.support.auditing import attacking, records, verified, write

N = 8
TEXTS = sorted(set(LENGTHS) - {"roles", "outcome"})
#: What may be done to each kind of column.
INTEGERS = ("format", "time_us", "last_us", "count")
BYTES = {"before": Damage.ALTERED, "hash": Damage.MISPLACED, "mac": Damage.FORGED}
#: Any character, those that no encoding can carry as well.
any_text = st.text(st.characters(codec=None), max_size=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def database(folder: Path) -> Iterator[Database]:
    url = f"sqlite:///{folder / 'index.db'}"
    migrate.upgrade(url)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture(scope="module")
def trail(database: Database, folder: Path) -> Iterator[AuditTrail]:
    trail = AuditTrail(database, SystemClock(), folder, flush_seconds=60)
    write(trail, N)
    yield trail
    trail.close()


@given(
    fields=st.fixed_dictionaries(dict.fromkeys(TEXTS, any_text)),
    roles=st.lists(any_text, max_size=4),
    outcome=st.sampled_from(Outcome),
    detail=st.dictionaries(
        any_text,
        st.one_of(
            any_text, st.integers(), st.booleans(), st.none(), st.lists(any_text)
        ),
    ),
    digests=st.tuples(*[st.none() | st.binary(max_size=80)] * 2),
)
@settings(deadline=None)
def test_any_event_is_recorded_and_read_back_as_it_was_hashed(
    database: Database,
    folder: Path,
    trail: AuditTrail,
    fields: dict[str, Any],
    roles: list[str],
    outcome: Outcome,
    detail: dict[str, Any],
    digests: tuple[bytes | None, bytes | None],
) -> None:
    before, after = digests
    trail.record(
        AuditEvent(
            **fields,
            roles=roles,
            outcome=outcome,
            detail=detail,
            before=before,
            after=after,
        )
    )
    trail.flush()

    last = records(database)[-1]
    for name in TEXTS:
        assert (getattr(last, name) or "") == clean(fields[name], LENGTHS[name])
    assert verified(database, folder).is_clean


@given(text=any_text, length=st.integers(1, 200))
def test_cleaning_ends_and_is_bounded(text: str, length: int) -> None:
    once = clean(text, length)

    assert len(once) <= length
    assert len(once.splitlines()) <= 1
    once.encode()
    assert clean(once, length) == once


@given(st.dictionaries(any_text, any_text | st.lists(any_text)), st.integers(64, 999))
def test_a_detail_never_exceeds_its_bytes(detail: dict[str, Any], size: int) -> None:
    assert len(detail_text(detail, size).encode()) <= size


values = st.one_of(
    st.tuples(st.sampled_from(TEXTS), st.text(max_size=60)),
    st.tuples(st.sampled_from(["roles", "outcome", "alg", "detail"]), st.text()),
    st.tuples(st.sampled_from(INTEGERS), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.sampled_from(sorted(BYTES)), st.binary(max_size=64)),
)


@given(sequence=st.integers(1, N), change=values)
@settings(deadline=None)
def test_any_change_of_any_field_is_located(
    database: Database,
    folder: Path,
    trail: AuditTrail,
    sequence: int,
    change: tuple[str, Any],
) -> None:
    name, value = change
    column = getattr(AuditRecord, name)
    here = AuditRecord.sequence == sequence
    with database.read() as connection:
        true = connection.scalar(select(column).where(here))
    with attacking(database) as connection:
        connection.execute(update(AuditRecord).where(here).values({name: value}))
    try:
        done = verified(database, folder)
    finally:
        with attacking(database) as connection:
            connection.execute(update(AuditRecord).where(here).values({name: true}))

    if value == true:
        assert done.is_clean
        return
    assert done.first is not None
    assert (done.first.sequence, done.first.damage) == (
        sequence,
        BYTES.get(name, Damage.ALTERED),
    )
    assert done.n_findings == 1
