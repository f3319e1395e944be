"""Identifiers and small values that travel between packages."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType, Protocol

TenantId = NewType("TenantId", str)
"""The institution that owns a row: a short slug, e.g. ``"default"``."""

SopInstanceUid = NewType("SopInstanceUid", str)
SeriesInstanceUid = NewType("SeriesInstanceUid", str)
StudyInstanceUid = NewType("StudyInstanceUid", str)

Digest = NewType("Digest", bytes)
"""SHA-256 over the data set bytes as received, 32 bytes."""


class PendingDigest(Protocol):
    """A digest that may still be computed; the objects of `hashlib` are some."""

    def digest(self) -> bytes:
        """Return it, waiting if need be."""
        ...


DEFAULT_TENANT = TenantId("default")


class Role(StrEnum):
    """What an actor is; `pacs.services.permissions` says what each role may do.

    `OPEN` is whoever reaches an open node, `SYSTEM` the node itself, `MODALITY` a
    remote AE, `DEVICE` a machine with a token, `TICKET` a session that a launch
    ticket opened, `PENDING` somebody who has logged in but must change the password
    or set up a second factor first.
    """

    ADMINISTRATOR = "administrator"
    SECURITY_ADMINISTRATOR = "security_administrator"
    AUDITOR = "auditor"
    ARCHIVE_MANAGER = "archive_manager"
    RADIOLOGIST = "radiologist"
    REVIEWER = "reviewer"
    CLINICIAN = "clinician"
    PATIENT = "patient"
    DEVICE = "device"
    TICKET = "ticket"
    PENDING = "pending"
    MODALITY = "modality"
    SYSTEM = "system"
    OPEN = "open"


class Purpose(StrEnum):
    """Why patient data are looked at; every access is recorded with one."""

    TREATMENT = "treatment"
    QUALITY = "quality"
    OPERATION = "operation"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class StudyKey:
    """A study of one tenant."""

    tenant: str
    study_instance_uid: str


@dataclass(frozen=True, slots=True)
class PatientKey:
    """A patient of one tenant: (issuer, Patient ID), never the ID alone."""

    tenant: str
    issuer: str
    patient_id: str


@dataclass(frozen=True, slots=True)
class Scope:
    """The only rows an actor may see of its tenants; empty: none."""

    studies: frozenset[StudyKey] = frozenset()
    patients: frozenset[PatientKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks, and for which institutions.

    Attributes
    ----------
    tenant : TenantId
        Home tenant: what the actor writes belongs there.
    name : str
        AE title, account or service name; for logs and audit.
    readable : frozenset of TenantId
        Tenants whose rows the actor's queries may return.
    roles : frozenset of Role
    scope : Scope or None
        Narrows the rows further: a patient's own, or what a ticket names.
    purpose : Purpose or None
        Why this actor looks at patient data; None: as its role has it.
    session : str
        The login, ticket or token it came with; for audit, useless to log in with.
    """

    tenant: TenantId
    name: str
    readable: frozenset[TenantId] = frozenset()
    roles: frozenset[Role] = frozenset()
    scope: Scope | None = None
    purpose: Purpose | None = None
    session: str = ""

    @property
    def tenants(self) -> tuple[TenantId, ...]:
        """All tenants a query of this actor may touch, sorted."""
        return tuple(sorted({self.tenant, *self.readable}))


class Door(StrEnum):
    """Through which door an object arrived."""

    DIMSE = "dimse"
    WEB = "web"
    IMPORT = "import"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Source:
    """Where an arriving object came from.

    Attributes
    ----------
    door : Door
    calling_ae, called_ae : str
        AE titles of the association; empty for other doors.
    peer : str
        Network address or path; for the record header, never for a decision.
    origin : str
        ``"external"``, or the part of Huying that made the object
        (``"ai"``, ``"report"``); such objects never start AI again.
    """

    door: Door
    calling_ae: str = ""
    called_ae: str = ""
    peer: str = ""
    origin: str = field(default="external")
