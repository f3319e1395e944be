"""Keeping the tokens of machines: who may, is the policy's to say; all is audited."""

from __future__ import annotations

import builtins

from gateway.identity import grants
from gateway.identity import repository as rows
from gateway.identity.grants import TokenRow
from gateway.identity.recording import Origin, Recorder, Transaction
from gateway.identity.rules import (
    account_name,
    digest_of,
    new_secret,
    roles_of,
    tenant_name,
)
from gateway.identity.services import MAX_LISTED, TAKEN, NewAccount, taken
from gateway.identity.sessions import DAY_US, SessionService, end_all_in
from pacs.services.permissions import Action, Kind
from pacs.services.policy import AccessPolicy, Resource
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import Conflict, InvalidParameter, NotFound, TooLarge
from storage.kernel.settings import Identity
from storage.kernel.types import Actor, Role

MAX_TOKENS = 10_000
#: Begins every token, so that one that leaks can be found in logs and sources.
TOKEN_PREFIX = "hyt_"  # noqa: S105  # no secret


class TokenService:
    """Make, list and revoke tokens; parameters as `AccountService`."""

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        settings: Identity,
        policy: AccessPolicy,
        sessions: SessionService,
        recorder: Recorder,
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._policy = policy
        self._sessions = sessions
        self._recorder = recorder

    def add(
        self,
        actor: Actor,
        wanted: NewAccount,
        origin: Origin,
        *,
        days: float | None = None,
    ) -> str:
        """Make a token; return it. It is shown this once: only its digest is kept.

        Raises
        ------
        InvalidParameter
        Conflict
            The name is taken; those of revoked tokens stay so.
        """
        name, tenant = account_name(wanted.name), tenant_name(wanted.tenant)
        roles = roles_of(wanted.roles)
        if roles & {Role.PATIENT, Role.SECURITY_ADMINISTRATOR}:
            raise InvalidParameter("roles", "not for a machine")
        readable = {tenant_name(one) for one in wanted.readable} - {tenant}
        most = self._settings.token_days
        span = most if days is None else days
        if not 0 < span <= most:
            raise InvalidParameter("days", f"more than 0, at most {most:g}")
        secret, now_us = TOKEN_PREFIX + new_secret(), self._clock.now_us()
        values = rows.account_values(readable=readable, roles=roles)
        with taken(), self._recorder.transaction() as made:
            connection = made.connection
            for one in (tenant, *readable):
                resource = Resource(Kind.TOKEN, one)
                self._policy.require(actor, Action.KEEP_TOKENS, resource)
            if grants.find_token(connection, name=name) is not None:
                raise Conflict(TAKEN)
            if grants.count_tokens(connection) >= MAX_TOKENS:
                raise TooLarge("tokens", MAX_TOKENS)
            for one in (tenant, *readable):
                rows.add_tenant(connection, one, now_us)
            grants.add_token(
                connection,
                digest=digest_of(secret),
                name=name,
                tenant=tenant,
                created_by=actor.name,
                created_us=now_us,
                expires_us=now_us + int(span * DAY_US),
                **values,
            )
            self._record(made, actor, "token.add", name, origin, sorted(roles))
        return secret

    def list(self, actor: Actor) -> list[TokenRow]:
        """Return the tokens of the actor's tenants, revoked ones too."""
        self._policy.require(actor, Action.KEEP_TOKENS)
        tenants = None if Role.SYSTEM in actor.roles else actor.tenants
        with self._database.read() as connection:
            return grants.list_tokens(connection, tenants, MAX_LISTED)

    def revoke(self, actor: Actor, name: str, origin: Origin) -> None:
        """End a token, and what its tickets have opened."""
        with self._recorder.transaction() as made:
            connection = made.connection
            self._policy.require(actor, Action.KEEP_TOKENS)
            token = grants.find_token(connection, name=name.strip().lower())
            resource = None if token is None else Resource(Kind.TOKEN, token.tenant)
            if (
                token is None
                or not self._policy.decide(actor, Action.KEEP_TOKENS, resource).allowed
            ):
                raise NotFound("no such token")
            grants.revoke_token(connection, token.id, self._clock.now_us())
            end_all_in(connection, token_pk=token.id)
            roles = [role.value for role in sorted(token.roles)]
            self._record(made, actor, "token.revoke", token.name, origin, roles)
        self._sessions.forget()

    def _record(
        self,
        within: Transaction,
        actor: Actor,
        action: str,
        name: str,
        origin: Origin,
        roles: builtins.list[str],
    ) -> None:
        self._recorder.record(
            actor,
            action,
            origin,
            object_kind="token",
            object_id=name,
            detail={"roles": roles},
            within=within,
        )
