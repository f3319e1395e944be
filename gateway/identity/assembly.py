"""The services of identity, put together for `gateway.app` and the commands."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.identity.logins import LoginService
from gateway.identity.passwords import Passwords
from gateway.identity.recording import Recorder, Trail
from gateway.identity.services import AccountService
from gateway.identity.sessions import SessionService
from gateway.identity.tickets import TicketService
from gateway.identity.tokens import TokenService
from pacs.services.policy import AccessPolicy
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.settings import Identity as IdentitySettings


@dataclass(frozen=True, slots=True)
class Identity:
    """All services of identity, sharing one database and one memory of sessions."""

    sessions: SessionService
    logins: LoginService
    accounts: AccountService
    tokens: TokenService
    tickets: TicketService


def assemble(
    *,
    database: Database,
    clock: Clock,
    settings: IdentitySettings,
    policy: AccessPolicy,
    trail: Trail,
    passwords: Passwords | None = None,
) -> Identity:
    """Return the services of this process."""
    recorder = Recorder(trail, database)
    sessions = SessionService(database=database, clock=clock, settings=settings)
    if passwords is None:
        passwords = Passwords(
            memory_kib=settings.hash_memory_kib, passes=settings.hash_passes
        )
    return Identity(
        sessions=sessions,
        logins=LoginService(
            database=database,
            clock=clock,
            settings=settings,
            passwords=passwords,
            sessions=sessions,
            recorder=recorder,
        ),
        accounts=AccountService(
            database=database,
            clock=clock,
            settings=settings,
            policy=policy,
            passwords=passwords,
            sessions=sessions,
            recorder=recorder,
        ),
        tokens=TokenService(
            database=database,
            clock=clock,
            settings=settings,
            policy=policy,
            sessions=sessions,
            recorder=recorder,
        ),
        tickets=TicketService(
            database=database,
            clock=clock,
            settings=settings,
            policy=policy,
            sessions=sessions,
            recorder=recorder,
        ),
    )
