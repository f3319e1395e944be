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
    """What an actor may do; the policy maps roles to actions."""

    ADMIN = "admin"
    SYSTEM = "system"
    MODALITY = "modality"
    ARCHIVE = "archive"
    ANONYMOUS = "anonymous"


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
    """

    tenant: TenantId
    name: str
    readable: frozenset[TenantId] = frozenset()
    roles: frozenset[Role] = frozenset()

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
