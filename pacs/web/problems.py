"""One table from exception class to HTTP answer (RFC 9457, PS3.18 8.5).

STOW-RS reports instances one by one; the reasons it gives for each are the second
table (PS3.18 Annex I.2, PS3.4 B.2.3).
"""

from __future__ import annotations

from http import HTTPStatus

import orjson
from fastapi import Response
from starlette.exceptions import HTTPException

from pacs.rendering.volume import NotAVolume
from storage.kernel.errors import (
    Conflict,
    CorruptData,
    DuplicateInstance,
    Gone,
    IdentityMismatch,
    ImagingError,
    InvalidInput,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    StorageFull,
    TooLarge,
    TooManyAttempts,
    Unavailable,
    Unsupported,
    UnsupportedSopClass,
    UnsupportedTransferSyntax,
)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5

#: The first class that matches wins.
_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (NotAVolume, 422),
    (Unsupported, 406),
    (TooLarge, 413),
    (InvalidInput, 400),
    (Gone, 410),
    (NotFound, 404),
    (Conflict, 409),
    (NotAuthenticated, 401),
    (TooManyAttempts, 429),
    (NotAllowed, 403),
    (StorageFull, 507),
    (CorruptData, 500),
    (Unavailable, 503),
)

#: Failure Reason (0008,1197) of an instance; the first class that matches wins.
_REASONS: tuple[tuple[type[ImagingError], int], ...] = (
    (DuplicateInstance, 0x0111),
    (UnsupportedSopClass, 0x0122),
    (UnsupportedTransferSyntax, 0xC122),
    (IdentityMismatch, 0xA900),
    (TooLarge, 0xA700),
    (InvalidInput, 0xC000),
    (NotAllowed, 0x0124),
    (Unavailable, 0xA700),
)
PROCESSING_FAILURE = 0x0110


def failure_reason(error: ImagingError) -> int:
    """Return the Failure Reason that tells why an instance was not stored."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return PROCESSING_FAILURE


def problem(
    status: int, code: str, detail: str = "", headers: dict[str, str] | None = None
) -> Response:
    """Return a problem body.

    Parameters
    ----------
    code : str
        Stable; clients branch on it.
    detail : str
        One sentence without patient data.
    """
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    body = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "code": code,
        "detail": detail or title,
    }
    named = {"Cache-Control": "no-store", **(headers or {})}
    return Response(orjson.dumps(body), status, named, media_type=MEDIA_TYPE)


def problem_response(error: Exception) -> Response:
    """Answer `error`; what is not ours says nothing about itself."""
    if isinstance(error, HTTPException):
        code = f"http.{error.status_code}"
        headers = dict(error.headers or {})
        return problem(error.status_code, code, str(error.detail), headers)
    if not isinstance(error, ImagingError):
        return problem(500, "internal")
    status = next((code for kind, code in _STATUSES if isinstance(error, kind)), 500)
    headers = {}
    if isinstance(error, Unavailable) and status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, TooManyAttempts):
        headers["Retry-After"] = str(error.retry_seconds)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(status, error.code, str(error), headers)
