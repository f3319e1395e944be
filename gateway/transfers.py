"""What ``huying import`` and ``huying send`` leave in the audit.

Both record before they begin, so that nothing comes or leaves that is not there, and
at the end how it went.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from gateway.console import command_event
from gateway.importer import ImportSummary
from pacs.domain.study import Accepted
from pacs.services.forwarding import Fate
from pacs.services.policy import Action, KnownPeer
from storage.audit import AuditEvent, Outcome
from storage.kernel.types import Purpose

#: Studies that are recorded together.
BATCH = 1000
#: Paths of an import that are named.
MAX_PATHS = 20


class Trail(Protocol):
    """The audit trail."""

    def record(self, event: AuditEvent) -> None: ...
    def record_now(self, event: AuditEvent) -> None: ...
    def flush(self) -> None: ...


class Study(Protocol):
    """An instance that is sent, of a study."""

    @property
    def study_instance_uid(self) -> str: ...


class ImportRecording:
    """Records an import: that it begins, what is stored of which study, its end.

    Parameters
    ----------
    trail : Trail
    paths : sequence of Path
        What was asked for.
    tenant : str
        Who the studies belong to.

    Attributes
    ----------
    summary : ImportSummary or None
        To be set before the end; None: the import was interrupted.
    """

    def __init__(self, trail: Trail, paths: Sequence[Path], tenant: str) -> None:
        self.summary: ImportSummary | None = None
        self._trail = trail
        named = [str(path) for path in paths[:MAX_PATHS]]
        self._event = command_event(
            "import",
            tenant=tenant,
            object_kind="files",
            purpose=Purpose.OPERATION.value,
            detail={"paths": named, "named": len(paths)},
        )

    def __enter__(self) -> None:
        self._trail.record_now(self._event)

    def accepted(self, one: Accepted) -> None:
        """Record that an object was stored, or was already.

        Raises
        ------
        DependencyDown
            It cannot be recorded.
        """
        self._trail.record(
            replace(
                self._event,
                action=Action.STORE.value,
                object_kind="study",
                study_uid=one.study_instance_uid,
                detail={"result": one.outcome.value},
            )
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done, reason = self.summary, ""
        if done is None:
            reason = f"interrupted: {error}" if error else "interrupted"
            done = ImportSummary()
        elif not done.ok:
            reason = done.stopped or f"{done.n_rejected} files rejected"
        # What was stored stands before the end.
        self._trail.flush()
        self._trail.record_now(
            replace(
                self._event,
                action="import.end",
                outcome=Outcome.ERROR if reason else Outcome.ALLOW,
                reason=reason,
                detail={
                    "stored": done.stored,
                    "duplicate": done.duplicate,
                    "skipped": done.skipped,
                    "rejected": done.n_rejected,
                    "bytes": done.n_bytes,
                },
            )
        )


class SendRecording:
    """Records what is sent to a peer: of each study that it begins, and how it ended.

    Parameters
    ----------
    trail : Trail
    peer : KnownPeer
    tenant : str
        Whose studies.
    instances : iterable
        All that is to be sent; those of files need no study.
    """

    def __init__(
        self, trail: Trail, peer: KnownPeer, tenant: str, instances: Iterable[Study]
    ) -> None:
        self._trail = trail
        self._asked = Counter(one.study_instance_uid for one in instances)
        self._fates: dict[str, Counter[Fate]] = {uid: Counter() for uid in self._asked}
        self._reasons: dict[str, str] = {}
        self._where = {
            "destination": peer.title,
            "address": f"{peer.host}:{peer.port}",
        }
        self._event = command_event(
            "send", tenant=tenant, object_kind="study", purpose=Purpose.OPERATION.value
        )

    def __enter__(self) -> Self:
        self._record(
            replace(
                self._event,
                study_uid=uid,
                detail={**self._where, "instances": n_instances},
            )
            for uid, n_instances in self._asked.items()
        )
        return self

    def count(self, instance: Study, fate: Fate, reason: str) -> None:
        """Take note of what became of one instance."""
        uid = instance.study_instance_uid
        self._fates[uid][fate] += 1
        if fate in {Fate.REFUSED, Fate.RETRY}:
            self._reasons.setdefault(uid, reason)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._record(
            self._ended(uid, n_instances) for uid, n_instances in self._asked.items()
        )

    def _ended(self, uid: str, n_instances: int) -> AuditEvent:
        fates = self._fates[uid]
        sent = fates[Fate.STORED] + fates[Fate.NOTED]
        failed = fates[Fate.REFUSED] + fates[Fate.RETRY]
        left = n_instances - sent - failed
        reason = self._reasons.get(uid, "interrupted" if left else "")
        return replace(
            self._event,
            action="send.end",
            outcome=Outcome.ERROR if reason else Outcome.ALLOW,
            reason=reason,
            study_uid=uid,
            detail={**self._where, "sent": sent, "failed": failed, "left": left},
        )

    def _record(self, events: Iterable[AuditEvent]) -> None:
        """Record events; they are durable when this returns."""
        for number, event in enumerate(events, start=1):
            self._trail.record(event)
            if not number % BATCH:
                self._trail.flush()
        self._trail.flush()
