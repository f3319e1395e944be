"""Keeping accounts and tokens: who may, is the policy's to say; each change is audited.

Nobody changes the account he acts with: the relation ``self`` is in no cell of these
actions.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError

from gateway.identity import grants
from gateway.identity import repository as rows
from gateway.identity.grants import TokenRow
from gateway.identity.logins import set_password
from gateway.identity.passwords import Passwords
from gateway.identity.recording import Origin, Recorder
from gateway.identity.repository import AccountRow
from gateway.identity.rules import (
    account_name,
    digest_of,
    lock_subjects,
    new_secret,
    one_time_password,
    roles_of,
    tenant_name,
)
from gateway.identity.sessions import DAY_US, SessionService, end_all_in
from pacs.services.permissions import Action, Kind
from pacs.services.policy import AccessPolicy, Resource
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import Conflict, InvalidParameter, NotFound, TooLarge
from storage.kernel.settings import Identity
from storage.kernel.types import Actor, PatientKey, Role

MAX_ACCOUNTS = 1_000_000
MAX_TOKENS = 10_000
MAX_PATIENTS = 32
MAX_LISTED = 1000
MAX_DISPLAY_NAME = 128
#: Begins every token, so that one that leaks can be found in logs and sources.
TOKEN_PREFIX = "hyt_"  # noqa: S105  # no secret


@dataclass(frozen=True, slots=True)
class NewAccount:
    """What an account is made of.

    Attributes
    ----------
    patients : tuple of PatientKey
        Whose studies a patient's account shows.
    """

    name: str
    tenant: str
    roles: tuple[str, ...]
    display_name: str = ""
    readable: tuple[str, ...] = ()
    patients: tuple[PatientKey, ...] = ()


class AccountService:
    """Make, change and list accounts.

    Parameters
    ----------
    database : Database
    clock : Clock
    settings : Identity
    policy : AccessPolicy
    passwords : Passwords
    sessions : SessionService
    recorder : Recorder
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        settings: Identity,
        policy: AccessPolicy,
        passwords: Passwords,
        sessions: SessionService,
        recorder: Recorder,
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._policy = policy
        self._passwords = passwords
        self._sessions = sessions
        self._recorder = recorder

    def is_empty(self) -> bool:
        """Tell whether there is no account at all."""
        with self._database.read() as connection:
            return rows.count_accounts(connection) == 0

    def add(
        self, actor: Actor, wanted: NewAccount, origin: Origin, *, first: bool = False
    ) -> str:
        """Make an account; return the password to log in with once.

        Parameters
        ----------
        first : bool
            Only where there is no account yet (`huying init`).

        Raises
        ------
        InvalidParameter
        Conflict
            The name is taken, or it would not be the first.
        """
        name, tenant = account_name(wanted.name), tenant_name(wanted.tenant)
        roles = roles_of(wanted.roles)
        patients = _patients(roles, wanted.patients)
        readable = {tenant_name(one) for one in wanted.readable} - {tenant}
        display = _display_name(wanted.display_name)
        for action in (Action.KEEP_ACCOUNTS, Action.GRANT):
            for one in (tenant, *readable, *(key.tenant for key in patients)):
                self._policy.require(actor, action, Resource(Kind.ACCOUNT, one, name))
        password = one_time_password()
        password_hash = self._passwords.hash(password)
        now_us = self._clock.now_us()
        with self._database.write() as connection, _taken(f"account called {name}"):
            held = rows.count_accounts(connection)
            if first and held:
                raise Conflict("there are accounts already")
            if held >= MAX_ACCOUNTS:
                raise TooLarge("accounts", MAX_ACCOUNTS)
            if rows.find_account(connection, name) is not None:
                raise Conflict(f"there is an account called {name}")
            for one in (tenant, *readable):
                rows.add_tenant(connection, one, now_us)
            rows.add_account(
                connection,
                name=name,
                display_name=display,
                tenant=tenant,
                password_hash=password_hash,
                password_us=now_us,
                must_change=1,
                created_us=now_us,
                updated_us=now_us,
                **rows.account_values(
                    readable=readable, roles=roles, patients=patients
                ),
            )
        self._record(actor, "account.add", name, tenant, origin, roles=sorted(roles))
        return password

    def list(
        self, actor: Actor, *, after: str = "", limit: int = 100
    ) -> list[AccountRow]:
        """Return accounts of the actor's tenants, in order of their names."""
        self._policy.require(actor, Action.READ_ACCOUNTS)
        tenants = None if Role.SYSTEM in actor.roles else actor.tenants
        with self._database.read() as connection:
            return rows.list_accounts(
                connection, tenants, after=after, limit=min(limit, MAX_LISTED)
            )

    def find(self, actor: Actor, name: str) -> AccountRow | None:
        """Return one account of the actor's tenants."""
        self._policy.require(actor, Action.READ_ACCOUNTS)
        with self._database.read() as connection:
            found = rows.find_account(connection, name.strip().lower())
        if found is None or not self._is_near(actor, found):
            return None
        return found

    def disable(self, actor: Actor, name: str, origin: Origin) -> None:
        """Let nobody log in with an account; its sessions end."""
        account = self._keep(actor, name, Action.KEEP_ACCOUNTS)
        self._change(account, state="disabled")
        self._sessions.end_all(account.id)
        self._record(actor, "account.disable", account.name, account.tenant, origin)

    def enable(self, actor: Actor, name: str, origin: Origin) -> None:
        """Let an account be used again, and forget failures to log in with it."""
        account = self._keep(actor, name, Action.KEEP_ACCOUNTS)
        with self._database.write() as connection:
            rows.change_account(
                connection, account.id, state="active", updated_us=self._clock.now_us()
            )
            rows.forgive(connection, lock_subjects(account.name, "")[:1])
        self._sessions.forget()
        self._record(actor, "account.enable", account.name, account.tenant, origin)

    def reset_password(self, actor: Actor, name: str, origin: Origin) -> str:
        """Return a new password to log in with once; all sessions end."""
        account = self._keep(actor, name, Action.KEEP_ACCOUNTS)
        password = one_time_password()
        set_password(
            self._database,
            account,
            self._passwords.hash(password),
            must_change=True,
            now_us=self._clock.now_us(),
            history=self._settings.password_history,
        )
        with self._database.write() as connection:
            rows.forgive(connection, lock_subjects(account.name, "")[:1])
        self._sessions.end_all(account.id)
        self._record(actor, "account.reset", account.name, account.tenant, origin)
        return password

    def reset_totp(self, actor: Actor, name: str, origin: Origin) -> None:
        """Forget a second factor that was lost; it is set up anew at the next login."""
        account = self._keep(actor, name, Action.KEEP_ACCOUNTS)
        self._change(account, totp_secret="", totp_pending="", totp_step=0)
        self._sessions.end_all(account.id)
        self._record(actor, "account.totp_reset", account.name, account.tenant, origin)

    def set_roles(
        self,
        actor: Actor,
        name: str,
        roles: Iterable[str],
        origin: Origin,
        *,
        readable: Iterable[str] | None = None,
    ) -> None:
        """Give an account other roles, and other tenants to read; its sessions end.

        Raises
        ------
        NotAllowed
            Among others: to the own account.
        """
        account = self._keep(actor, name, Action.GRANT)
        wanted = roles_of(roles)
        _patients(wanted, tuple(account.patients))
        others = account.readable
        if readable is not None:
            others = frozenset(map(tenant_name, readable)) - {account.tenant}
        for one in others - account.readable:
            resource = Resource(Kind.ACCOUNT, one, account.name)
            self._policy.require(actor, Action.GRANT, resource)
        with self._database.write() as connection:
            for one in others:
                rows.add_tenant(connection, one, self._clock.now_us())
            rows.change_account(
                connection,
                account.id,
                updated_us=self._clock.now_us(),
                **rows.account_values(roles=wanted, readable=others),
            )
        self._sessions.end_all(account.id)
        self._record(
            actor,
            "account.roles",
            account.name,
            account.tenant,
            origin,
            roles=sorted(wanted),
            roles_before=sorted(account.roles),
            readable=sorted(others),
        )

    def _keep(self, actor: Actor, name: str, action: Action) -> AccountRow:
        """Return an account that `actor` may change; one of others does not exist."""
        with self._database.read() as connection:
            account = rows.find_account(connection, name.strip().lower())
        if account is None or not self._is_near(actor, account):
            self._policy.require(actor, action)
            raise NotFound("no such account")
        resource = Resource(Kind.ACCOUNT, account.tenant, account.name)
        self._policy.require(actor, action, resource)
        return account

    @staticmethod
    def _is_near(actor: Actor, account: AccountRow) -> bool:
        return Role.SYSTEM in actor.roles or account.tenant in actor.tenants

    def _change(self, account: AccountRow, **values: str | int) -> None:
        with self._database.write() as connection:
            rows.change_account(
                connection, account.id, updated_us=self._clock.now_us(), **values
            )

    def _record(
        self,
        actor: Actor,
        action: str,
        name: str,
        tenant: str,
        origin: Origin,
        **detail: builtins.list[str],
    ) -> None:
        self._recorder.record(
            actor,
            action,
            origin,
            object_kind="account",
            object_id=name,
            object_tenant="" if tenant == actor.tenant else tenant,
            detail=detail or None,
        )


@contextmanager
def _taken(what: str) -> Iterator[None]:
    """Tell of a name that somebody else has taken at the same moment."""
    try:
        yield
    except IntegrityError as error:
        raise Conflict(f"there is, or was, a {what}") from error


def _display_name(text: str) -> str:
    shown = " ".join(text.split())
    if len(shown) > MAX_DISPLAY_NAME or not shown.isprintable():
        raise InvalidParameter(
            "display_name", f"at most {MAX_DISPLAY_NAME} printable characters"
        )
    return shown


def _patients(
    roles: frozenset[Role], patients: tuple[PatientKey, ...]
) -> frozenset[PatientKey]:
    """Require who the person is from a patient's account, and from no other."""
    if (Role.PATIENT in roles) != bool(patients):
        raise InvalidParameter("patients", "for the role patient, and for that only")
    if len(patients) > MAX_PATIENTS:
        raise InvalidParameter("patients", f"more than {MAX_PATIENTS}")
    for one in patients:
        tenant_name(one.tenant)
        if not 0 < len(one.patient_id) <= 64 or len(one.issuer) > 64:
            raise InvalidParameter("patients", "a Patient ID has 1 to 64 characters")
    return frozenset(patients)


class TokenService:
    """Make, list and revoke the tokens of machines; parameters as `AccountService`."""

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
        for one in (tenant, *readable):
            self._policy.require(actor, Action.KEEP_TOKENS, Resource(Kind.TOKEN, one))
        most = self._settings.token_days
        span = most if days is None else days
        if not 0 < span <= most:
            raise InvalidParameter("days", f"more than 0, at most {most:g}")
        secret, now_us = TOKEN_PREFIX + new_secret(), self._clock.now_us()
        values = rows.account_values(readable=readable, roles=roles)
        with self._database.write() as connection, _taken(f"token called {name}"):
            if grants.find_token(connection, name=name) is not None:
                raise Conflict(f"there is, or was, a token called {name}")
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
        self._record(actor, "token.add", name, origin, sorted(roles))
        return secret

    def list(self, actor: Actor) -> list[TokenRow]:
        """Return the tokens of the actor's tenants, revoked ones too."""
        self._policy.require(actor, Action.KEEP_TOKENS)
        tenants = None if Role.SYSTEM in actor.roles else actor.tenants
        with self._database.read() as connection:
            return grants.list_tokens(connection, tenants, MAX_LISTED)

    def revoke(self, actor: Actor, name: str, origin: Origin) -> None:
        """End a token, and what its tickets have opened."""
        self._policy.require(actor, Action.KEEP_TOKENS)
        with self._database.read() as connection:
            token = grants.find_token(connection, name=name.strip().lower())
        resource = None if token is None else Resource(Kind.TOKEN, token.tenant)
        if (
            token is None
            or not self._policy.decide(actor, Action.KEEP_TOKENS, resource).allowed
        ):
            raise NotFound("no such token")
        with self._database.write() as connection:
            grants.revoke_token(connection, token.id, self._clock.now_us())
            end_all_in(connection, token_pk=token.id)
        self._sessions.forget()
        self._record(actor, "token.revoke", token.name, origin, sorted(token.roles))

    def _record(
        self,
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
        )
