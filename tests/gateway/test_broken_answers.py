"""What the log says of answers that break off, and of what nobody expected."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from gateway.http.application import handle_errors
from storage.kernel.errors import CorruptData, ImagingError
from tests.support.dicomweb import serving
from tests.support.web import request


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Yield what is logged, by the server as well."""
    found: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler = Kept()
    loggers = [
        logging.getLogger(name)
        for name in ("gateway.http.application", "uvicorn.error")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    yield found
    for logger in loggers:
        logger.removeHandler(handler)


def application(error: Exception, *, begun: bool) -> FastAPI:
    app = FastAPI()
    handle_errors(app)

    def chunks() -> Iterator[bytes]:
        yield b"x" * 1000
        raise error

    @app.get("/things/{thing}")
    def read(thing: str) -> StreamingResponse:
        if not begun:
            raise error
        return StreamingResponse(chunks(), headers={"Content-Length": "2000"})

    return app


@pytest.mark.parametrize(
    ("error", "event", "level"),
    [
        (CorruptData("a pack is damaged"), "http.broken_off", logging.WARNING),
        (ZeroDivisionError("patient"), "http.failed", logging.ERROR),
    ],
)
def test_an_answer_that_breaks_off_is_logged_once_with_its_reason(
    records: list[logging.LogRecord], error: Exception, event: str, level: int
) -> None:
    with (
        serving(application(error, begun=True)) as url,
        pytest.raises((http.client.HTTPException, OSError)),
    ):
        request(f"{url}/things/1")

    (record,) = records
    assert record.levelno == level
    assert vars(record)["event"] == event
    assert vars(record)["route"] == "/things/{thing}"
    if isinstance(error, ImagingError):
        assert "a pack is damaged" in record.getMessage()
        assert vars(record)["code"] == error.code
    else:
        assert record.exc_info is not None
        assert record.exc_info[1] is error


def test_what_nobody_expected_is_logged_once_before_an_answer_too(
    records: list[logging.LogRecord],
) -> None:
    error = ZeroDivisionError("patient")

    with serving(application(error, begun=False)) as url:
        answer = request(f"{url}/things/1")

    assert answer.status == 500
    assert "patient" not in answer.text
    (record,) = records
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_what_the_server_itself_says_is_kept(
    records: list[logging.LogRecord],
) -> None:
    handle_errors(FastAPI())

    logging.getLogger("uvicorn.error").error("a port is taken")

    assert [record.getMessage() for record in records] == ["a port is taken"]
