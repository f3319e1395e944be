"""Who runs a command: as the services know him, and as the audit names him."""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING, Any

from storage.kernel.types import DEFAULT_TENANT, Actor, Role, TenantId

if TYPE_CHECKING:
    from storage.audit import AuditEvent

DOOR = "cli"


def operator(tenant: str = DEFAULT_TENANT) -> Actor:
    """Return who runs the command: the node itself, by the name of its user.

    Parameters
    ----------
    tenant : str
        For whose studies.
    """
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return Actor(TenantId(tenant), f"cli:{user}", roles=frozenset({Role.SYSTEM}))


def command_event(
    action: str, *, tenant: str = DEFAULT_TENANT, **fields: Any
) -> AuditEvent:
    """Return the event of whoever runs the command; `fields` of `AuditEvent`."""
    from storage.audit import AuditEvent

    actor = operator(tenant)
    return AuditEvent(
        action=action,
        actor=actor.name,
        tenant=actor.tenant,
        roles=sorted(actor.roles),
        door=DOOR,
        **fields,
    )
