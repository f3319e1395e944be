"""The gate of the web face: who asks, whether he may, and the record of it.

Every request passes here before any route sees it. What the table of rules does not
name, does not exist; what it names is decided by the one policy; what was decided is
in the audit before the first byte of an answer leaves.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import logging
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from anyio import to_thread
from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.client import Clients
from gateway.http.events import event_of, named, with_outcome
from gateway.http.rules import Rule, RuleTable
from gateway.identity.recording import Origin
from gateway.identity.sessions import Login, csrf_of
from pacs.services.permissions import Action
from pacs.services.policy import OPEN_ACTOR, AccessPolicy
from pacs.web.problems import problem, problem_response
from storage.audit import AuditEvent, Outcome
from storage.kernel.errors import (
    ImagingError,
    NotAllowed,
    NotAuthenticated,
    NotFound,
)
from storage.kernel.types import Actor, Role

log = logging.getLogger(__name__)

CSRF_HEADER = b"x-csrf-token"
#: What a page sends along where it asks by itself: that is no use of the session.
BACKGROUND_HEADER = b"x-background"
SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
#: Paths whose clients may use HTTP Basic, where that is switched on.
BASIC_PATHS = ("/dicom-web/", "/wado")
MAX_CREDENTIAL = 1024
OPEN_LOGIN = Login(OPEN_ACTOR, "open")
#: What tells of studies, and changes nothing.
_READING = frozenset((Action.FIND, Action.GET))


class Owners(Protocol):
    """Finds to whom belongs what was answered."""

    def complete(
        self, event: AuditEvent, actor: Actor, names: Mapping[str, str]
    ) -> list[AuditEvent]: ...


class Sessions(Protocol):
    """Finds who has a session or a token."""

    def remembered(
        self, secret: str, *, background: bool
    ) -> tuple[bool, Login | None]: ...
    def find(self, secret: str, *, background: bool) -> Login | None: ...


class BasicLogins(Protocol):
    """Finds who shows a name and a password."""

    def basic(self, name: str, password: str, origin: Origin) -> Login: ...


class Trail(Protocol):
    """The audit trail."""

    def record(self, event: AuditEvent) -> None: ...
    def record_now(self, event: AuditEvent) -> None: ...


@dataclass(frozen=True, slots=True)
class Access:
    """Who makes the present request, and with what.

    Attributes
    ----------
    login : Login or None
        None: nobody has said, on a route for everybody.
    actor : Actor or None
        With the tenants that the route's action may reach.
    cookie : str
        The secret of the session, where it came in a cookie.
    """

    login: Login | None
    actor: Actor | None
    origin: Origin
    cookie: str = ""


#: The access of the request that is being served.
ACCESS: ContextVar[Access] = ContextVar("access")


def access() -> Access:
    """Return the access of the present request."""
    return ACCESS.get()


def acting() -> Actor:
    """Return who makes the present request.

    Raises
    ------
    NotAuthenticated
        Nobody has said.
    """
    actor = ACCESS.get().actor
    if actor is None:
        raise NotAuthenticated("log in first")
    return actor


@dataclass(frozen=True, slots=True)
class _Credential:
    """What a request shows, unproven."""

    secret: str = ""
    is_cookie: bool = False
    basic: tuple[str, str] | None = None


class Gate:
    """Let requests through that the policy allows.

    Parameters
    ----------
    app : ASGI application
    rules : RuleTable
    policy : AccessPolicy
    sessions : Sessions
    logins : BasicLogins
    trail : Trail
    owners : Owners
    clients : Clients
        Tells addresses of clients and names of ours.
    cookie : str
        Name of the session's cookie.
    open_access : bool
        Whoever comes without a credential is the open node's user.
    basic : bool
        HTTP Basic is switched on.
    login_page : bytes
        What a browser is shown where a login is missing.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        rules: RuleTable,
        policy: AccessPolicy,
        sessions: Sessions,
        logins: BasicLogins,
        trail: Trail,
        owners: Owners,
        clients: Clients,
        cookie: str,
        open_access: bool,
        basic: bool,
        login_page: Response,
    ) -> None:
        self._app = app
        self._rules = rules
        self._policy = policy
        self._sessions = sessions
        self._logins = logins
        self._trail = trail
        self._owners = owners
        self._clients = clients
        self._cookie = cookie.encode() + b"="
        self._open = open_access
        self._basic = basic
        self._login_page = login_page
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        headers = _headers(scope)
        origin = Origin(
            self._clients.address(scope, headers),
            "web",
            f"{self._prefix}{next(self._numbers):x}",
        )
        rule, names = self._rules.match(method, path)
        login: Login | None = None
        credential = _Credential()
        try:
            try:
                credential = self._credential(headers)
                login = await self._authenticate(credential, scope, headers, origin)
            except NotAuthenticated:
                # An open node takes whoever comes, with whatever he shows.
                if not self._open:
                    raise
                login = OPEN_LOGIN
            if rule is None:
                self._no_such_route(login, method, path)
            if rule is None or rule.action is None:
                actor = None if login is None else login.actor
            else:
                if login is None:
                    raise NotAuthenticated("log in first")
                if login.session is not None and method not in SAFE:
                    self._check_origin(headers, credential)
                actor = self._decide(login, rule)
        except ImagingError as error:
            await self._refuse(error, login, rule, names, scope, headers, origin, send)
            return
        except _NoSuchMethod as error:
            allowed = ", ".join(sorted(error.allowed))
            answer = problem(405, "http.405", headers={"Allow": allowed})
            await answer(scope, receive, send)
            return
        cookie = credential.secret if credential.is_cookie and login else ""
        token = ACCESS.set(Access(login, actor, origin, cookie))
        try:
            told = rule is not None and (rule.audited or method not in SAFE)
            if rule is None or rule.action is None or actor is None or not told:
                await self._app(scope, receive, send)
                return
            names = named(rule, names, scope)
            recording = _Recording(self, send, actor, rule, names, scope, origin)
            if await recording.begin():
                await self._app(scope, receive, recording.send)
        finally:
            ACCESS.reset(token)

    def _credential(self, headers: Mapping[bytes, bytes]) -> _Credential:
        """Read what a request shows; what is explicit goes before the cookie."""
        given = headers.get(b"authorization")
        if given is not None:
            scheme, _, value = given.decode("latin-1").partition(" ")
            value = value.strip()
            if len(value) > MAX_CREDENTIAL:
                raise NotAuthenticated("the credential is too long")
            if scheme.lower() == "bearer":
                return _Credential(value)
            if scheme.lower() == "basic" and self._basic:
                return _Credential(basic=_decoded(value))
            raise NotAuthenticated("authorization by Bearer token only")
        for part in headers.get(b"cookie", b"").split(b";"):
            one = part.strip()
            if one.startswith(self._cookie) and len(one) < MAX_CREDENTIAL:
                secret = one[len(self._cookie) :].decode("latin-1")
                return _Credential(secret, is_cookie=True)
        return _Credential()

    async def _authenticate(
        self,
        credential: _Credential,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        origin: Origin,
    ) -> Login | None:
        if credential.basic is not None:
            if not scope["path"].startswith(BASIC_PATHS):
                raise NotAuthenticated("HTTP Basic is for DICOMweb only")
            if not self._clients.is_private(scope, headers):
                raise NotAuthenticated("HTTP Basic needs TLS")
            return await to_thread.run_sync(
                self._logins.basic, *credential.basic, origin
            )
        if credential.secret:
            secret, background = credential.secret, BACKGROUND_HEADER in headers
            known, login = self._sessions.remembered(secret, background=background)
            if not known:
                find = partial(self._sessions.find, secret, background=background)
                login = await to_thread.run_sync(find)
            if login is not None:
                return login
            if not credential.is_cookie and scope["path"] != "/metrics":
                raise NotAuthenticated("the token is not good, or no longer")
        return OPEN_LOGIN if self._open else None

    def _no_such_route(self, login: Login | None, method: str, path: str) -> None:
        """Answer for a path without a rule; nobody else learns which there are."""
        if login is None:
            raise NotAuthenticated("log in first")
        allowed = self._rules.methods(path)
        if allowed and method not in allowed:
            raise _NoSuchMethod(allowed)
        raise NotFound("no such page")

    def _check_origin(
        self, headers: Mapping[bytes, bytes], credential: _Credential
    ) -> None:
        """Refuse what another site's page made a browser send with our cookie."""
        if not credential.is_cookie:
            return
        if not self._clients.is_same_origin(headers):
            raise NotAllowed("requests of other sites are not accepted")
        given = headers.get(CSRF_HEADER, b"").decode("latin-1")
        if not secrets.compare_digest(
            given.encode(), csrf_of(credential.secret).encode()
        ):
            raise NotAllowed("the header X-CSRF-Token is missing or wrong")

    def _decide(self, login: Login, rule: Rule) -> Actor:
        if rule.action is None:
            return login.actor
        decision = self._policy.decide(login.actor, rule.action)
        if not decision.allowed:
            if Role.PENDING in login.actor.roles:
                raise NotAuthenticated(str(decision.reason))
            raise NotAllowed(f"{rule.action} is not allowed: {decision.reason}")
        return self._policy.acting(login.actor, rule.action)

    async def _refuse(
        self,
        error: ImagingError,
        login: Login | None,
        rule: Rule | None,
        names: Mapping[str, str],
        scope: Scope,
        headers: Mapping[bytes, bytes],
        origin: Origin,
        send: Send,
    ) -> None:
        """Answer somebody who is not let through; record it where somebody is known."""
        answer = problem_response(error)
        missing = isinstance(error, NotAuthenticated)
        if missing and self._basic and scope["path"].startswith(BASIC_PATHS):
            answer.headers.append("WWW-Authenticate", 'Basic realm="DICOMweb"')
        if missing and scope["method"] == "GET" and is_navigation(headers):
            answer = self._login_page
        # What a page asks for again and again, and is not told, is no news.
        told = rule is not None and (rule.audited or scope["method"] not in SAFE)
        if told and login is not None and rule is not None and rule.action is not None:
            names = named(rule, names, scope)
            event = event_of(login.actor, rule, names, scope, origin)
            event = with_outcome(event, answer.status_code, str(error))
            try:
                await to_thread.run_sync(self._trail.record_now, event)
            except ImagingError as failure:
                answer = problem_response(failure)
        await answer(scope, _nothing, send)

    async def record(self, event: AuditEvent, method: str) -> None:
        """Record what has been decided, before it is answered."""
        if event.outcome is Outcome.ALLOW and method in SAFE:
            self._trail.record(event)
        else:
            await to_thread.run_sync(self._trail.record_now, event)

    async def records_of_answer(
        self, event: AuditEvent, actor: Actor, rule: Rule, names: Mapping[str, str]
    ) -> list[AuditEvent]:
        """Return the records of an answer: for each tenant that it concerns."""
        is_whole = "study" in names or not names.keys() & {"series", "instance"}
        if (
            event.outcome is not Outcome.ALLOW
            or rule.action not in _READING
            or (is_whole and len(actor.tenants) == 1)
        ):
            return [event]
        return await to_thread.run_sync(self._owners.complete, event, actor, names)


class _Recording:
    """Sends an answer once it is in the audit; 503 where it cannot be.

    What changes something is recorded before it begins, and once more where it was
    refused or failed. Of what a service records itself, only the latter is recorded.
    """

    def __init__(
        self,
        gate: Gate,
        send: Send,
        actor: Actor,
        rule: Rule,
        names: Mapping[str, str],
        scope: Scope,
        origin: Origin,
    ) -> None:
        self._gate = gate
        self._send = send
        self._what = (actor, rule, names, scope, origin)
        self._is_refused = False
        changes = scope["method"] not in SAFE and rule.action not in _READING
        self._is_intended = changes and rule.audited
        self._only_failures = changes

    async def begin(self) -> bool:
        """Record what is about to be changed; False: 503, as it cannot be."""
        if not self._is_intended:
            return True
        scope = self._what[3]
        try:
            await self._gate.record(event_of(*self._what), scope["method"])
        except ImagingError as error:
            await problem_response(error)(scope, _nothing, self._send)
            return False
        return True

    async def send(self, message: Message) -> None:
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            scope, origin = self._what[3:]
            try:
                await self._record(message["status"], scope["method"])
            except ImagingError as error:
                self._is_refused = True
                await problem_response(error)(scope, _nothing, self._send)
                return
            request_id = (b"x-request-id", origin.request_id.encode())
            message["headers"] = [*message.get("headers", ()), request_id]
        await self._send(message)

    async def _record(self, status: int, method: str) -> None:
        event = with_outcome(event_of(*self._what), status, "")
        if event.outcome is Outcome.ALLOW and self._only_failures:
            return
        actor, rule, names, *_ = self._what
        for one in await self._gate.records_of_answer(event, actor, rule, names):
            await self._gate.record(one, method)


class _NoSuchMethod(Exception):
    def __init__(self, allowed: frozenset[str]) -> None:
        super().__init__()
        self.allowed = allowed


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """Return the headers by name; of those that come twice, the first."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, value)
    return found


def _decoded(value: str) -> tuple[str, str]:
    """Return name and password of HTTP Basic (RFC 7617)."""
    try:
        text = base64.b64decode(value, validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise NotAuthenticated("the credential is malformed") from error
    name, colon, password = text.partition(":")
    if not colon:
        raise NotAuthenticated("the credential is malformed")
    return name, password


def is_navigation(headers: Mapping[bytes, bytes]) -> bool:
    """Tell whether a browser asks for a page to show, not a script for data."""
    mode = headers.get(b"sec-fetch-mode")
    if mode is not None:
        return mode == b"navigate"
    return headers.get(b"accept", b"").startswith(b"text/html")


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}
