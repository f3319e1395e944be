"""The login page as an answer: one file, whose own script and style may run alone."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import Response

HTML = "text/html; charset=utf-8"


def login_page(status: int, min_length: int) -> Response:
    """Return the page; 401 where it stands in for another one.

    Parameters
    ----------
    min_length : int
        Of passwords, as the page says before one types one.
    """
    text = (resources.files("gateway.identity.page") / "login.html").read_text("utf-8")
    text = text.replace("{{min_length}}", str(min_length))
    policy = (
        f"default-src 'none'; script-src {_hashes('script', text)};"
        f" style-src {_hashes('style', text)}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(
        text.encode(),
        status_code=status,
        headers={
            "Content-Type": HTML,
            "Content-Language": "zh-CN, en",
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
        },
    )


def _hashes(element: str, text: str) -> str:
    """Return the sources of a policy for the inline elements of a page."""
    found = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digests = (hashlib.sha256(one.encode()).digest() for one in found)
    return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
