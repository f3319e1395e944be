"""Who did what to which object: an append-only, hash-chained record.

Doors make an `AuditEvent` and hand it to the one `AuditTrail` of their process.
"""

from storage.audit.event import AuditEvent, Outcome
from storage.audit.trail import AuditTrail

__all__ = ["AuditEvent", "AuditTrail", "Outcome"]
