"""Deletion over DICOMweb: an extension of the standard, as many archives have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import APIRouter, Depends, Response

from pacs.web.dependencies import (
    Policy,
    access_policy,
    context,
    current_actor,
    path_uid,
)
from storage.kernel.types import Actor

router = APIRouter(tags=["delete"])


class Deletion(Protocol):
    """The deletion service, as far as these routes need it."""

    def delete(
        self,
        actor: Actor,
        study_uid: str,
        series_uid: str | None = None,
        instance_uid: str | None = None,
        *,
        reason: str = "",
    ) -> int:
        """Delete what the UIDs name together; return how many instances that was."""
        ...


async def deletion_service() -> Deletion:
    """Return the deletion service. The application replaces this dependency."""
    raise NotImplementedError


@context
@dataclass(frozen=True, slots=True)
class _Asked:
    actor: Annotated[Actor, Depends(current_actor)]
    policy: Annotated[Policy, Depends(access_policy)]
    deletion: Annotated[Deletion, Depends(deletion_service)]


Asked = Annotated[_Asked, Depends()]


@router.delete("/studies/{study}", status_code=204, response_class=Response)
def delete_study(asked: Asked, study: str) -> Response:
    """Delete a study."""
    return _delete(asked, path_uid("study", study))


@router.delete(
    "/studies/{study}/series/{series}", status_code=204, response_class=Response
)
def delete_series(asked: Asked, study: str, series: str) -> Response:
    """Delete a series."""
    return _delete(asked, path_uid("study", study), path_uid("series", series))


@router.delete(
    "/studies/{study}/series/{series}/instances/{instance}",
    status_code=204,
    response_class=Response,
)
def delete_instance(asked: Asked, study: str, series: str, instance: str) -> Response:
    """Delete an instance."""
    return _delete(
        asked,
        path_uid("study", study),
        path_uid("series", series),
        path_uid("instance", instance),
    )


def _delete(asked: _Asked, *uids: str) -> Response:
    asked.policy.require(asked.actor, "delete")
    asked.deletion.delete(asked.actor, *uids, reason="DICOMweb")
    return Response(status_code=204)
