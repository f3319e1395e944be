"""What the gate of the web face records of a request.

Text of requests is recorded as it came; `storage.audit` makes it fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from starlette.datastructures import QueryParams
from starlette.types import Scope

from gateway.http.rules import Rule
from gateway.identity.recording import Origin
from pacs.services.permissions import PERMISSIONS, Kind
from pacs.services.policy import purposes
from storage.audit import AuditEvent, Outcome
from storage.kernel.types import Actor

#: Query parameters that name what is asked for: of WADO-URI (PS3.18 9.4), of ours.
_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "/wado": {"studyUID": "study", "seriesUID": "series", "objectUID": "instance"},
    "/api/v1/viewer/series/{series}": {"study": "study"},
    "/api/v1/viewer": {"study": "study", "series": "series"},
}
_KEPT_QUERY = 1024
#: Segments of paths that name an object without a UID.
_OBJECTS = ("name", "title", "transaction")


def named(rule: Rule, names: Mapping[str, str], scope: Scope) -> Mapping[str, str]:
    """Return what a request names by its path and by parameters of its query.

    They are read as the routes read them: of several with one name, the last. The
    server bounds how long a query may be.
    """
    parameters = _PARAMETERS.get(rule.path.partition("/**")[0])
    if parameters is None or not scope["query_string"]:
        return names
    asked = QueryParams(scope["query_string"])
    found = {kind: asked[name] for name, kind in parameters.items() if asked.get(name)}
    return {**names, **found}


def event_of(
    actor: Actor, rule: Rule, names: Mapping[str, str], scope: Scope, origin: Origin
) -> AuditEvent:
    """Return the audit event of a request that was allowed."""
    action = rule.action
    if action is None:
        raise ValueError(rule.path)
    query = scope["query_string"]
    detail = None
    if query:
        detail = {"query": query[:_KEPT_QUERY].decode("latin-1")}
    kind = PERMISSIONS[action][0]
    purpose = actor.purpose
    if purpose is None and kind is Kind.STUDY:
        usual = purposes(actor.roles, action)
        purpose = usual[0] if usual else None
    return AuditEvent(
        action=action.value,
        actor=actor.name,
        tenant=actor.tenant,
        roles=sorted(actor.roles),
        session=actor.session,
        source=origin.source,
        door="web",
        object_kind=_object_kind(kind, names),
        object_id=next((names[one] for one in _OBJECTS if one in names), ""),
        study_uid=names.get("study", ""),
        series_uid=names.get("series", ""),
        instance_uid=names.get("instance", ""),
        purpose="" if purpose is None else purpose.value,
        request_id=origin.request_id,
        detail=detail,
    )


def _object_kind(kind: Kind, names: Mapping[str, str]) -> str:
    if kind is not Kind.STUDY:
        return kind.value
    for name in ("instance", "series", "study"):
        if name in names:
            return name
    return "query"


def with_outcome(event: AuditEvent, status: int, reason: str) -> AuditEvent:
    """Return the event of a request that was answered with `status`."""
    if status < 400 or status in {406, 416}:
        return event
    outcome = Outcome.DENY if status in {401, 403, 404, 410} else Outcome.ERROR
    return replace(event, outcome=outcome, reason=reason or f"HTTP {status}")
