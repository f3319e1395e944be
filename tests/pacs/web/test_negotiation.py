"""Choosing media types (PS3.18 8.7, RFC 9110 12.5.1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pacs.web.negotiation import Offer, candidates, choose, parse_accept
from storage.kernel.errors import Unsupported

PARTS = Offer("application/dicom", multipart=True)
SINGLE = Offer("application/dicom")
OCTETS = Offer("application/octet-stream", multipart=True)
JSON = Offer("application/dicom+json")
OFFERS = (PARTS, SINGLE, OCTETS, JSON)


@pytest.mark.parametrize(
    ("accept", "offer"),
    [
        ("", PARTS),
        ("*/*", PARTS),
        ("application/dicom", SINGLE),
        ('multipart/related; type="application/dicom"', PARTS),
        ("multipart/related;type=application/octet-stream", OCTETS),
        ("multipart/related", PARTS),
        ("multipart/*", PARTS),
        ("application/json", JSON),
        ("application/dicom;q=0.1, application/dicom+json;q=0.2", JSON),
        ("*/*;q=0.9, application/dicom+json;q=0.2", PARTS),
        ("*/*, application/dicom+json", JSON),
        ("application/dicom;q=0, */*", PARTS),
        ("text/html, application/xhtml+xml, */*;q=0.8", PARTS),
        ("application/octet-stream", OCTETS),
        ('multipart/related; type="application/dicom; transfer-syntax=*"', PARTS),
        ('multipart/related; type="application/dicom"; transfer-syntax="1,2"', PARTS),
        ("application/dicom;q=nonsense, application/json", JSON),
        ("application/dicom;q=7, application/json", JSON),
    ],
)
def test_the_best_offer_is_chosen(accept: str, offer: Offer) -> None:
    assert choose(accept, OFFERS) == offer


@pytest.mark.parametrize(
    "accept",
    ["text/html", "*/*;q=0", "nonsense", ";;;", "application/dicom;q=0", ","],
)
def test_nothing_acceptable_says_what_there_is(accept: str) -> None:
    with pytest.raises(Unsupported, match="application/dicom"):
        choose(accept, OFFERS)


def test_a_refused_type_leaves_the_others() -> None:
    accept = 'multipart/related; type="application/dicom";q=0, */*;q=0.1'

    assert choose(accept, OFFERS) == SINGLE


def test_transfer_syntaxes_come_in_order_of_preference() -> None:
    accept = (
        'multipart/related; type="application/dicom"; transfer-syntax=1.2;q=0.3, '
        'multipart/related; type="application/dicom"; transfer-syntax="1.3";q=0.5, '
        'multipart/related; type="application/dicom"; transfer-syntax=1.4;q=0.5, '
        'multipart/related; type="application/dicom"; transfer-syntax=1.5;q=0'
    )

    assert candidates(accept, (PARTS,)) == [
        (PARTS, "1.3"), (PARTS, "1.4"), (PARTS, "1.2"),
    ]  # fmt: skip


@given(st.text(max_size=200))
def test_any_text_is_parsed(text: str) -> None:
    for one in parse_accept(text):
        assert 0 <= one.quality <= 1
        assert "/" in one.media_type


def test_a_list_without_end_is_cut() -> None:
    assert len(parse_accept("a/b," * 10_000)) == 64
