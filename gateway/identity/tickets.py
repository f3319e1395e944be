"""Launch tickets: leave to look at one study or patient, given out once, used once."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import select

from gateway.identity import grants
from gateway.identity import repository as rows
from gateway.identity.grants import TicketRow
from gateway.identity.recording import Origin, Recorder
from gateway.identity.rules import digest_of, new_secret
from gateway.identity.sessions import Login, SessionService, issuer_of, may_issue
from pacs.repository import visible
from pacs.repository.tables import Study
from pacs.services.permissions import Action
from pacs.services.policy import AccessPolicy, purposes
from storage.db.engine import Database
from storage.kernel.clock import Clock
from storage.kernel.errors import (
    InvalidParameter,
    NotAuthenticated,
    NotFound,
    TooLarge,
)
from storage.kernel.settings import Identity
from storage.kernel.types import Actor, PatientKey, Purpose, Scope, StudyKey

#: Tickets of one issuer that wait to be used.
MAX_WAITING = 1000
#: How long used and expired tickets are told from forged ones.
KEPT_US = 86_400_000_000
MAX_SECRET = 128
#: Tenants and issuers that know one Patient ID.
MAX_PATIENTS = 100
#: One answer to whatever is wrong with a ticket.
REFUSED = "the ticket is not good, or no longer"


@dataclass(frozen=True, slots=True)
class WantedTicket:
    """What a ticket is to be for: a study, or a patient.

    Attributes
    ----------
    issuer : str or None
        Issuer of Patient ID (0010,0021); None: the only one there is.
    """

    study_uid: str = ""
    patient_id: str = ""
    issuer: str | None = None
    purpose: str = ""


@dataclass(frozen=True, slots=True)
class IssuedTicket:
    """A ticket as it is handed out."""

    secret: str
    public_id: str
    purpose: str
    expires_us: int


class TicketService:
    """Give out launch tickets, and exchange each once for a session.

    Parameters
    ----------
    database : Database
    clock : Clock
    settings : Identity
    policy : AccessPolicy
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
        sessions: SessionService,
        recorder: Recorder,
    ) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._policy = policy
        self._sessions = sessions
        self._recorder = recorder

    def issue(self, login: Login, wanted: WantedTicket, origin: Origin) -> IssuedTicket:
        """Return a ticket for what the issuer can see.

        Raises
        ------
        NotAllowed
            The issuer may not give out tickets, or not for this purpose.
        NotFound
            No such study or patient, for this issuer.
        NotAuthenticated
            The issuer's session has ended meanwhile.
        InvalidParameter, TooLarge
        """
        actor = self._policy.acting(login.actor, Action.TICKET)
        purpose = _purpose(actor, wanted.purpose)
        self._policy.require(actor, Action.TICKET, purpose=purpose)
        scope = self._scope(actor, wanted)
        secret, public_id = new_secret(), secrets.token_hex(8)
        now_us = self._clock.now_us()
        expires_us = now_us + int(self._settings.ticket_seconds * 1e6)
        session = login.session
        with self._recorder.transaction() as made:
            connection = made.connection
            # Held until the commit: whoever ends the session finds the ticket too.
            if session and not rows.touch_session(connection, session.id, now_us):
                raise NotAuthenticated("the session has ended")
            grants.forget_old_tickets(connection, now_us - KEPT_US)
            if grants.count_tickets(connection, actor.name, now_us) >= MAX_WAITING:
                raise TooLarge("tickets", MAX_WAITING)
            grants.add_ticket(
                connection,
                digest=digest_of(secret),
                public_id=public_id,
                tenant=actor.tenant,
                account_pk=login.account_pk,
                token_pk=login.token_pk,
                issuer=actor.name,
                purpose=purpose.value,
                scope=rows.scope_text(scope),
                created_us=now_us,
                expires_us=expires_us,
            )
            self._recorder.record(
                actor,
                "ticket.issue",
                origin,
                object_kind="ticket",
                object_id=public_id,
                study_uid=wanted.study_uid,
                patient_id=wanted.patient_id,
                purpose=purpose.value,
                within=made,
            )
        return IssuedTicket(secret, public_id, purpose.value, expires_us)

    def _scope(self, actor: Actor, wanted: WantedTicket) -> Scope:
        """Return what the ticket will show: rows that the issuer can see."""
        if bool(wanted.study_uid) == bool(wanted.patient_id):
            raise InvalidParameter("study", "either study or patient_id")
        if wanted.study_uid:
            studies = select(Study.tenant, Study.study_instance_uid).where(
                visible.studies(actor), Study.study_instance_uid == wanted.study_uid
            )
            with self._database.read() as connection:
                keys = {StudyKey(*row) for row in connection.execute(studies)}
            if not keys:
                raise NotFound("no such study")
            return Scope(studies=frozenset(keys))
        query = (
            select(Study.tenant, Study.issuer, Study.patient_id)
            .where(visible.studies(actor), Study.patient_id == wanted.patient_id)
            .distinct()
            .limit(MAX_PATIENTS)
        )
        if wanted.issuer is not None:
            query = query.where(Study.issuer == wanted.issuer)
        with self._database.read() as connection:
            patients = {PatientKey(*row) for row in connection.execute(query)}
        if not patients:
            raise NotFound("no such patient")
        if len({key.issuer for key in patients}) > 1:
            raise InvalidParameter(
                "issuer", "several patients have this Patient ID; name its issuer"
            )
        return Scope(patients=frozenset(patients))

    def is_spent_on(self, actor: Actor, secret: str) -> bool:
        """Tell whether a ticket can no longer be used, but `actor` sees all it named.

        Then whoever follows its link again is shown what it was for, and nothing is
        refused: the link opens nothing that is not open already.
        """
        if not 0 < len(secret) <= MAX_SECRET:
            return False
        now_us = self._clock.now_us()
        with self._database.read() as connection:
            ticket = grants.find_ticket(connection, digest_of(secret))
        if ticket is None or not _reason(ticket, now_us):
            return False
        if not self._policy.may(actor, Action.FIND):
            return False
        held, wanted = self._policy.acting(actor, Action.FIND), ticket.scope
        if held.scope is not None:
            return (
                wanted.studies <= held.scope.studies
                and wanted.patients <= held.scope.patients
            )
        tenants = {key.tenant for key in wanted.studies | wanted.patients}
        return tenants <= set(held.tenants)

    def exchange(self, secret: str, origin: Origin) -> tuple[str, Login]:
        """Return the secret of the session that a ticket opens, and what it can see.

        Raises
        ------
        NotAuthenticated
            Forged, used, expired, withdrawn, or its issuer may no longer give out
            tickets for this. Which of these, only the audit says.
        """
        opened, now_us = new_secret(), self._clock.now_us()
        ticket = login = None
        with self._recorder.transaction() as made:
            connection = made.connection
            if 0 < len(secret) <= MAX_SECRET:
                ticket = grants.find_ticket(connection, digest_of(secret))
            reason = _reason(ticket, now_us)
            if ticket is not None and not reason:
                account = token = None
                if ticket.account_pk is not None:
                    # Held: no change of his rights goes by between this and the
                    # session, which would not end with them.
                    account = rows.account_by_pk(
                        connection, ticket.account_pk, hold=True
                    )
                if ticket.token_pk is not None:
                    token = grants.find_token(connection, pk=ticket.token_pk)
                issuer = issuer_of(account, token, now_us)
                if not may_issue(issuer, ticket.scope, ticket.purpose):
                    reason = "its issuer may no longer"
                elif not grants.use_ticket(connection, ticket.id, now_us):
                    ticket = grants.find_ticket(connection, digest_of(secret))
                    reason = _reason(ticket, now_us) or "used before"
            if ticket is not None and not reason:
                rows.end_old_sessions(connection, now_us)
                values = self._sessions.for_ticket(ticket, address=origin.source)
                rows.add_session(connection, digest=digest_of(opened), **values)
                session = rows.find_session(connection, digest_of(opened))
                if session is not None:
                    login = self._sessions.of_ticket(session, account, token, now_us)
            if ticket is not None and login is not None:
                self._recorder.record(
                    login.actor,
                    "ticket.exchange",
                    origin,
                    object_kind="ticket",
                    object_id=ticket.public_id,
                    study_uid=next(iter(studies_of(ticket.scope)), ""),
                    patient_id=next(iter(patients_of(ticket.scope)), ""),
                    purpose=ticket.purpose,
                    within=made,
                )
        if login is None:
            self._recorder.refuse(
                "" if ticket is None else f"ticket:{ticket.issuer}",
                "ticket.exchange",
                origin,
                reason or "its issuer may no longer",
                object_kind="ticket",
                object_id="" if ticket is None else ticket.public_id,
            )
            raise NotAuthenticated(REFUSED)
        return opened, login


def _purpose(actor: Actor, given: str) -> Purpose:
    """Return the purpose asked for, or the one the role has."""
    if given:
        found = next((one for one in Purpose if one == given), None)
        if found is None:
            raise InvalidParameter("purpose", f"one of {', '.join(Purpose)}")
        return found
    usual = purposes(actor.roles, Action.TICKET)
    return usual[0] if usual else Purpose.TREATMENT


def _reason(ticket: TicketRow | None, now_us: int) -> str:
    """Return what is wrong with a ticket; nothing when it is good."""
    if ticket is None:
        return "forged"
    if ticket.used_us is not None:
        return "used before"
    if ticket.is_withdrawn:
        return "withdrawn: its issuer's rights have changed"
    if now_us >= ticket.expires_us:
        return "expired"
    return ""


def studies_of(scope: Scope) -> list[str]:
    """Return the Study Instance UIDs that a scope names."""
    return sorted({key.study_instance_uid for key in scope.studies})


def patients_of(scope: Scope) -> list[str]:
    """Return the Patient IDs that a scope names."""
    return sorted({key.patient_id for key in scope.patients})
