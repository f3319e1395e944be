"""The web face of a node: every router, the errors, the middleware."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ExceptionHandler

from gateway.http.access import Gate
from gateway.http.middleware import LoopbackOnly, Timing
from pacs.web.problems import problem_response
from storage.kernel.errors import ImagingError, InvalidParameter

log = logging.getLogger(__name__)


def build(
    *,
    routers: Iterable[tuple[str, APIRouter]],
    dependencies: Mapping[Callable[..., Any], Callable[..., Any]],
    version: str,
    open_access: bool,
    gate: Mapping[str, Any],
    allowed_hosts: tuple[str, ...] = (),
) -> FastAPI:
    """Return the ASGI application.

    Parameters
    ----------
    routers : iterable of (prefix, router)
        Asked in this order.
    dependencies : mapping
        Declared dependency to what replaces it.
    open_access : bool
        No logins: pages of other sites are kept away instead.
    gate : mapping
        Arguments of `gateway.http.access.Gate`.
    """
    app = FastAPI(
        title="Huying",
        version=version,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for prefix, router in routers:
        app.include_router(router, prefix=prefix)
    app.dependency_overrides.update(dependencies)
    handle_errors(app)
    app.add_middleware(Gate, **gate)
    if open_access:
        app.add_middleware(LoopbackOnly, allowed_hosts=allowed_hosts)
    app.add_middleware(Timing)
    return app


def handle_errors(app: FastAPI) -> None:
    """Answer errors as problems; log once what broke off or nobody expected."""
    handlers: Mapping[type[Exception], ExceptionHandler] = {
        ImagingError: _ours,
        RequestValidationError: _malformed,
        HTTPException: _plain,
        ClientDisconnect: _left,
        Exception: _unforeseen,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    logging.getLogger("uvicorn.error").addFilter(_is_untold)


def _ours(_request: Request, error: Exception) -> Response:
    return problem_response(error)


def _malformed(_request: Request, error: Exception) -> Response:
    """Answer 400 where the framework says 422: the request itself is wrong."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "request"
    return problem_response(InvalidParameter(name, str(first["msg"])))


def _plain(_request: Request, error: Exception) -> Response:
    return problem_response(error)


def _left(_request: Request, _error: Exception) -> Response:
    """Answer a client that left before its body was here; nobody reads it."""
    return problem_response(InvalidParameter("body", "cut off"))


def _unforeseen(request: Request, error: Exception) -> Response:
    """Log what nobody expected, once; answer 500 if nothing was answered yet."""
    error.told = True  # type: ignore[attr-defined]
    route = getattr(request.scope.get("route"), "path", "none")
    found: BaseException = error
    if isinstance(error, RuntimeError) and "already started" in str(error):
        # The framework only says that it came when the answer had begun.
        found = error.__cause__ or error
    if isinstance(found, ImagingError):
        log.warning(
            "an answer broke off: %s",
            found,
            extra={"event": "http.broken_off", "code": found.code, "route": route},
        )
    else:
        log.error(
            "request failed",
            exc_info=found,
            extra={"event": "http.failed", "route": route},
        )
    return problem_response(error)


def _is_untold(record: logging.LogRecord) -> bool:
    """Leave out what the server logs once more on its way up."""
    error = record.exc_info[1] if record.exc_info else None
    return not getattr(error, "told", False)
