"""``/api/v1/audit``: search the audit, newest first, in pages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

import orjson
from fastapi import APIRouter, Depends, Query, Response
from sqlalchemy import select

from gateway.http.api import Asking, Policy
from pacs.repository.tables import Study
from pacs.services.policy import Action
from storage.audit import Outcome
from storage.audit.search import MAX_PAGE, AuditPage, AuditQuery, as_json
from storage.db.engine import Database
from storage.kernel.errors import InvalidParameter
from storage.kernel.types import Actor

router = APIRouter(tags=["audit"])

#: Studies of one patient that are looked for.
MAX_STUDIES = 50
#: RFC 3339, with or without its time; without an offset it is UTC.
_INSTANT = re.compile(
    r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:\d\d)?)?",
    re.ASCII,
)
_DAY_CHARS = len("2026-01-31")
_DAY_US = 86_400 * 1_000_000


#: What records can say was asked for: actions of the policy, and what services do.
ACTIONS = frozenset(
    {
        *(action.value for action in Action),
        "account.add", "account.disable", "account.enable", "account.password",
        "account.reset", "account.roles", "account.totp", "account.totp_begin",
        "account.totp_reset", "associate", "audit.accept", "audit.export",
        "audit.resume", "audit.search", "audit.verify", "forward", "forward.end",
        "import", "import.end", "login", "logout", "peer.add", "peer.change",
        "peer.remove", "send", "send.end", "ticket.exchange", "ticket.issue",
        "token.add", "token.revoke",
    }
)  # fmt: skip


class Reader(Protocol):
    """Who searches the audit."""

    def search(
        self,
        actor: Actor | None,
        query: AuditQuery,
        limit: int,
        cursor: str | None = None,
    ) -> AuditPage: ...


class Studies(Protocol):
    """Finds the studies of a patient."""

    def of_patient(self, actor: Actor | None, patient_id: str) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What this route calls."""

    reader: Reader
    studies: Studies
    policy: Policy


class PatientStudies:
    """The studies of a patient, from the index."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of_patient(self, actor: Actor | None, patient_id: str) -> Sequence[str]:
        """Return UIDs of the newest studies with this Patient ID (0010,0020).

        Accesses name studies, and seldom patients. Studies that were deleted are
        found by their own UID only.

        Parameters
        ----------
        actor : Actor or None
            Whose tenants are looked at; None: all.
        """
        if not patient_id:
            return ()
        query = (
            select(Study.study_instance_uid)
            .where(Study.patient_id == patient_id)
            .order_by(Study.id.desc())
            .limit(MAX_STUDIES)
        )
        if actor is not None:
            query = query.where(Study.tenant.in_(actor.tenants))
        with self._database.read() as connection:
            return list(dict.fromkeys(connection.scalars(query)))


async def services() -> Services:
    """Return the services. The application replaces this dependency."""
    raise NotImplementedError


Text = Annotated[str, Query(max_length=128)]


@router.get("/audit")
def search_audit(
    asking: Asking,
    using: Annotated[Services, Depends(services)],
    actor: Text = "",
    patient: Text = "",
    study: Text = "",
    action: Text = "",
    outcome: Outcome | None = None,
    since: Text = "",
    until: Text = "",
    limit: Annotated[int, Query(ge=1)] = 100,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Return audit records that match all that is given; newest first.

    `since` and `until` are dates or times (RFC 3339, UTC unless they say otherwise);
    a date as `until` includes its day. `patient` finds the accesses to the studies
    that have this Patient ID now. `next` is the `cursor` of the following page,
    which may come before the page has `limit` records; null: there is none.
    """
    using.policy.require(asking, Action.READ_AUDIT)
    studies = using.studies.of_patient(asking, patient)
    query = replace(
        query_of(actor, patient, study, action, outcome, since, until), studies=studies
    )
    page = using.reader.search(asking, query, min(limit, MAX_PAGE), cursor)
    body: dict[str, Any] = {
        "records": [as_json(row) for row in page.records],
        "next": page.next,
    }
    return Response(
        orjson.dumps(body),
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def query_of(
    actor: str,
    patient: str,
    study: str,
    action: str,
    outcome: Outcome | None,
    since: str,
    until: str,
) -> AuditQuery:
    """Return what is looked for.

    Raises
    ------
    InvalidParameter
        `since` or `until` is no time, or nothing is recorded as `action`.
    """
    if action and action not in ACTIONS:
        known = ", ".join(sorted(ACTIONS))
        raise InvalidParameter("action", f"{action} is none of {known}")
    until_us = instant("until", until)
    if until_us is not None and len(until) == _DAY_CHARS:
        until_us += _DAY_US - 1
    return AuditQuery(
        actor=actor,
        patient_id=patient,
        study_uid=study,
        action=action,
        outcome=outcome,
        since_us=instant("since", since),
        until_us=until_us,
    )


def instant(name: str, text: str) -> int | None:
    """Return the microseconds since 1970 that `text` names; None for no text.

    Examples
    --------
    >>> instant("since", "1970-01-02T08:00:00+08:00")
    86400000000

    Raises
    ------
    InvalidParameter
    """
    if not text:
        return None
    try:
        if not _INSTANT.fullmatch(text):
            raise ValueError
        found = datetime.fromisoformat(text)
        if found.tzinfo is None:
            found = found.replace(tzinfo=UTC)
        # Whole numbers: a float would lose microseconds.
        passed = found - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidParameter(
            name, "is no date or time like 2026-01-31T08:30:00Z"
        ) from error
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds
