"""Logging in: names, passwords, codes, locks; and what one does to the own account."""

from __future__ import annotations

import hashlib
import hmac
import io
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import NoReturn

import segno
from sqlalchemy import Connection

from gateway.identity import repository as rows
from gateway.identity.passwords import Passwords
from gateway.identity.recording import Origin, Recorder
from gateway.identity.repository import AccountRow
from gateway.identity.rules import (
    LockRule,
    PasswordRule,
    WeakPassword,
    claimed_name,
    lock_subjects,
    new_totp_secret,
    totp_step,
    totp_uri,
)
from gateway.identity.sessions import CACHE_SECONDS, Login, SessionService
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    CodeNeeded,
    Conflict,
    NotAllowed,
    NotAuthenticated,
    TooManyAttempts,
)
from storage.kernel.settings import Identity
from storage.kernel.types import Actor

#: The same answer whether the name, the password or the code is wrong.
WRONG = "the name, the password or the code is wrong"
ISSUER = "Huying"
MAX_VERIFIED = 1000
SWEEP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TotpSetup:
    """What an authenticator application needs."""

    secret: str
    uri: str

    @property
    def qr(self) -> str:
        """The address as a picture, SVG, for the camera of a telephone."""
        made = io.BytesIO()
        segno.make(self.uri, error="m").save(
            made, kind="svg", scale=4, xmldecl=False, omitsize=True
        )
        return made.getvalue().decode()


class LoginService:
    """Let people in, and let them change what they prove themselves by.

    Parameters
    ----------
    database : Database
    clock : Clock
    settings : Identity
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
        passwords: Passwords,
        sessions: SessionService,
        recorder: Recorder,
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self.passwords = passwords
        self._sessions = sessions
        self._recorder = recorder
        self._rule = PasswordRule(settings.min_length)
        self._locks = LockRule(
            settings.account_failures,
            settings.address_failures,
            settings.lock_seconds,
        )
        self._key = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, tuple[float, Login, str]] = OrderedDict()
        self._lock = threading.Lock()
        self._next_sweep = 0.0

    def log_in(
        self, name: str, password: str, code: str, origin: Origin
    ) -> tuple[str, Login]:
        """Return the secret of a new session, and who it is.

        Raises
        ------
        NotAuthenticated
            Something is wrong; which, is not said.
        CodeNeeded
            The password is right, and a code is needed beside it.
        TooManyAttempts
            For this name, whether there is such an account or not, or address.
        """
        account, has_code = self._prove(name, password, code, origin, "login")
        opened = self._sessions.open(
            account, address=origin.source, second_factor=has_code
        )
        with self._database.write() as connection:
            rows.change_account(connection, account.id, login_us=self._clock.now_us())
        self._recorder.record(opened[1].actor, "login", origin, purpose="")
        return opened

    def _prove(
        self, name: str, password: str, code: str, origin: Origin, action: str
    ) -> tuple[AccountRow, bool]:
        """Return the account whose owner this is, and whether a code was shown."""
        subjects = lock_subjects(name, origin.source)
        account = self._count_attempt(name, subjects, origin, action)
        password_hash = None if account is None else account.password_hash
        is_right = self.passwords.verify(password_hash, password)
        if account is None or not is_right or not account.is_active:
            self._refuse(name, origin, action, "wrong name or password")
        if not account.totp_secret:
            self._forgive(subjects)
            return account, False
        if not code:
            # The attempt was none; only itself is taken back, not those before it.
            self._take_back(subjects)
            raise CodeNeeded("a code of the second factor is needed")
        step = totp_step(
            account.totp_secret, code, self._clock.now_us(), account.totp_step
        )
        if step is None:
            self._refuse(name, origin, action, "wrong or used code")
        with self._database.write() as connection:
            taken = rows.take_totp_step(connection, account.id, step)
        if not taken:
            self._refuse(name, origin, action, "wrong or used code")
        self._forgive(subjects)
        return account, True

    def _count_attempt(
        self, name: str, subjects: tuple[str, ...], origin: Origin, action: str
    ) -> AccountRow | None:
        """Count an attempt before it is looked at: guesses side by side count too."""
        now_us = self._clock.now_us()
        with self._database.write() as connection:
            until = rows.locked_until(connection, subjects)
            if until <= now_us:
                for subject in subjects:
                    rows.count_failure(
                        connection,
                        subject,
                        now_us,
                        limit=self._locks.limit(subject),
                        seconds=self._locks.seconds,
                    )
            account = rows.find_account(connection, claimed_name(name))
        self._sweep(now_us)
        if until > now_us:
            self._recorder.refuse(
                claimed_name(name), action, origin, "locked after failures"
            )
            raise TooManyAttempts(-(-(until - now_us) // 1_000_000))
        return account

    def _sweep(self, now_us: int) -> None:
        """Forget failures whose time is over, now and then."""
        with self._lock:
            if time.monotonic() < self._next_sweep:
                return
            self._next_sweep = time.monotonic() + SWEEP_SECONDS
        with self._database.write() as connection:
            rows.forget_old_failures(
                connection, now_us - int(self._locks.seconds * 1e6)
            )

    def _refuse(self, name: str, origin: Origin, action: str, reason: str) -> NoReturn:
        self._recorder.refuse(claimed_name(name), action, origin, reason)
        raise NotAuthenticated(WRONG)

    def _forgive(self, subjects: tuple[str, ...]) -> None:
        """Forget the failures of a name; of the address only this attempt.

        Else whoever has an account could go on guessing others' for ever.
        """
        with self._database.write() as connection:
            rows.forgive(connection, subjects[:1])
        self._take_back(subjects[1:])

    def _take_back(self, subjects: tuple[str, ...]) -> None:
        with self._database.write() as connection:
            for subject in subjects:
                rows.take_back_failure(
                    connection, subject, limit=self._locks.limit(subject)
                )

    def basic(self, name: str, password: str, origin: Origin) -> Login:
        """Return who shows a name and a password with each request.

        What was right is remembered, so that not every request costs a hash; the
        account is still looked at every few seconds.

        Raises
        ------
        NotAuthenticated, TooManyAttempts
        NotAllowed
            The account needs a second factor, or must change its password.
        """
        given = f"{claimed_name(name)}\0{password}".encode()
        key = hmac.digest(self._key, given, hashlib.sha256)
        with self._lock:
            held = self._verified.get(key)
        if held is not None and held[0] > time.monotonic():
            return held[1]
        if held is not None:
            with self._database.read() as connection:
                account = rows.find_account(connection, claimed_name(name))
            if account is not None and account.password_hash == held[2]:
                return self._basic_of(account, key)
        account, _ = self._prove(name, password, "", origin, "login")
        return self._basic_of(account, key)

    def _basic_of(self, account: AccountRow, key: bytes) -> Login:
        login = self._sessions.of_account(account, None, "basic")
        if login is None:
            raise NotAuthenticated(WRONG)
        if login.must or account.totp_secret:
            raise NotAllowed("this account cannot use HTTP Basic; use a token")
        with self._lock:
            until = time.monotonic() + CACHE_SECONDS
            self._verified[key] = (until, login, account.password_hash)
            self._verified.move_to_end(key)
            if len(self._verified) > MAX_VERIFIED:
                self._verified.popitem(last=False)
        return login

    def log_out(self, secret: str, actor: Actor, origin: Origin) -> None:
        """End a session."""
        self._sessions.end(secret)
        self._recorder.record(actor, "logout", origin)

    def change_password(
        self, login: Login, present: str, wanted: str, origin: Origin
    ) -> tuple[str, Login]:
        """Change the own password; every session ends, and a new one begins.

        Raises
        ------
        NotAuthenticated, TooManyAttempts
            The present password is wrong.
        WeakPassword
            The new one breaks a rule, or was had before.
        """
        _pk(login)
        name = login.actor.name
        subjects = lock_subjects(name, origin.source)
        account = self._count_attempt(name, subjects, origin, "account.password")
        if account is None or not self.passwords.verify(account.password_hash, present):
            self._refuse(name, origin, "account.password", "wrong password")
        self._forgive(subjects)
        self._rule.check(wanted, account.name)
        password_hash = self._new_hash(account, wanted)
        with self._recorder.transaction() as made:
            connection = made.connection
            set_password(
                connection,
                account,
                password_hash,
                must_change=False,
                now_us=self._clock.now_us(),
                history=self._settings.password_history,
            )
            self._recorder.record(
                login.actor,
                "account.password",
                origin,
                object_kind="account",
                object_id=account.name,
                within=made,
            )
        return self._renewed(login, origin)

    def _new_hash(self, account: AccountRow, wanted: str) -> str:
        with self._database.read() as connection:
            before = rows.old_passwords(
                connection, account.id, max(self._settings.password_history - 1, 0)
            )
        if self._settings.password_history:
            before.insert(0, account.password_hash)
        if any(self.passwords.verify(one, wanted) for one in before):
            raise WeakPassword("used", "was used before")
        return self.passwords.hash(wanted)

    def begin_totp(self, login: Login, origin: Origin) -> TotpSetup:
        """Return a new secret; it counts once a code of it has been shown."""
        secret = new_totp_secret()
        with self._recorder.transaction() as made:
            connection = made.connection
            rows.change_account(connection, _pk(login), totp_pending=secret)
            self._recorder.record(
                login.actor, "account.totp_begin", origin, within=made
            )
        return TotpSetup(secret, totp_uri(secret, login.actor.name, ISSUER))

    def confirm_totp(
        self, login: Login, code: str, present_code: str, origin: Origin
    ) -> tuple[str, Login]:
        """Take the new second factor; every session ends, and a new one begins.

        Parameters
        ----------
        present_code : str
            Of the second factor that is replaced, where there is one.

        Raises
        ------
        NotAuthenticated, TooManyAttempts
            A code is wrong.
        Conflict
            No secret waits to be confirmed.
        """
        _pk(login)
        name, now_us = login.actor.name, self._clock.now_us()
        subjects = lock_subjects(name, origin.source)
        account = self._count_attempt(name, subjects, origin, "account.totp")
        if account is None or not account.totp_pending:
            self._take_back(subjects)
            raise Conflict("ask for a new secret first")
        if account.totp_secret and (
            totp_step(account.totp_secret, present_code, now_us, account.totp_step)
            is None
        ):
            self._refuse(name, origin, "account.totp", "wrong or used code")
        step = totp_step(account.totp_pending, code, now_us, 0)
        if step is None:
            self._refuse(name, origin, "account.totp", "wrong code")
        self._forgive(subjects)
        with self._recorder.transaction() as made:
            connection = made.connection
            rows.change_account(
                connection,
                account.id,
                totp_secret=account.totp_pending,
                totp_pending="",
                totp_step=step,
                updated_us=now_us,
            )
            self._recorder.record(
                login.actor,
                "account.totp",
                origin,
                object_kind="account",
                object_id=account.name,
                within=made,
            )
        return self._renewed(login, origin, second_factor=True)

    def _renewed(
        self, login: Login, origin: Origin, *, second_factor: bool = False
    ) -> tuple[str, Login]:
        """End all sessions of an account and begin one with another id."""
        session = login.session
        had = session is not None and session.second_factor
        self._sessions.end_all(_pk(login))
        with self._database.read() as connection:
            account = rows.account_by_pk(connection, _pk(login))
        if account is None:
            raise NotAuthenticated("the account is gone")
        return self._sessions.open(
            account, address=origin.source, second_factor=had or second_factor
        )


def _pk(login: Login) -> int:
    if login.account_pk is None or login.kind not in {"login", "basic"}:
        raise NotAllowed("only for people who have logged in")
    return login.account_pk


def set_password(
    connection: Connection,
    account: AccountRow,
    password_hash: str,
    *,
    must_change: bool,
    now_us: int,
    history: int,
) -> None:
    """Replace a password, and remember the one it replaces."""
    rows.keep_old_password(
        connection, account.id, account.password_hash, now_us, history
    )
    rows.change_account(
        connection,
        account.id,
        password_hash=password_hash,
        password_us=now_us,
        must_change=int(must_change),
        updated_us=now_us,
    )
