"""Which contexts are proposed, which is taken, and how sub-operations are counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from pacs.dimse.client import Offer, propose
from pacs.dimse.deliver import fate_of
from pacs.dimse.send import (
    NO_CONTEXT,
    UNREADABLE,
    Sendable,
    SourceFailed,
    Tally,
    by_class,
    choose,
    plan,
    send_all,
)
from pacs.domain.study import ByteStream
from pacs.imaging.syntaxes import EXPLICIT_VR_LE, IMPLICIT_VR_LE
from pacs.services.forwarding import Fate
from storage.kernel.errors import CorruptData

JPEG = "1.2.840.10008.1.2.4.70"
HTJ2K = "1.2.840.10008.1.2.4.201"


@dataclass(frozen=True)
class Instance:
    sop_instance_uid: str
    sop_class_uid: str = "1.2.840.10008.5.1.4.1.1.2"
    transfer_syntax_uid: str = EXPLICIT_VR_LE


@dataclass
class MemorySource:
    """Instances whose data set is their UID; some cannot be read."""

    unreadable: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    read: list[str] = field(default_factory=list)

    def can_send_as(self, instance: Instance, transfer_syntax_uid: str) -> bool:
        return transfer_syntax_uid in {EXPLICIT_VR_LE, IMPLICIT_VR_LE}

    def dataset(self, instance: Instance, transfer_syntax_uid: str) -> ByteStream:
        uid = instance.sop_instance_uid
        self.read.append(uid)
        if uid in self.unreadable:
            raise CorruptData("bit rot")
        return ByteStream(len(uid), self._chunks(uid), transfer_syntax_uid)

    def _chunks(self, uid: str) -> Iterator[bytes]:
        yield uid.encode()
        if uid in self.broken:
            raise CorruptData("bit rot")


@dataclass
class MemoryChannel:
    """Takes everything, and remembers what was read when it did."""

    source: MemorySource
    offers: Sequence[Offer]
    log: list[tuple[str, str, int]] = field(default_factory=list)

    def begin(self, instance: Sendable, chunks: Iterable[bytes], offer: Offer) -> int:
        data = b"".join(chunks)
        assert data == instance.sop_instance_uid.encode()
        self.log.append((data.decode(), offer.transfer_syntax, 0))
        return len(self.log)

    def finish(self, message_id: int) -> int:
        uid, syntax, _ = self.log[-1]
        self.log[-1] = (uid, syntax, len(self.source.read))
        return 0x0000


def offers(*syntaxes: str, class_uid: str = Instance("").sop_class_uid) -> list[Offer]:
    return [Offer(2 * i + 1, class_uid, uid) for i, uid in enumerate(syntaxes)]


@pytest.mark.parametrize(
    ("stored", "accepted", "chosen"),
    [
        (JPEG, (EXPLICIT_VR_LE, JPEG), JPEG),
        (JPEG, (IMPLICIT_VR_LE, EXPLICIT_VR_LE), EXPLICIT_VR_LE),
        (JPEG, (IMPLICIT_VR_LE,), IMPLICIT_VR_LE),
        (EXPLICIT_VR_LE, (HTJ2K, IMPLICIT_VR_LE), IMPLICIT_VR_LE),
        (JPEG, (HTJ2K,), None),
        (JPEG, (), None),
    ],
)
def test_the_stored_syntax_comes_first_then_native_ones(
    stored: str, accepted: tuple[str, ...], chosen: str | None
) -> None:
    instance = Instance("1", transfer_syntax_uid=stored)

    found = choose(MemorySource(), instance, by_class(offers(*accepted)))

    assert (found.transfer_syntax if found else None) == chosen


def test_only_who_takes_nothing_native_gets_it_encoded() -> None:
    @dataclass
    class Encoding(MemorySource):
        def can_send_as(self, instance: Instance, transfer_syntax_uid: str) -> bool:
            return True

    native = Instance("1")
    for accepted, chosen in (
        ((HTJ2K, IMPLICIT_VR_LE), IMPLICIT_VR_LE),
        ((HTJ2K, JPEG), HTJ2K),
    ):
        found = choose(Encoding(), native, by_class(offers(*accepted)))
        assert found is not None
        assert found.transfer_syntax == chosen


def test_each_class_has_a_context_for_each_stored_syntax_and_the_fallbacks() -> None:
    instances = [
        Instance("1", "1.1", JPEG),
        Instance("2", "1.2", EXPLICIT_VR_LE),
        Instance("3", "1.1", HTJ2K),
        Instance("4", "1.1", JPEG),
    ]

    [(group, contexts)] = plan(instances)

    assert group == instances
    assert contexts == [
        ("1.1", (JPEG,)),
        ("1.1", (HTJ2K,)),
        ("1.1", (EXPLICIT_VR_LE,)),
        ("1.1", (IMPLICIT_VR_LE,)),
        ("1.2", (EXPLICIT_VR_LE,)),
        ("1.2", (IMPLICIT_VR_LE,)),
    ]


def test_what_needs_more_than_128_contexts_takes_several_associations() -> None:
    instances = [Instance(str(i), f"1.{i}", JPEG) for i in range(100)]

    planned = list(plan(instances))

    assert [one for group, _ in planned for one in group] == instances
    assert [len(propose(contexts)) for _, contexts in planned] == [126, 126, 48]


def test_a_class_in_very_many_syntaxes_keeps_its_fallbacks() -> None:
    instances = [Instance(str(i), "1.1", f"1.2.{i}") for i in range(300)]

    [(group, contexts)] = plan(instances)

    assert len(group) == 300
    assert len(propose(contexts)) == 128
    assert contexts[-2:] == [("1.1", (EXPLICIT_VR_LE,)), ("1.1", (IMPLICIT_VR_LE,))]


def send(
    source: MemorySource, instances: Sequence[Instance], *, most: int = 100
) -> tuple[MemoryChannel, list[tuple[str, int | None, str]], deque[Instance]]:
    channel = MemoryChannel(source, offers(EXPLICIT_VR_LE))
    ended: list[tuple[str, int | None, str]] = []
    pending = deque(instances)
    send_all(
        source,
        channel,
        pending,
        done=lambda one, status, why: ended.append((one.sop_instance_uid, status, why)),
        proceed=lambda: len(ended) < most,
    )
    return channel, ended, pending


def test_the_next_instance_is_read_while_the_peer_stores_one() -> None:
    channel, _, _ = send(MemorySource(), [Instance(uid) for uid in "abc"])

    assert [(uid, n_read) for uid, _, n_read in channel.log] == [
        ("a", 2), ("b", 3), ("c", 3),
    ]  # fmt: skip


def test_what_cannot_be_sent_does_not_hold_up_the_rest() -> None:
    instances = [
        Instance("a"),
        Instance("b", sop_class_uid="9.9"),
        Instance("c"),
        Instance("d"),
        Instance("e", sop_class_uid="9.9"),
    ]

    _, ended, pending = send(MemorySource(unreadable={"c"}), instances)

    assert ended == [
        ("a", 0, ""), ("b", None, NO_CONTEXT), ("c", None, UNREADABLE), ("d", 0, ""),
        ("e", None, NO_CONTEXT),
    ]  # fmt: skip
    assert not pending


def test_stopping_leaves_the_rest_untried() -> None:
    _, ended, pending = send(MemorySource(), [Instance(c) for c in "abcd"], most=2)

    assert [uid for uid, _, _ in ended] == ["a", "b"]
    assert [one.sop_instance_uid for one in pending] == ["c", "d"]


def test_a_source_that_fails_inside_an_instance_is_told_from_a_peer_that_does() -> None:
    with pytest.raises(SourceFailed):
        send(MemorySource(broken={"b"}), [Instance(c) for c in "abc"])


def test_the_counts_always_add_up() -> None:
    tally = Tally(5)
    statuses = [0x0000, 0xB000, 0xA700, None]
    for number, status in enumerate(statuses, 1):
        tally.count(Instance(str(number)), status, "" if status is not None else "why")
        whole = tally.completed + tally.failed + tally.warning + tally.remaining
        assert (whole, tally.remaining) == (5, 5 - number)

    assert tally.failed_uids == ["3", "4"]
    assert tally.reason == "C-STORE status A700"


@pytest.mark.parametrize(
    ("total", "statuses", "cancelled", "final"),
    [
        (0, [], False, 0x0000),
        (2, [0x0000, 0x0000], False, 0x0000),
        (2, [0x0000, 0xB000], False, 0xB000),
        (2, [0x0000, 0xA700], False, 0xB000),
        (2, [0xA700, 0xC000], False, 0xA702),
        (3, [0x0000], True, 0xFE00),
    ],
)
def test_the_final_status_says_how_it_went(
    *,
    total: int,
    statuses: list[int],
    cancelled: bool,
    final: int,
) -> None:
    tally = Tally(total)
    for number, status in enumerate(statuses):
        tally.count(Instance(str(number)), status)

    assert tally.final_status(cancelled=cancelled) == final


@pytest.mark.parametrize(
    ("status", "reason", "fate"),
    [
        (0x0000, "", Fate.STORED),
        (0xB000, "", Fate.NOTED),
        (0xB006, "", Fate.NOTED),
        (0xB007, "", Fate.NOTED),
        (0x0107, "", Fate.NOTED),
        (0xA700, "", Fate.RETRY),
        (0xA7FF, "", Fate.RETRY),
        (0xA900, "", Fate.REFUSED),
        (0xC000, "", Fate.REFUSED),
        (0x0111, "", Fate.REFUSED),
        (0x0124, "", Fate.REFUSED),
        (None, NO_CONTEXT, Fate.REFUSED),
        (None, UNREADABLE, Fate.RETRY),
    ],
)
def test_what_a_status_means_for_the_instance(
    status: int | None, reason: str, fate: Fate
) -> None:
    assert fate_of(status, reason) is fate
