"""SQL of what is given out: tokens of machines, launch tickets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from gateway.identity.repository import scope_of
from gateway.identity.tables import ApiToken, LaunchTicket
from storage.kernel.types import Role, Scope


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A machine's token, without what it is proved by."""

    id: int
    name: str
    tenant: str
    readable: frozenset[str]
    roles: frozenset[Role]
    created_by: str
    created_us: int
    expires_us: int
    revoked_us: int | None

    def is_good(self, now_us: int) -> bool:
        return self.revoked_us is None and now_us < self.expires_us


_TOKEN = (
    ApiToken.id,
    ApiToken.name,
    ApiToken.tenant,
    ApiToken.readable,
    ApiToken.roles,
    ApiToken.created_by,
    ApiToken.created_us,
    ApiToken.expires_us,
    ApiToken.revoked_us,
)


def _token(row: Sequence[Any]) -> TokenRow:
    values = dict(zip((column.key for column in _TOKEN), row, strict=True))
    values["readable"] = frozenset(values["readable"].split())
    values["roles"] = frozenset(map(Role, values["roles"].split()))
    return TokenRow(**values)


def find_token(
    connection: Connection,
    *,
    digest: bytes | None = None,
    name: str = "",
    pk: int | None = None,
) -> TokenRow | None:
    if digest is not None:
        condition: ColumnElement[bool] = ApiToken.digest == digest
    elif pk is not None:
        condition = ApiToken.id == pk
    else:
        condition = ApiToken.name == name
    row = connection.execute(select(*_TOKEN).where(condition)).first()
    return None if row is None else _token(row)


def list_tokens(
    connection: Connection, tenants: Sequence[str] | None, limit: int
) -> list[TokenRow]:
    query = select(*_TOKEN)
    if tenants is not None:
        query = query.where(ApiToken.tenant.in_(tenants))
    rows = connection.execute(query.order_by(ApiToken.name).limit(limit))
    return [_token(row) for row in rows]


def count_tokens(connection: Connection) -> int:
    return connection.scalar(select(func.count()).select_from(ApiToken)) or 0


def add_token(connection: Connection, **values: Any) -> None:
    connection.execute(insert(ApiToken).values(**values))


def revoke_token(connection: Connection, pk: int, now_us: int) -> None:
    connection.execute(
        update(ApiToken)
        .where(ApiToken.id == pk, ApiToken.revoked_us.is_(None))
        .values(revoked_us=now_us)
    )


# -- launch tickets


@dataclass(frozen=True, slots=True)
class TicketRow:
    """A launch ticket, without what it is proved by."""

    id: int
    public_id: str
    tenant: str
    account_pk: int | None
    token_pk: int | None
    issuer: str
    purpose: str
    scope: Scope
    created_us: int
    expires_us: int
    used_us: int | None

    @property
    def is_withdrawn(self) -> bool:
        return self.expires_us <= self.created_us


_TICKET = (
    LaunchTicket.id,
    LaunchTicket.public_id,
    LaunchTicket.tenant,
    LaunchTicket.account_pk,
    LaunchTicket.token_pk,
    LaunchTicket.issuer,
    LaunchTicket.purpose,
    LaunchTicket.scope,
    LaunchTicket.created_us,
    LaunchTicket.expires_us,
    LaunchTicket.used_us,
)


def find_ticket(connection: Connection, digest: bytes) -> TicketRow | None:
    row = connection.execute(
        select(*_TICKET).where(LaunchTicket.digest == digest)
    ).first()
    if row is None:
        return None
    values = dict(zip((column.key for column in _TICKET), row, strict=True))
    values["scope"] = scope_of(values["scope"]) or Scope()
    return TicketRow(**values)


def add_ticket(connection: Connection, **values: Any) -> None:
    connection.execute(insert(LaunchTicket).values(**values))


def use_ticket(connection: Connection, pk: int, now_us: int) -> bool:
    """Take a ticket, once: of two who try, one is told False."""
    taken = connection.execute(
        update(LaunchTicket)
        .where(
            LaunchTicket.id == pk,
            LaunchTicket.used_us.is_(None),
            LaunchTicket.expires_us > now_us,
        )
        .values(used_us=now_us)
    )
    return bool(taken.rowcount)


def withdraw_tickets(
    connection: Connection,
    *,
    account_pk: int | None = None,
    token_pk: int | None = None,
) -> None:
    """End the tickets of an account or a token that wait to be used.

    They expire when they were issued: so the audit tells them from expired ones.
    """
    query = update(LaunchTicket).where(LaunchTicket.used_us.is_(None))
    if account_pk is not None:
        query = query.where(LaunchTicket.account_pk == account_pk)
    elif token_pk is not None:
        query = query.where(LaunchTicket.token_pk == token_pk)
    else:
        raise ValueError("nothing names the tickets")
    connection.execute(query.values(expires_us=LaunchTicket.created_us))


def forget_old_tickets(connection: Connection, before_us: int) -> None:
    connection.execute(delete(LaunchTicket).where(LaunchTicket.expires_us < before_us))


def count_tickets(connection: Connection, issuer: str, now_us: int) -> int:
    """Return how many tickets of `issuer` are still good."""
    found = connection.scalar(
        select(func.count())
        .select_from(LaunchTicket)
        .where(
            LaunchTicket.issuer == issuer,
            LaunchTicket.expires_us > now_us,
            LaunchTicket.used_us.is_(None),
        )
    )
    return int(found or 0)
