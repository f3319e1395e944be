"""Free ports of this machine."""

from __future__ import annotations

import random
import socket

#: Below the range that the kernel gives to outgoing connections.
_FIRST, _LAST = 12_000, 22_000


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_port_with_twin(apart: int = 10_000) -> int:
    """Return a port that is free together with the one `apart` above it."""
    choose = random.SystemRandom()
    for _ in range(200):
        port = choose.randint(_FIRST, _LAST)
        if _is_free(port) and _is_free(port + apart):
            return port
    raise RuntimeError(f"no two free ports {apart} apart")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
