"""Logs: JSON lines with the fields of `extra`, and no patient data.

Messages of exceptions that are not ours may quote rows or identifiers, so only their
type and the places they passed are written.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any

import structlog

from storage.kernel.errors import ImagingError
from storage.kernel.settings import Log

#: Innermost frames of a traceback that are written.
MAX_FRAMES = 20


def configure(settings: Log) -> None:
    """Send every log record of this process and its children to standard error."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(ensure_ascii=False)
        if settings.json_lines
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared: list[structlog.typing.Processor] = [
        _keep_sentence,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _process,
        _without_messages,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level)
    # Their INFO lines are one per request or per job, and name what was asked for.
    for name in ("uvicorn", "uvicorn.error", "dbos", "alembic", "httpx", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _keep_sentence(
    _logger: Any, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Keep what the line says, arguments filled in, before `extra` names its event."""
    event["message"] = event.get("event")
    return event


def _process(
    _logger: Any, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Add the process; drop the sentence when the line's event has no other name."""
    record = event.get("_record")
    if record is not None:
        event["pid"] = record.process
    if event.get("message") == event.get("event"):
        event.pop("message", None)
    return event


def _without_messages(
    _logger: Any, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Replace exception information by type and places."""
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    if isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    if not info or info[1] is None:
        return event
    error = info[1]
    said = f": {error}" if isinstance(error, ImagingError) else ""
    event["exception"] = f"{type(error).__qualname__}{said}"
    event["places"] = [
        f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(info[2])[-MAX_FRAMES:]
    ]
    return event
