"""Who may do what: the one place that decides, for every door.

It only grows: accounts, purposes and consent join it in later versions; callers
keep asking the same two questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.kernel.errors import NotAllowed, NotAuthenticated
from storage.kernel.types import DEFAULT_TENANT, Actor, Role, TenantId


class Action(StrEnum):
    """What can be asked of the archive."""

    ECHO = "echo"
    STORE = "store"
    FIND = "find"
    GET = "get"
    MOVE = "move"
    COMMIT = "commit"
    DELETE = "delete"
    SETTLE = "settle"
    ADMINISTER = "administer"


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


OPEN_ACTOR = Actor(DEFAULT_TENANT, "open", roles=frozenset({Role.ADMIN}))


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
        role = Role.ADMIN if self._open else Role.MODALITY
        return Actor(
            TenantId(tenant or DEFAULT_TENANT), calling, roles=frozenset({role})
        )

    def _from_known_address(self, peer: KnownPeer, address: str) -> bool:
        """Hold a peer with a literal address to it; open nodes trust loopback."""
        if self._open or not peer.host or not peer.host[0].isdigit():
            return True
        return peer.host == address

    def current_user(self) -> Actor:
        """Return the actor of an HTTP request without credentials.

        Raises
        ------
        NotAuthenticated
            Unless the node is open.
        """
        if self._open:
            return OPEN_ACTOR
        raise NotAuthenticated("log in first")

    def may(self, actor: Actor, action: str) -> bool:
        """Tell whether `actor` may do `action` at all."""
        if Role.ADMIN in actor.roles or Role.SYSTEM in actor.roles:
            return True
        if Role.MODALITY in actor.roles:
            peer = self._peers.find(actor.name)
            return peer is not None and action in peer.may
        return False

    def require(self, actor: Actor, action: str) -> None:
        """Raise NotAllowed unless `actor` may do `action`."""
        if not self.may(actor, action):
            raise NotAllowed(f"{action} is not allowed")

    def resolve(self, actor: Actor, title: str) -> KnownPeer | None:
        """Return the C-MOVE destination called `title`, or None (A801)."""
        peer = self._peers.find(title.strip())
        if peer is None or not peer.host or not peer.port:
            return None
        if peer.tenant and peer.tenant not in actor.tenants:
            return None
        return peer
