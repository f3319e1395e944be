"""``/api/v1``: changes, settling, peers, commitments, and what this node is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import orjson
from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response

from gateway.http import access
from pacs.services.commitment import Transaction
from pacs.services.policy import Action, KnownPeer
from pacs.web.request_body import read_body
from storage.audit import AuditEvent
from storage.kernel.errors import InvalidParameter, NotFound
from storage.kernel.types import Actor
from storage.outbox import ChangePage

PREFIX = "/api/v1"
router = APIRouter(tags=["node"])

MAX_CHANGES = 1000
MAX_BODY = 64 * 1024
BODY_SECONDS = 10.0

Uid = Annotated[str, Path(pattern=r"^[0-9A-Za-z._-]{1,64}$")]


class Changes(Protocol):
    """The change feed."""

    def read(
        self, actor: Actor | None, since: int, limit: int, *, epoch: str | None = None
    ) -> ChangePage: ...


class Settler(Protocol):
    """Who completes a study at once."""

    def settle(self, actor: Actor, study_uid: str) -> int: ...


class Peers(Protocol):
    """The remote AEs of this node."""

    def list(self) -> list[KnownPeer]: ...
    def put(self, peer: KnownPeer, by: AuditEvent) -> None: ...
    def remove(self, title: str, by: AuditEvent) -> None: ...


class Commitments(Protocol):
    """The storage commitment transactions."""

    def find(self, actor: Actor, transaction_uid: str) -> Sequence[Transaction]: ...


class Policy(Protocol):
    """Who may do what."""

    def require(self, actor: Actor, action: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What these routes call."""

    changes: Changes
    settling: Settler
    peers: Peers
    commitments: Commitments
    policy: Policy
    facts: Mapping[str, Any]


async def current_actor() -> Actor:
    """Return who asks. The application replaces this dependency."""
    raise NotImplementedError


async def services() -> Services:
    """Return the services. The application replaces this dependency."""
    raise NotImplementedError


Asking = Annotated[Actor, Depends(current_actor)]
Using = Annotated[Services, Depends(services)]


def _json(body: Any, status: int = 200) -> Response:
    return Response(
        orjson.dumps(body),
        status_code=status,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


@router.get("/node")
def read_node(_actor: Asking, using: Using) -> Response:
    """Say what this node is and where it listens."""
    return _json(dict(using.facts))


@router.get("/changes")
def read_changes(
    actor: Asking,
    using: Using,
    since: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    limit: Annotated[int, Query(ge=1)] = 100,
    epoch: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Return the events after position `since`, in order (architecture: events)."""
    using.policy.require(actor, Action.FOLLOW)
    page = using.changes.read(actor, since, min(limit, MAX_CHANGES), epoch=epoch)
    return _json(
        {
            "epoch": page.epoch,
            "events": [
                {
                    "position": event.position,
                    "tenant": event.tenant,
                    "kind": event.kind,
                    "subject": event.subject,
                    "payload": dict(event.payload),
                    "created_us": event.created_us,
                }
                for event in page.events
            ],
            "next": page.next,
            "more": page.more,
            "pruned": page.pruned,
        }
    )


@router.post("/studies/{study}/settle")
def settle(actor: Asking, using: Using, study: Uid) -> Response:
    """Complete a study at once (core: settling); answer its new version."""
    using.policy.require(actor, Action.SETTLE)
    return _json({"version": using.settling.settle(actor, study)})


@router.get("/peers")
def list_peers(actor: Asking, using: Using) -> Response:
    """List the remote AEs."""
    using.policy.require(actor, Action.READ_PEERS)
    return _json([_described(peer) for peer in using.peers.list()])


@router.put("/peers/{title}")
async def put_peer(
    request: Request,
    actor: Asking,
    using: Using,
    title: Annotated[str, Path(max_length=16)],
) -> Response:
    """Add a remote AE or change it."""
    using.policy.require(actor, Action.ADMINISTER)
    peer = _peer(title, await _object(request))
    await to_thread.run_sync(using.peers.put, peer, _changing(actor))
    return _json(_described(peer))


@router.delete("/peers/{title}")
def remove_peer(
    actor: Asking, using: Using, title: Annotated[str, Path(max_length=16)]
) -> Response:
    """Remove a remote AE that was added at run time."""
    using.policy.require(actor, Action.ADMINISTER)
    using.peers.remove(title, _changing(actor))
    return Response(status_code=204)


def _changing(actor: Actor) -> AuditEvent:
    """Return who changes something by this request, for the record of the change."""
    origin = access.access().origin
    return AuditEvent(
        action=Action.ADMINISTER.value,
        actor=actor.name,
        tenant=actor.tenant,
        roles=sorted(actor.roles),
        session=actor.session,
        source=origin.source,
        door=origin.door,
        request_id=origin.request_id,
    )


@router.get("/commitments/{transaction}")
def read_commitment(actor: Asking, using: Using, transaction: Uid) -> Response:
    """Return where a storage commitment transaction stands, for each asking peer."""
    using.policy.require(actor, Action.COMMIT)
    found = using.commitments.find(actor, transaction)
    if not found:
        raise NotFound("no such transaction")
    return _json([_standing(one) for one in found])


def _standing(one: Transaction) -> dict[str, Any]:
    report = one.report
    state = "waiting"
    if report is not None:
        state = "delivered" if report.delivered else "checked"
    return {
        "transaction": one.transaction_uid,
        "peer": one.peer_ae,
        "references": one.n_references,
        "state": state,
        "attempts": one.attempts,
        "committed": None if report is None else len(report.committed),
        "failed": []
        if report is None
        else [
            {
                "class": reference.sop_class_uid,
                "instance": reference.sop_instance_uid,
                "reason": reason,
            }
            for reference, reason in report.failed
        ],
    }


def _described(peer: KnownPeer) -> dict[str, Any]:
    return {
        "title": peer.title,
        "host": peer.host,
        "port": peer.port,
        "tenant": peer.tenant,
        "may": sorted(peer.may),
        "tls": peer.tls,
        "forward": peer.forward,
    }


async def _object(request: Request) -> dict[str, Any]:
    """Read a small JSON object."""
    body = bytearray()
    async for chunk in read_body(request, allowed=MAX_BODY, seconds=BODY_SECONDS):
        body += chunk
    try:
        found = orjson.loads(body)
    except ValueError as error:
        raise InvalidParameter("body", "is not JSON") from error
    if not isinstance(found, dict):
        raise InvalidParameter("body", "is not a JSON object")
    return found


_FIELDS: Mapping[str, type] = {
    "host": str, "port": int, "tenant": str, "may": list, "tls": bool, "forward": bool,
}  # fmt: skip


def _peer(title: str, body: Mapping[str, Any]) -> KnownPeer:
    """Return the peer a request describes; what is wrong is named."""
    for name, value in body.items():
        kind = _FIELDS.get(name)
        if kind is None:
            raise InvalidParameter(name, f"is none of {', '.join(_FIELDS)}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidParameter(name, f"is not a JSON {_JSON_NAMES[kind]}")
    may = body.get("may", ["echo", "store"])
    if not all(isinstance(action, str) for action in may):
        raise InvalidParameter("may", "is not a list of strings")
    return KnownPeer(
        title=title,
        host=body.get("host", ""),
        port=body.get("port", 0),
        tenant=body.get("tenant", ""),
        may=frozenset(may),
        tls=body.get("tls", False),
        forward=body.get("forward", False),
    )


_JSON_NAMES = {str: "string", int: "number", list: "array", bool: "boolean"}
