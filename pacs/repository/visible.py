"""Which rows an actor may see: every selection of the index has this condition."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, false, or_

from pacs.repository.tables import Study
from storage.kernel.types import Actor


def studies(actor: Actor) -> ColumnElement[bool]:
    """Return the condition on `Study` rows: the actor's tenants, and its scope."""
    of_tenants = Study.tenant.in_(actor.tenants)
    if actor.scope is None:
        return of_tenants
    return and_(of_tenants, or_(false(), *_in_scope(actor)))


def _in_scope(actor: Actor) -> list[ColumnElement[bool]]:
    scope = actor.scope
    if scope is None:
        return []
    return [
        *(
            and_(
                Study.tenant == key.tenant,
                Study.study_instance_uid == key.study_instance_uid,
            )
            for key in sorted(scope.studies, key=str)
        ),
        *(
            and_(
                Study.tenant == key.tenant,
                Study.issuer == key.issuer,
                Study.patient_id == key.patient_id,
            )
            for key in sorted(scope.patients, key=str)
        ),
    ]
