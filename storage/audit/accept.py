"""Going on after a damage that cannot be undone, or after a backup was put back.

The damages stay in the chain and every verification lists them, as accepted. A record
says who accepted which, and why; it names each with a mark of what was found, so that
damages that come later, at the same place as well, are not covered by it. No
number is used twice: where records are gone, the chain goes on after the last that
anybody knows of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sqlalchemy import Connection, select

from storage.audit import chain
from storage.audit.append import (
    append,
    as_bytes,
    begin_anew,
    entry_of,
    head_of,
)
from storage.audit.chain import GENESIS, Head, Keyring
from storage.audit.event import AuditEvent, detail_text
from storage.audit.findings import Damage, Finding, Verification, mark
from storage.audit.keys import Memory, Seen
from storage.audit.reading import mark_of
from storage.audit.verify import ACCEPT, ACCEPTED
from storage.db.engine import Database
from storage.db.tables import AuditAnchor, AuditRecord, AuditStream
from storage.kernel.errors import Conflict, InvalidParameter

#: Comes first: after a gap a record cannot be checked, and the next one can.
RESUME = "audit.resume"
#: Bytes of the detail; it must hold every finding, or be refused.
DETAIL_BYTES = 16 * 1024


def accept(
    database: Database,
    memory: Memory,
    keys: Keyring,
    found: Verification,
    event: AuditEvent,
    now_us: int,
) -> Head:
    """Record that what `found` names is known, and let the chain go on.

    Parameters
    ----------
    found : Verification
        What is accepted.
    event : AuditEvent
        Who accepts it, and the reason.

    Raises
    ------
    Conflict
        There are more damages than can be named.
    """
    if found.n_findings > len(found.findings):
        raise Conflict(
            f"audit: {found.n_findings} damages are too many to accept one by one"
        )
    with database.write() as connection:
        end, last = _known_end(connection, memory, keys, found.stream, now_us)
        begin_anew(connection, end, keys.own)

        def write(event: AuditEvent) -> Head:
            entry = entry_of(event, now_us, detail_text(event.detail, DETAIL_BYTES))
            return append(
                connection, found.stream, [entry], keys, now_us, lambda _c, _head: False
            )[1]

        resumed = write(replace(event, action=RESUME))
        accepted = [
            one.key
            for one in (
                *found.findings,
                *_of_resuming(connection, last, end, resumed),
            )
        ]
        new = write(replace(event, action=ACCEPT, detail={ACCEPTED: accepted}))
    memory.begin_anew(Seen(new.sequence, new.hash, new.time_us))
    return new


def _of_resuming(
    connection: Connection, last: tuple[int, bytes], end: Head, resumed: Head
) -> Iterator[Finding]:
    """Yield the damages that going on makes: a gap, and a record behind it."""
    sequence, record_hash = last
    if end.sequence > sequence:
        around = mark(end.sequence, record_hash, resumed.hash)
        yield Finding(sequence + 1, Damage.MISSING, "", around)
    as_it_is = mark_of(connection, end.stream, resumed.sequence)
    for damage in (Damage.UNCHECKED, Damage.ALTERED):
        yield Finding(resumed.sequence, damage, "", as_it_is)


def _known_end(
    connection: Connection, memory: Memory, keys: Keyring, stream: str, now_us: int
) -> tuple[Head, tuple[int, bytes]]:
    """Return the head to go on after, and number and hash of the last record."""
    row = connection.execute(
        select(AuditStream).where(AuditStream.stream == stream).with_for_update()
    ).first()
    head = Head(stream, 0, GENESIS, 0, GENESIS, now_us)
    if row is not None:
        signer = keys.find(row.key_id)
        found = head_of(row)
        if signer is not None and chain.same(signer.head(found), as_bytes(row.mac)):
            head = found
    last = connection.execute(
        select(AuditRecord.sequence, AuditRecord.hash)
        .where(AuditRecord.stream == stream, AuditRecord.sequence < 1 << 62)
        .order_by(AuditRecord.sequence.desc())
        .limit(1)
    ).first()
    ends = [(head.sequence, head.hash)]
    there = (head.base_sequence, head.base_hash)
    if last is not None:
        there = (last.sequence, as_bytes(last.hash))
        ends.append(there)
    ends += _anchored(connection, keys, stream)
    ends += [(seen.sequence, seen.hash) for seen in _remembered(memory)]
    sequence, record_hash = max(ends, key=lambda end: end[0])
    end = replace(head, sequence=sequence, hash=record_hash, time_us=now_us)
    return end, there


def _anchored(
    connection: Connection, keys: Keyring, stream: str
) -> Iterator[tuple[int, bytes]]:
    """Yield the last point that an anchor signs."""
    anchors = select(AuditAnchor).where(AuditAnchor.stream == stream)
    for anchor in connection.execute(anchors.order_by(AuditAnchor.sequence.desc())):
        record_hash = as_bytes(anchor.hash)
        sealer = keys.find(anchor.key_id)
        if sealer is None:
            continue
        wanted = sealer.anchor(stream, anchor.sequence, record_hash, anchor.time_us)
        if chain.same(wanted, as_bytes(anchor.mac)):
            yield anchor.sequence, record_hash
            return


def _remembered(memory: Memory) -> Iterator[Seen]:
    try:
        seen = memory.read()
        yield from memory.lost()
    except InvalidParameter:
        # Damaged: that is one of the findings.
        return
    if seen is not None:
        yield seen
