"""PDUs and command sets: what is written is read, what is broken is refused."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacs.dimse import command as cmd
from pacs.dimse import pdu
from pacs.dimse.command import Value
from pacs.dimse.pdu import ContextResult, ProposedContext, ProtocolError

UIDS = st.from_regex(r"[0-2](\.[1-9][0-9]{0,5}){1,8}", fullmatch=True)
CONTEXTS = st.lists(
    st.builds(
        ProposedContext,
        st.integers(0, 127).map(lambda n: 2 * n + 1),
        UIDS,
        st.lists(UIDS, min_size=1, max_size=4).map(tuple),
    ),
    max_size=8,
    unique_by=lambda one: one.context_id,
)


def an_rq(contexts: list[ProposedContext] | None = None) -> bytes:
    """Return the body of an A-ASSOCIATE-RQ."""
    whole = pdu.encode_associate_rq(
        called_ae="HUYING",
        calling_ae="TEST",
        contexts=contexts
        if contexts is not None
        else [ProposedContext(1, "1.2.3", ("1.2.4",))],
        max_length=16384,
        roles={"1.2.3": (True, False)},
    )
    return whole[6:]


@settings(deadline=None)
@given(CONTEXTS)
def test_a_request_is_read_as_it_was_written(contexts: list[ProposedContext]) -> None:
    request = pdu.parse_associate_rq(an_rq(contexts))

    assert request.contexts == tuple(contexts)
    assert (request.called_ae, request.calling_ae) == ("HUYING", "TEST")
    assert request.max_length == 16384
    assert request.roles == {"1.2.3": (True, False)}
    assert request.application_context == "1.2.840.10008.3.1.1.1"


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_a_protocol_error(body: bytes) -> None:
    for parse in (pdu.parse_associate_rq, pdu.parse_associate_ac):
        with suppress(ProtocolError):
            parse(body)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_request_is_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(an_rq())
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    with suppress(ProtocolError):
        pdu.parse_associate_rq(bytes(body[:cut]))


def test_an_answer_is_read_as_it_was_written() -> None:
    results = (
        pdu.NegotiatedContext(1, ContextResult.ACCEPTED, "1.2.840.10008.1.2.1"),
        pdu.NegotiatedContext(3, ContextResult.ABSTRACT_SYNTAX, ""),
    )
    whole = pdu.encode_associate_ac(
        an_rq(),
        results,
        max_length=65536,
        roles={"1.2.3": (True, True)},
        extended={"1.2.3": b"\x01"},
        identity_response=b"",
    )

    answer = pdu.parse_associate_ac(whole[6:])

    assert answer.max_length == 65536
    assert answer.roles == {"1.2.3": (True, True)}
    assert [one.result for one in answer.contexts] == [0, 3]
    assert answer.contexts[0].transfer_syntax == "1.2.840.10008.1.2.1"


def test_a_user_identity_shows_no_secret() -> None:
    secret = b"hunter2"
    item = b"\x02\x01" + struct.pack(">H", 4) + b"user" + struct.pack(">H", 7) + secret
    body = an_rq() + pdu.item(0x50, pdu.item(0x58, item))

    identity = pdu.parse_associate_rq(body).user_identity

    assert identity is not None
    assert identity.response_requested
    assert identity.secondary == secret
    assert "hunter2" not in repr(identity)


@pytest.mark.parametrize("size", [0, 1, 2, 9, 10, 11, 4096])
def test_fragments_keep_to_the_length_of_the_peer(size: int) -> None:
    data = bytes(range(256)) * 16
    data = data[:size]

    raw = b"".join(pdu.data_pdus(3, 0, data, 16, last=True))

    seen, at = b"", 0
    while at < len(raw):
        kind, length, pdv_length, context, flags = pdu.PDU_AND_PDV.unpack_from(raw, at)
        assert (kind, context, pdv_length) == (pdu.PduType.DATA, 3, length - 4)
        assert length <= 16
        fragment = raw[at + 12 : at + 6 + length]
        at += 6 + length
        assert bool(flags & pdu.LAST) == (at == len(raw))
        assert at == len(raw) or len(fragment) % 2 == 0
        seen += fragment
    assert seen == data


VALUES = st.fixed_dictionaries(
    {cmd.FIELD: st.integers(0, 0xFFFF)},
    optional={
        cmd.AFFECTED_CLASS: UIDS,
        cmd.MESSAGE_ID: st.integers(0, 0xFFFF),
        cmd.STATUS: st.integers(0, 0xFFFF),
        cmd.MOVE_DESTINATION: st.from_regex(r"[A-Z]{1,16}", fullmatch=True),
        cmd.COMMENT: st.from_regex(r"[a-z]{1,64}", fullmatch=True),
    },
)


@settings(deadline=None)
@given(VALUES)
def test_a_command_is_read_as_it_was_written(values: dict[int, Value]) -> None:
    assert cmd.decode(cmd.encode(values)) == values


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_command_or_a_protocol_error(raw: bytes) -> None:
    with suppress(ProtocolError):
        assert cmd.FIELD in cmd.decode(raw)


def test_a_wrong_group_length_is_noticed() -> None:
    raw = bytearray(cmd.encode({cmd.FIELD: 1}))
    assert cmd.GROUP_LENGTH not in cmd.decode(raw)
    raw[8] += 1
    assert cmd.GROUP_LENGTH in cmd.decode(raw)
