"""Log lines carry fields, and nothing that a person said."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from gateway import logs
from storage.kernel.errors import NotFound
from storage.kernel.settings import Log


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Yield what is written; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(Log())
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_extra_fields_become_members(written: io.StringIO) -> None:
    logging.getLogger("pacs.test").warning(
        "instance refused", extra={"event": "ingest.refused", "tag": "(0010,0020)"}
    )

    line = json.loads(written.getvalue())
    assert line["event"] == "ingest.refused"
    assert line["message"] == "instance refused"
    assert line["tag"] == "(0010,0020)"
    assert line["level"] == "warning"
    assert line["timestamp"].endswith("Z")


def test_arguments_are_in_the_sentence(written: io.StringIO) -> None:
    logger = logging.getLogger("pacs.test")
    logger.warning("job waits: %s", "no answer", extra={"event": "job.waits"})
    logger.warning("%d packs", 3)

    first, second = map(json.loads, written.getvalue().splitlines())
    assert (first["event"], first["message"]) == ("job.waits", "job waits: no answer")
    assert second["event"] == "3 packs"
    assert "message" not in second


def test_what_a_foreign_exception_says_is_not_written(written: io.StringIO) -> None:
    try:
        raise ValueError("Zhang^San 19620508")
    except ValueError:
        logging.getLogger("pacs.test").exception("request failed")

    assert "Zhang" not in written.getvalue()
    line = json.loads(written.getvalue())
    assert line["exception"] == "ValueError"
    assert "test_logs.py" in line["places"][-1]


def test_what_our_own_errors_say_is_written(written: io.StringIO) -> None:
    try:
        raise NotFound("no such study")
    except NotFound:
        logging.getLogger("pacs.test").exception("request failed")

    assert json.loads(written.getvalue())["exception"] == "NotFound: no such study"
