"""SQL of identity; callers open and commit the transactions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import (
    Connection,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from gateway.identity.tables import (
    Account,
    LoginFailure,
    OldPassword,
    Session,
)
from storage.db.tables import Tenant
from storage.kernel.types import PatientKey, Role, Scope, StudyKey


@dataclass(frozen=True, slots=True)
class AccountRow:
    """One account, as the table has it."""

    id: int
    name: str
    display_name: str
    tenant: str
    readable: frozenset[str]
    roles: frozenset[Role]
    patients: frozenset[PatientKey]
    state: str
    password_hash: str
    password_us: int
    must_change: bool
    totp_secret: str
    totp_pending: str
    totp_step: int
    created_us: int
    login_us: int | None

    @property
    def is_active(self) -> bool:
        return self.state == "active"


_ACCOUNT = (
    Account.id,
    Account.name,
    Account.display_name,
    Account.tenant,
    Account.readable,
    Account.roles,
    Account.patients,
    Account.state,
    Account.password_hash,
    Account.password_us,
    Account.must_change,
    Account.totp_secret,
    Account.totp_pending,
    Account.totp_step,
    Account.created_us,
    Account.login_us,
)


def _account(row: Sequence[Any]) -> AccountRow:
    values = dict(zip((column.key for column in _ACCOUNT), row, strict=True))
    values["readable"] = frozenset(values["readable"].split())
    values["roles"] = frozenset(map(Role, values["roles"].split()))
    values["patients"] = frozenset(
        PatientKey(*one) for one in orjson.loads(values["patients"])
    )
    values["must_change"] = bool(values["must_change"])
    return AccountRow(**values)


def account_values(
    *,
    readable: Iterable[str] | None = None,
    roles: Iterable[Role] | None = None,
    patients: Iterable[PatientKey] | None = None,
) -> dict[str, str]:
    """Return columns for what is given, in the form the table keeps."""
    values = {}
    if readable is not None:
        values["readable"] = " ".join(sorted(readable))
    if roles is not None:
        values["roles"] = " ".join(sorted(roles))
    if patients is not None:
        listed = sorted([one.tenant, one.issuer, one.patient_id] for one in patients)
        values["patients"] = orjson.dumps(listed).decode()
    return values


def find_account(
    connection: Connection, name: str, *, hold: bool = False
) -> AccountRow | None:
    """Return an account by its name; `hold` it until the commit."""
    query = select(*_ACCOUNT).where(Account.name == name)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return None if row is None else _account(row)


def account_by_pk(
    connection: Connection, pk: int, *, hold: bool = False
) -> AccountRow | None:
    """Return an account; `hold` it until the commit."""
    query = select(*_ACCOUNT).where(Account.id == pk)
    row = connection.execute(query.with_for_update() if hold else query).first()
    return None if row is None else _account(row)


def list_accounts(
    connection: Connection, tenants: Sequence[str] | None, *, after: str, limit: int
) -> list[AccountRow]:
    """Return accounts in order of their names; `tenants` None: of all."""
    query = select(*_ACCOUNT).where(Account.name > after)
    if tenants is not None:
        query = query.where(Account.tenant.in_(tenants))
    rows = connection.execute(query.order_by(Account.name).limit(limit))
    return [_account(row) for row in rows]


def count_accounts(connection: Connection) -> int:
    return connection.scalar(select(func.count()).select_from(Account)) or 0


def add_account(connection: Connection, **values: Any) -> int:
    """Insert an account; return its row key. The name must be free."""
    pk = connection.scalar(insert(Account).returning(Account.id), values)
    return int(pk or 0)


def change_account(connection: Connection, pk: int, **values: Any) -> None:
    connection.execute(update(Account).where(Account.id == pk).values(**values))


def take_totp_step(connection: Connection, pk: int, step: int) -> bool:
    """Note that the code of `step` was used; False: it, or a later one, was before."""
    taken = connection.execute(
        update(Account)
        .where(Account.id == pk, Account.totp_step < step)
        .values(totp_step=step)
    )
    return bool(taken.rowcount)


def old_passwords(connection: Connection, pk: int, count: int) -> list[str]:
    """Return the last `count` hashes before the present one, newest first."""
    rows = connection.scalars(
        select(OldPassword.password_hash)
        .where(OldPassword.account_pk == pk)
        .order_by(OldPassword.id.desc())
        .limit(count)
    )
    return list(rows)


def keep_old_password(
    connection: Connection, pk: int, password_hash: str, now_us: int, count: int
) -> None:
    """Remember a hash; forget those before the last `count`."""
    connection.execute(
        insert(OldPassword).values(
            account_pk=pk, password_hash=password_hash, created_us=now_us
        )
    )
    kept = (
        select(OldPassword.id)
        .where(OldPassword.account_pk == pk)
        .order_by(OldPassword.id.desc())
        .limit(count)
    )
    connection.execute(
        delete(OldPassword).where(
            OldPassword.account_pk == pk, OldPassword.id.not_in(kept)
        )
    )


def has_tenant(connection: Connection, key: str) -> bool:
    return connection.scalar(select(Tenant.id).where(Tenant.key == key)) is not None


def add_tenant(connection: Connection, key: str, now_us: int) -> None:
    """Make sure that an institution is known."""
    module = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = module.insert(Tenant).values(key=key, name="", created_us=now_us)
    connection.execute(statement.on_conflict_do_nothing(index_elements=["key"]))


# -- attempts that failed


def locked_until(connection: Connection, subjects: Sequence[str]) -> int:
    """Return until when one of `subjects` is locked; 0: never was."""
    found = connection.scalar(
        select(func.max(LoginFailure.locked_until_us)).where(
            LoginFailure.subject.in_(subjects)
        )
    )
    return int(found or 0)


def count_failure(
    connection: Connection, subject: str, now_us: int, *, limit: int, seconds: float
) -> None:
    """Count an attempt of a subject that is not locked; the one at `limit` locks."""
    module = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = module.insert(LoginFailure).values(
        subject=subject, failures=1, last_us=now_us, locked_until_us=0
    )
    # A lock that is there is over, and failures of long ago do not count.
    anew = or_(
        LoginFailure.locked_until_us > 0,
        LoginFailure.last_us < now_us - int(seconds * 1e6),
    )
    failures = connection.scalar(
        statement.on_conflict_do_update(
            index_elements=["subject"],
            set_={
                "failures": case((anew, 1), else_=LoginFailure.failures + 1),
                "last_us": now_us,
                "locked_until_us": 0,
            },
        ).returning(LoginFailure.failures)
    )
    if int(failures or 0) >= limit:
        connection.execute(
            update(LoginFailure)
            .where(LoginFailure.subject == subject)
            .values(locked_until_us=now_us + int(seconds * 1e6))
        )


def take_back_failure(connection: Connection, subject: str, *, limit: int) -> None:
    """Uncount one attempt, and the lock it has brought."""
    fewer = LoginFailure.failures - 1
    connection.execute(
        update(LoginFailure)
        .where(LoginFailure.subject == subject, LoginFailure.failures > 0)
        .values(
            failures=fewer,
            locked_until_us=case(
                (fewer < limit, 0), else_=LoginFailure.locked_until_us
            ),
        )
    )


def forget_old_failures(connection: Connection, before_us: int) -> None:
    """Forget failures whose time is over: rows are bounded by the rate of attempts."""
    connection.execute(
        delete(LoginFailure).where(
            LoginFailure.last_us < before_us, LoginFailure.locked_until_us < before_us
        )
    )


def forgive(connection: Connection, subjects: Sequence[str]) -> None:
    connection.execute(delete(LoginFailure).where(LoginFailure.subject.in_(subjects)))


# -- sessions


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session, with the account or token it stands on."""

    id: int
    public_id: str
    account_pk: int | None
    token_pk: int | None
    kind: str
    actor: str
    tenant: str
    purpose: str
    scope: Scope | None
    second_factor: bool
    address: str
    created_us: int
    seen_us: int
    idle_us: int
    expires_us: int

    def is_over(self, now_us: int) -> bool:
        return now_us >= min(self.expires_us, self.seen_us + self.idle_us)


_SESSION = (
    Session.id,
    Session.public_id,
    Session.account_pk,
    Session.token_pk,
    Session.kind,
    Session.actor,
    Session.tenant,
    Session.purpose,
    Session.scope,
    Session.second_factor,
    Session.address,
    Session.created_us,
    Session.seen_us,
    Session.idle_us,
    Session.expires_us,
)


def _session(row: Sequence[Any]) -> SessionRow:
    values = dict(zip((column.key for column in _SESSION), row, strict=True))
    values["scope"] = scope_of(values["scope"])
    values["second_factor"] = bool(values["second_factor"])
    return SessionRow(**values)


def scope_text(scope: Scope | None) -> str:
    """Return a scope as JSON; empty for none."""
    if scope is None:
        return ""
    studies = sorted([key.tenant, key.study_instance_uid] for key in scope.studies)
    patients = sorted(
        [key.tenant, key.issuer, key.patient_id] for key in scope.patients
    )
    return orjson.dumps({"studies": studies, "patients": patients}).decode()


def scope_of(text: str) -> Scope | None:
    """Return the scope that `scope_text` wrote."""
    if not text:
        return None
    found = orjson.loads(text)
    return Scope(
        frozenset(StudyKey(*one) for one in found["studies"]),
        frozenset(PatientKey(*one) for one in found["patients"]),
    )


def find_session(connection: Connection, digest: bytes) -> SessionRow | None:
    row = connection.execute(select(*_SESSION).where(Session.digest == digest)).first()
    return None if row is None else _session(row)


def list_sessions(connection: Connection, account_pk: int) -> list[SessionRow]:
    """Return the logins of an account, oldest first."""
    rows = connection.execute(
        select(*_SESSION)
        .where(Session.account_pk == account_pk, Session.kind == "login")
        .order_by(Session.created_us, Session.id)
    )
    return [_session(row) for row in rows]


def add_session(connection: Connection, **values: Any) -> None:
    connection.execute(insert(Session).values(**values))


def touch_session(connection: Connection, pk: int, seen_us: int) -> bool:
    """Note a use of a session, and hold it until the commit; False: it has ended."""
    touched = connection.execute(
        update(Session).where(Session.id == pk).values(seen_us=seen_us)
    )
    return bool(touched.rowcount)


def end_sessions(
    connection: Connection,
    *,
    digest: bytes | None = None,
    pks: Sequence[int] | None = None,
    account_pk: int | None = None,
    token_pk: int | None = None,
) -> int:
    """End the sessions that one of the arguments names; return how many."""
    query = delete(Session)
    if digest is not None:
        query = query.where(Session.digest == digest)
    elif pks is not None:
        query = query.where(Session.id.in_(pks))
    elif account_pk is not None:
        query = query.where(Session.account_pk == account_pk)
    elif token_pk is not None:
        query = query.where(Session.token_pk == token_pk)
    else:
        raise ValueError("nothing names the sessions")
    return int(connection.execute(query).rowcount)


def end_old_sessions(connection: Connection, now_us: int) -> None:
    connection.execute(
        delete(Session).where(
            or_(Session.expires_us < now_us, Session.seen_us + Session.idle_us < now_us)
        )
    )
