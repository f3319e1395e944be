"""Who may do what: the one place that decides, for every door.

`AccessPolicy.decide` is asked by DIMSE, DICOMweb, REST and the pages; it denies
whatever `pacs.services.permissions` does not allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Protocol

from pacs.services.permissions import (
    PERMISSIONS,
    PURPOSES,
    Action,
    Kind,
    Relation,
    Relations,
)
from storage.kernel.errors import NotAllowed
from storage.kernel.types import (
    DEFAULT_TENANT,
    Actor,
    PatientKey,
    Purpose,
    Role,
    StudyKey,
    TenantId,
)

__all__ = [
    "OPEN_ACTOR",
    "AccessPolicy",
    "Action",
    "Decision",
    "KnownPeer",
    "PeerDirectory",
    "Reason",
    "Refused",
    "Resource",
]


class Reason(StrEnum):
    """Why a decision is as it is."""

    ALLOWED = "allowed"
    ROLE = "no role of the actor may do this"
    RELATION = "not to what belongs to others"
    PURPOSE = "not for this purpose"
    PEER = "the peer entry does not grant it"
    PENDING = "the password must be changed, or a second factor set up, first"


@dataclass(frozen=True, slots=True)
class Resource:
    """What an action is done to.

    Attributes
    ----------
    tenant : str
        Whose it is; empty: only what the actor's queries return, which are scoped.
    account : str
        Name of an account, for actions on accounts.
    study : StudyKey, optional
    patient : PatientKey, optional
    """

    kind: Kind
    tenant: str = ""
    account: str = ""
    study: StudyKey | None = None
    patient: PatientKey | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Allowed or not, and why."""

    allowed: bool
    reason: Reason


_ALLOWED = Decision(allowed=True, reason=Reason.ALLOWED)
_DENIED = {
    reason: Decision(allowed=False, reason=reason)
    for reason in Reason
    if reason is not Reason.ALLOWED
}
#: Who may do everything: the node itself, and whoever reaches an open one.
_EVERYTHING = frozenset({Role.SYSTEM, Role.OPEN})


class Refused(StrEnum):
    """Why an association is rejected (PS3.8 9.3.4)."""

    CALLED_AE = "called AE title not recognized"
    CALLING_AE = "calling AE title not recognized"


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """A remote AE as the policy sees it.

    Attributes
    ----------
    may : frozenset of str
        Values of `Action` it may ask for.
    forward : bool
        Whether every settled study of its tenant is sent to it.
    """

    title: str
    host: str
    port: int
    tenant: str
    may: frozenset[str]
    tls: bool = False
    forward: bool = False


class PeerDirectory(Protocol):
    """Remote AEs, configured in the file or at run time."""

    def find(self, title: str) -> KnownPeer | None:
        """Return the peer with this AE title, or None."""
        ...


#: What an actor with a scope can do anything to.
_OF_SCOPED = frozenset({Relation.PATIENT, Relation.SELF})

OPEN_ACTOR = Actor(DEFAULT_TENANT, "open", roles=frozenset({Role.OPEN}))


@lru_cache(maxsize=1024)
def relations(roles: frozenset[Role], action: str) -> Relations:
    """Return to whose things actors of `roles` may do `action`."""
    row = PERMISSIONS.get(Action(action))
    if row is None:
        return frozenset()
    found: set[Relation] = set()
    for role in roles:
        found |= row[1].get(role, frozenset())
    return frozenset(found)


def relation_of(actor: Actor, resource: Resource) -> Relation:
    """Return what `resource` is to `actor`."""
    if resource.account and (resource.account, resource.tenant) == (
        actor.name,
        actor.tenant,
    ):
        return Relation.SELF
    if actor.scope is not None:
        inside = (
            resource.study in actor.scope.studies
            or resource.patient in actor.scope.patients
        )
        return Relation.PATIENT if inside else Relation.OTHER
    if resource.tenant == actor.tenant:
        return Relation.OWN
    if resource.tenant in actor.readable:
        return Relation.GRANTED
    return Relation.OTHER


@lru_cache(maxsize=1024)
def purposes(roles: frozenset[Role], action: str) -> tuple[Purpose, ...]:
    """Return why actors of `roles` may look at patient data; the first by default."""
    row = PERMISSIONS.get(Action(action))
    able = [role for role in PURPOSES if row is not None and role in row[1]]
    return tuple(
        dict.fromkeys(
            purpose
            for role in (*able, *_EVERYTHING)
            if role in roles
            for purpose in PURPOSES[role]
        )
    )


class AccessPolicy:
    """Decide about associations, requests and destinations.

    Parameters
    ----------
    our_aes : mapping of str to str
        Our AE titles and the tenant each belongs to; empty: by calling AE.
    peers : PeerDirectory
    open_access : bool
        ``--open``: whoever reaches the loopback address is administrator.
    """

    def __init__(
        self,
        *,
        our_aes: Mapping[str, str],
        peers: PeerDirectory,
        open_access: bool,
    ) -> None:
        self._our_aes = dict(our_aes)
        self._peers = peers
        self._open = open_access

    def admit(
        self,
        called_ae: str,
        calling_ae: str,
        address: str,
        *,
        certificate_name: str | None = None,
    ) -> Actor | Refused:
        """Return the actor an association acts as, or why it is rejected.

        The tenant comes from the called AE, then from the calling AE.

        Parameters
        ----------
        certificate_name : str, optional
            Common Name of a verified client certificate: it must name the peer, by
            its AE title or its host.
        """
        called, calling = called_ae.strip(), calling_ae.strip()
        if called not in self._our_aes:
            return Refused.CALLED_AE
        peer = self._peers.find(calling)
        if peer is None and not self._open:
            return Refused.CALLING_AE
        if peer is not None and not self._from_known_address(peer, address):
            return Refused.CALLING_AE
        names = {peer.title, peer.host} if peer is not None else {calling}
        if certificate_name is not None and certificate_name not in names:
            return Refused.CALLING_AE
        tenant = self._our_aes[called] or (peer.tenant if peer else "")
        role = Role.OPEN if self._open else Role.MODALITY
        return Actor(
            TenantId(tenant or DEFAULT_TENANT), calling, roles=frozenset({role})
        )

    def _from_known_address(self, peer: KnownPeer, address: str) -> bool:
        """Hold a peer with a literal address to it; open nodes trust loopback."""
        if self._open or not peer.host or not peer.host[0].isdigit():
            return True
        return peer.host == address

    def decide(
        self,
        actor: Actor,
        action: str,
        resource: Resource | None = None,
        purpose: Purpose | None = None,
    ) -> Decision:
        """Decide whether `actor` may do `action` to `resource`.

        Parameters
        ----------
        action : str
            A value of `Action`; another is denied.
        resource : Resource, optional
            Without one, or without its tenant, whether there is anything at all to
            which the actor may do it: which rows those are, queries take from the
            actor (`acting`).
        purpose : Purpose, optional
            Else the actor's own, else that of its role.
        """
        if not _EVERYTHING.isdisjoint(actor.roles):
            return _ALLOWED
        if action not in PERMISSIONS:
            return _DENIED[Reason.ROLE]
        allowed = relations(actor.roles, action)
        if not allowed:
            pending = Role.PENDING in actor.roles
            return _DENIED[Reason.PENDING if pending else Reason.ROLE]
        if resource is not None and resource.tenant:
            if relation_of(actor, resource) not in allowed:
                return _DENIED[Reason.RELATION]
        elif actor.scope is not None and allowed.isdisjoint(_OF_SCOPED):
            return _DENIED[Reason.RELATION]
        if PERMISSIONS[Action(action)][0] is Kind.STUDY:
            wanted = purpose or actor.purpose
            if wanted is not None and wanted not in purposes(actor.roles, action):
                return _DENIED[Reason.PURPOSE]
        if Role.MODALITY in actor.roles:
            peer = self._peers.find(actor.name)
            if peer is None or action not in peer.may:
                return _DENIED[Reason.PEER]
        return _ALLOWED

    def acting(self, actor: Actor, action: str) -> Actor:
        """Return `actor` with no more tenants than `action` may reach."""
        if (
            actor.readable
            and actor.scope is None
            and _EVERYTHING.isdisjoint(actor.roles)
            and Relation.GRANTED not in relations(actor.roles, action)
        ):
            return replace(actor, readable=frozenset())
        return actor

    def may(self, actor: Actor, action: str) -> bool:
        """Tell whether `actor` may do `action` at all."""
        return self.decide(actor, action).allowed

    def require(
        self,
        actor: Actor,
        action: str,
        resource: Resource | None = None,
        purpose: Purpose | None = None,
    ) -> None:
        """Raise NotAllowed unless `actor` may do `action`."""
        decision = self.decide(actor, action, resource, purpose)
        if not decision.allowed:
            raise NotAllowed(f"{action} is not allowed: {decision.reason}")

    def resolve(self, actor: Actor, title: str) -> KnownPeer | None:
        """Return the C-MOVE destination called `title`, or None (A801)."""
        peer = self._peers.find(title.strip())
        if peer is None or not peer.host or not peer.port:
            return None
        if peer.tenant and peer.tenant not in actor.tenants:
            return None
        return peer
