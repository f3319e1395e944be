"""``/healthz``, ``/readyz`` and ``/metrics``: what operators and balancers ask."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Request, Response

from gateway import metrics
from storage.kernel.errors import ImagingError, NotAuthenticated

router = APIRouter(tags=["operation"])

#: One look at the parts serves everybody who asks within this time.
REUSE_SECONDS = 1.0


@dataclass(slots=True)
class Readiness:
    """Whether the node can store and read.

    Attributes
    ----------
    required, degrading : mapping of name to callable
        Each raises an `ImagingError` while its part does not work. Without a
        required part the node is not ready; without a degrading one (a remote
        object store, which only old studies need) it works on.
    facts : mapping of str to str
        What the answer says beside: version, sync policy.
    """

    required: Mapping[str, Callable[[], None]]
    degrading: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _looked: float = -REUSE_SECONDS
    _answer: tuple[bool, dict[str, object]] = (False, {})

    def look(self) -> tuple[bool, dict[str, object]]:
        """Return readiness and the body that explains it."""
        with self._lock:
            if time.monotonic() - self._looked >= REUSE_SECONDS:
                self._answer = self._examine()
                self._looked = time.monotonic()
            return self._answer

    def _examine(self) -> tuple[bool, dict[str, object]]:
        parts: dict[str, str] = {}
        ready = degraded = False
        for name, check in self.required.items():
            parts[name] = _state(check)
        ready = all(state == "ok" for state in parts.values())
        for name, check in self.degrading.items():
            parts[name] = _state(check)
            degraded |= parts[name] != "ok"
        status = "not ready" if not ready else "degraded" if degraded else "ready"
        return ready, {"status": status, "parts": parts, **self.facts}


def _state(check: Callable[[], None]) -> str:
    try:
        check()
    except ImagingError as error:
        return str(error)
    return "ok"


async def readiness() -> Readiness:
    """Return what looks at the node. The application replaces this dependency."""
    raise NotImplementedError


async def metrics_token() -> str:
    """Return the token of ``/metrics``. The application replaces this dependency."""
    raise NotImplementedError


@router.get("/healthz")
async def healthz() -> Response:
    """Say that this process answers."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.get("/readyz")
def readyz(looking: Annotated[Readiness, Depends(readiness)]) -> Response:
    """Say whether the node can store and read; 503 when it cannot."""
    ready, body = looking.look()
    return Response(
        orjson.dumps(body),
        status_code=200 if ready else 503,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


@router.get("/metrics")
def read_metrics(
    request: Request, token: Annotated[str, Depends(metrics_token)]
) -> Response:
    """Give Prometheus the values of all processes, for the right token."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not token or not hmac.compare_digest(given.encode(), token.encode()):
        raise NotAuthenticated("metrics need the token of http.metrics_token")
    return Response(
        metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
