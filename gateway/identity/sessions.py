"""Who shows a good credential: sessions, tokens, and what they stand for.

Look-ups are remembered for a few seconds, because one page asks for many frames. What
ends here, ends at once in this process, and within `CACHE_SECONDS` in the others.

What a page asks for by itself while nobody is there (`background`) keeps no session
alive: an unattended screen is logged out (compliance A-03).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from gateway.identity import grants
from gateway.identity import repository as rows
from gateway.identity.grants import TicketRow, TokenRow
from gateway.identity.repository import AccountRow, SessionRow
from gateway.identity.rules import digest_of, needs_second_factor, new_secret
from pacs.services.permissions import Action, Kind, Relation
from pacs.services.policy import Resource, purposes, relation_of, relations
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import Unavailable
from storage.kernel.settings import Identity
from storage.kernel.types import Actor, Purpose, Role, Scope, TenantId

CACHE_SECONDS = 3.0
MAX_CACHED = 10_000
#: How exactly the end of unused sessions is known: a part of their time.
TOUCH_PART = 20
DAY_US = 86_400_000_000

PASSWORD = "password"  # noqa: S105  # the name of a duty
SECOND_FACTOR = "second_factor"


@dataclass(frozen=True, slots=True)
class Login:
    """Somebody who has shown a good credential.

    Attributes
    ----------
    kind : str
        ``login``, ``ticket``, ``token``, ``basic`` or ``open``.
    must : tuple of str
        What has to be done before anything else: ``password``, ``second_factor``.
    account_pk, token_pk : int or None
        What it stands on.
    session : SessionRow or None
    """

    actor: Actor
    kind: str
    must: tuple[str, ...] = ()
    account_pk: int | None = None
    token_pk: int | None = None
    session: SessionRow | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    """A look-up that is remembered.

    Attributes
    ----------
    until : float
        On the monotonic clock.
    is_due : bool
        The next use of the session has to be written.
    """

    until: float
    login: Login
    is_due: bool


class SessionService:
    """Open, find and end sessions; find tokens.

    Parameters
    ----------
    database : Database
    clock : Clock
    settings : Identity
    monotonic : callable
        For the cache.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        settings: Identity,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._cache: dict[bytes, _Held] = {}
        self._epoch = 0

    def remembered(
        self, secret: str, *, background: bool = False
    ) -> tuple[bool, Login | None]:
        """Tell whether the answer to `find` is known without asking, and it."""
        held = self._held(digest_of(secret), background=background)
        return held is not None, None if held is None else held.login

    def find(self, secret: str, *, background: bool = False) -> Login | None:
        """Return who has the session or token `secret`; None: nobody any more.

        Parameters
        ----------
        background : bool
            The request is no use of the session, which it does not extend.
        """
        digest = digest_of(secret)
        held = self._held(digest, background=background)
        if held is not None:
            return held.login
        epoch = self._epoch
        found, is_due = self._look_up(digest)
        if found is None:
            return None
        if is_due and not background and found.session is not None:
            with self._database.write() as connection:
                rows.touch_session(connection, found.session.id, self._clock.now_us())
            is_due = False
        self._remember(digest, found, epoch, is_due=is_due)
        return found

    def _held(self, digest: bytes, *, background: bool) -> _Held | None:
        """Return what is remembered, if it is fresh, and serves this request."""
        held = self._cache.get(digest)
        if held is None or held.until <= self._monotonic():
            return None
        # A background request left the session as it was: the next use extends it.
        return None if held.is_due and not background else held

    def _remember(
        self, digest: bytes, found: Login, epoch: int, *, is_due: bool
    ) -> None:
        with self._lock:
            # Order matters: what was read before something ended is not kept.
            if epoch != self._epoch:
                return
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            until = self._monotonic() + CACHE_SECONDS
            self._cache[digest] = _Held(until, found, is_due)

    def forget(self) -> None:
        """Look everybody up anew: somebody's rights have changed."""
        with self._lock:
            self._epoch += 1
            self._cache.clear()

    def _look_up(self, digest: bytes) -> tuple[Login | None, bool]:
        """Return who it is, and whether the use of the session is to be written."""
        now_us = self._clock.now_us()
        with self._database.read() as connection:
            session = rows.find_session(connection, digest)
            if session is None:
                token = grants.find_token(connection, digest=digest)
                return (None if token is None else self._of_token(token, now_us)), False
            if session.is_over(now_us):
                return None, False
            account = token = None
            if session.account_pk is not None:
                account = rows.account_by_pk(connection, session.account_pk)
            if session.token_pk is not None:
                token = grants.find_token(connection, pk=session.token_pk)
        if session.kind == "login":
            found = None if account is None else self.of_account(account, session)
        else:
            found = self.of_ticket(session, account, token, now_us)
        return found, now_us - session.seen_us > session.idle_us / TOUCH_PART

    def of_account(
        self, account: AccountRow, session: SessionRow | None, kind: str = "login"
    ) -> Login | None:
        """Return what an account's owner may do now; None: nothing any more."""
        if not account.is_active:
            return None
        must = self.duties(
            account, second_factor=session is not None and session.second_factor
        )
        actor = actor_of(account)
        if session is not None:
            actor = replace(actor, session=session.public_id)
        if must:
            actor = replace(actor, roles=frozenset({Role.PENDING}), scope=Scope())
        return Login(actor, kind, must, account.id, session=session)

    def duties(self, account: AccountRow, *, second_factor: bool) -> tuple[str, ...]:
        """Return what the owner has to do first, in that order."""
        must = []
        days = self._settings.password_days
        age_us = self._clock.now_us() - account.password_us
        if account.must_change or (days and age_us > days * DAY_US):
            must.append(PASSWORD)
        demanded = self._settings.second_factor
        if not second_factor and needs_second_factor(account.roles, demanded):
            must.append(SECOND_FACTOR)
        return tuple(must)

    @staticmethod
    def _of_token(token: TokenRow, now_us: int) -> Login | None:
        if not token.is_good(now_us):
            return None
        return Login(actor_of_token(token), "token", token_pk=token.id)

    @staticmethod
    def of_ticket(
        session: SessionRow,
        account: AccountRow | None,
        token: TokenRow | None,
        now_us: int,
    ) -> Login | None:
        """Return what whoever used a ticket may see; None: nothing any more."""
        issuer = issuer_of(account, token, now_us)
        if session.scope is None or not may_issue(
            issuer, session.scope, session.purpose
        ):
            return None
        tenants = {key.tenant for key in session.scope.studies}
        tenants |= {key.tenant for key in session.scope.patients}
        actor = Actor(
            TenantId(session.tenant),
            session.actor,
            readable=frozenset(map(TenantId, tenants)),
            roles=frozenset({Role.TICKET}),
            scope=session.scope,
            purpose=Purpose(session.purpose),
            session=session.public_id,
        )
        return Login(actor, "ticket", (), session.account_pk, session.token_pk, session)

    def open(
        self, account: AccountRow, *, address: str, second_factor: bool
    ) -> tuple[str, Login]:
        """Begin a session of an account; return its secret and who it is.

        The oldest ends where the account would have too many.
        """
        secret, now_us = new_secret(), self._clock.now_us()
        with self._database.write() as connection:
            rows.end_old_sessions(connection, now_us)
            held = rows.list_sessions(connection, account.id)
            surplus = len(held) - self._settings.max_sessions + 1
            if surplus > 0:
                rows.end_sessions(connection, pks=[one.id for one in held[:surplus]])
            rows.add_session(
                connection,
                digest=digest_of(secret),
                public_id=secrets.token_hex(8),
                account_pk=account.id,
                kind="login",
                actor=account.name,
                tenant=account.tenant,
                second_factor=int(second_factor),
                address=address[:64],
                created_us=now_us,
                seen_us=now_us,
                idle_us=int(self._settings.idle_minutes * 60e6),
                expires_us=now_us + int(self._settings.session_hours * 3600e6),
            )
            session = rows.find_session(connection, digest_of(secret))
        self.forget()
        login = self.of_account(account, session)
        if login is None:
            raise Unavailable("the account was disabled meanwhile")
        return secret, login

    def for_ticket(self, ticket: TicketRow, *, address: str) -> dict[str, object]:
        """Return the columns of the session a ticket is exchanged for."""
        now_us = self._clock.now_us()
        span = int(self._settings.ticket_minutes * 60e6)
        return {
            "public_id": secrets.token_hex(8),
            "account_pk": ticket.account_pk,
            "token_pk": ticket.token_pk,
            "kind": "ticket",
            "actor": f"ticket:{ticket.issuer}"[:128],
            "tenant": ticket.tenant,
            "purpose": ticket.purpose,
            "scope": rows.scope_text(ticket.scope),
            "address": address[:64],
            "created_us": now_us,
            "seen_us": now_us,
            "idle_us": span // 2,
            "expires_us": now_us + span,
        }

    def end(self, secret: str) -> None:
        """End one session."""
        with self._database.write() as connection:
            rows.end_sessions(connection, digest=digest_of(secret))
        self.forget()

    def end_all(self, account_pk: int) -> None:
        """End every session of an account, its tickets, and what they have opened."""
        with self._database.write() as connection:
            end_all_in(connection, account_pk=account_pk)
        self.forget()


def end_all_in(
    connection: Connection,
    *,
    account_pk: int | None = None,
    token_pk: int | None = None,
) -> None:
    """End what stands on an account or a token: sessions, and tickets that wait.

    In the transaction of the change that takes the rights away; `SessionService.forget`
    follows its commit.
    """
    # Order matters: who is issuing a ticket holds his session, see `TicketService`.
    rows.end_sessions(connection, account_pk=account_pk, token_pk=token_pk)
    grants.withdraw_tickets(connection, account_pk=account_pk, token_pk=token_pk)


def actor_of(account: AccountRow) -> Actor:
    """Return an account as an actor with all its rights."""
    tenant = TenantId(account.tenant)
    if Role.PATIENT in account.roles:
        return Actor(
            tenant,
            account.name,
            readable=frozenset(TenantId(one.tenant) for one in account.patients),
            roles=account.roles,
            scope=Scope(patients=account.patients),
        )
    return Actor(
        tenant,
        account.name,
        readable=_readable(account.roles, account.readable),
        roles=account.roles,
    )


def _readable(roles: frozenset[Role], readable: frozenset[str]) -> frozenset[TenantId]:
    """Return the granted tenants, for roles that reach beyond their own."""
    for action in Action:
        if Relation.GRANTED in relations(roles, action):
            return frozenset(map(TenantId, readable))
    return frozenset()


def actor_of_token(token: TokenRow) -> Actor:
    """Return a token as an actor."""
    return Actor(
        TenantId(token.tenant),
        f"token:{token.name}",
        readable=_readable(token.roles, token.readable),
        roles=token.roles,
    )


def issuer_of(
    account: AccountRow | None, token: TokenRow | None, now_us: int
) -> Actor | None:
    """Return who issued a ticket, with the rights of now; None: he is there no more."""
    if account is not None:
        return actor_of(account) if account.is_active else None
    if token is not None:
        return actor_of_token(token) if token.is_good(now_us) else None
    return None


def may_issue(issuer: Actor | None, scope: Scope, purpose: str) -> bool:
    """Tell whether `issuer` may give out a ticket for all of `scope`, and why."""
    if issuer is None or purpose not in purposes(issuer.roles, Action.TICKET):
        return False
    allowed = relations(issuer.roles, Action.TICKET)
    named = [
        *(Resource(Kind.STUDY, key.tenant, study=key) for key in scope.studies),
        *(Resource(Kind.STUDY, key.tenant, patient=key) for key in scope.patients),
    ]
    return bool(named) and all(
        relation_of(issuer, resource) in allowed for resource in named
    )


def csrf_of(secret: str) -> str:
    """Return what proves that a request comes from a page that knows its session."""
    return hashlib.sha256(f"csrf {secret}".encode()).hexdigest()[:40]
