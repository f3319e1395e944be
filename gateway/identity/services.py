"""Keeping accounts: who may, is the policy's to say; each change is audited.

Nobody changes the account he acts with: the relation ``self`` is in no cell of these
actions.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from gateway.identity import repository as rows
from gateway.identity.logins import set_password
from gateway.identity.passwords import Passwords
from gateway.identity.recording import Origin, Recorder, Transaction
from gateway.identity.repository import AccountRow
from gateway.identity.rules import (
    account_name,
    lock_subjects,
    one_time_password,
    roles_of,
    tenant_name,
)
from gateway.identity.sessions import SessionService, end_all_in
from pacs.services.permissions import Action, Kind
from pacs.services.policy import AccessPolicy, Resource
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    Conflict,
    InvalidParameter,
    NotAllowed,
    NotFound,
    TooLarge,
)
from storage.kernel.settings import Identity
from storage.kernel.types import Actor, PatientKey, Role

MAX_ACCOUNTS = 1_000_000
MAX_PATIENTS = 32
MAX_LISTED = 1000
MAX_DISPLAY_NAME = 128
#: Whoever logs in gives a name and no institution, so each name is used once on a node.
#: Whose it is, is not said: those who keep accounts see their own institution's.
TAKEN = "this name is, or was, in use on this node: choose another"


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
        password = one_time_password()
        password_hash = self._passwords.hash(password)
        now_us = self._clock.now_us()
        with taken(), self._recorder.transaction() as made:
            connection = made.connection
            for action in (Action.KEEP_ACCOUNTS, Action.GRANT):
                for one in (tenant, *readable, *(key.tenant for key in patients)):
                    resource = Resource(Kind.ACCOUNT, one, name)
                    self._policy.require(actor, action, resource)
            held = rows.count_accounts(connection)
            if first and held:
                raise Conflict("there are accounts already")
            if held >= MAX_ACCOUNTS:
                raise TooLarge("accounts", MAX_ACCOUNTS)
            if rows.find_account(connection, name) is not None:
                raise Conflict(TAKEN)
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
            self._record(
                made,
                actor,
                "account.add",
                name,
                tenant,
                origin,
                roles=sorted(roles),
            )
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
        with self._changing(actor, name, "account.disable", origin) as change:
            change.set(state="disabled")
            change.end_sessions()

    def enable(self, actor: Actor, name: str, origin: Origin) -> None:
        """Let an account be used again, and forget failures to log in with it.

        Raises
        ------
        NotAllowed
            Among others: it sees institutions that the actor keeps no accounts of.
        NotFound
        """
        with self._changing(actor, name, "account.enable", origin) as change:
            self._require_reach(actor, Action.KEEP_ACCOUNTS, change.account)
            change.set(state="active")
            change.forgive()

    def reset_password(self, actor: Actor, name: str, origin: Origin) -> str:
        """Return a new password to log in with once; all sessions end.

        Raises
        ------
        NotAllowed
            As of `enable`: whoever is told the password could see what it shows.
        NotFound
        """
        password = one_time_password()
        password_hash = self._passwords.hash(password)
        with self._changing(actor, name, "account.reset", origin) as change:
            self._require_reach(actor, Action.KEEP_ACCOUNTS, change.account)
            set_password(
                change.connection,
                change.account,
                password_hash,
                must_change=True,
                now_us=change.now_us,
                history=self._settings.password_history,
            )
            change.forgive()
            change.end_sessions()
        return password

    def reset_totp(self, actor: Actor, name: str, origin: Origin) -> None:
        """Forget a second factor that was lost; it is set up anew at the next login.

        Raises
        ------
        NotAllowed
            As of `enable`.
        NotFound
        """
        with self._changing(actor, name, "account.totp_reset", origin) as change:
            self._require_reach(actor, Action.KEEP_ACCOUNTS, change.account)
            change.set(totp_secret="", totp_pending="", totp_step=0)
            change.end_sessions()

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
            Among others: to the own account; and, unless rights are only taken away,
            to one that would see institutions that the actor keeps no accounts of.
        NotFound
        InvalidParameter
        """
        wanted = roles_of(roles)
        with self._changing(
            actor, name, "account.roles", origin, Action.GRANT
        ) as change:
            account, others = change.account, change.account.readable
            _patients(wanted, tuple(account.patients))
            if readable is not None:
                others = frozenset(map(tenant_name, readable)) - {account.tenant}
            if not (wanted <= account.roles and others <= account.readable):
                made = replace(account, readable=others)
                self._require_reach(actor, Action.GRANT, made)
            for one in others:
                rows.add_tenant(change.connection, one, change.now_us)
            change.set(**rows.account_values(roles=wanted, readable=others))
            change.end_sessions()
            change.detail = {
                "roles": sorted(wanted),
                "roles_before": sorted(account.roles),
                "readable": sorted(others),
            }

    @contextmanager
    def _changing(
        self,
        actor: Actor,
        name: str,
        event: str,
        origin: Origin,
        action: Action = Action.KEEP_ACCOUNTS,
    ) -> Iterator[_Change]:
        """Yield the change of an account, which commits with its audit record."""
        with self._recorder.transaction() as made:
            account = self._keep(made.connection, actor, name, action)
            change = _Change(made.connection, account, self._clock.now_us())
            yield change
            self._record(
                made,
                actor,
                event,
                account.name,
                account.tenant,
                origin,
                **change.detail,
            )
        self._sessions.forget()

    def _keep(
        self, connection: Connection, actor: Actor, name: str, action: Action
    ) -> AccountRow:
        """Return an account that `actor` may change; one of others does not exist."""
        account = rows.find_account(connection, name.strip().lower(), hold=True)
        if account is None or not self._is_near(actor, account):
            self._policy.require(actor, action)
            raise NotFound("no such account")
        resource = Resource(Kind.ACCOUNT, account.tenant, account.name)
        self._policy.require(actor, action, resource)
        return account

    @staticmethod
    def _is_near(actor: Actor, account: AccountRow) -> bool:
        return Role.SYSTEM in actor.roles or account.tenant in actor.tenants

    def _require_reach(self, actor: Actor, action: Action, account: AccountRow) -> None:
        """Require that `actor` keeps accounts of all that an account sees.

        Else whoever keeps accounts of one institution would see others' studies with
        the eyes of those who may.
        """
        for one in (*account.readable, *(key.tenant for key in account.patients)):
            resource = Resource(Kind.ACCOUNT, one, account.name)
            if not self._policy.decide(actor, action, resource).allowed:
                raise NotAllowed(
                    f"{action} is not allowed: the account sees {one}, of which you"
                    " keep no accounts"
                )

    def _record(
        self,
        within: Transaction,
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
            within=within,
        )


@dataclass(slots=True)
class _Change:
    """A change of one account, in its transaction.

    Attributes
    ----------
    detail : dict
        Of its audit record.
    """

    connection: Connection
    account: AccountRow
    now_us: int
    detail: dict[str, builtins.list[str]] = field(default_factory=dict)

    def set(self, **values: str | int) -> None:
        """Write columns of the account."""
        rows.change_account(
            self.connection, self.account.id, updated_us=self.now_us, **values
        )

    def forgive(self) -> None:
        """Forget the failures to log in with the account."""
        rows.forgive(self.connection, lock_subjects(self.account.name, "")[:1])

    def end_sessions(self) -> None:
        end_all_in(self.connection, account_pk=self.account.id)


@contextmanager
def taken() -> Iterator[None]:
    """Tell of a name that somebody else has taken at the same moment."""
    try:
        yield
    except IntegrityError as error:
        raise Conflict(TAKEN) from error


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
