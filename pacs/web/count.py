"""How many matches a search has: an extension of QIDO-RS.

The answer is ``{"count": n, "approximate": false}``; the query is that of the search.
An approximate count is where counting stopped.
"""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Response

from pacs.domain.study import Level
from pacs.web.negotiation import DICOM_JSON, Offer, accept_of, choose
from pacs.web.search import Asked, SearchContext

router = APIRouter(tags=["search"])


@router.get("/studies/count")
def count_studies(asked: Asked) -> Response:
    """Count studies."""
    return _count(asked, Level.STUDY)


@router.get("/series/count")
def count_series(asked: Asked) -> Response:
    """Count series."""
    return _count(asked, Level.SERIES)


@router.get("/instances/count")
def count_instances(asked: Asked) -> Response:
    """Count instances."""
    return _count(asked, Level.IMAGE)


@router.get("/studies/{study}/series/count")
def count_series_of_study(asked: Asked, study: str) -> Response:
    """Count the series of a study."""
    return _count(asked, Level.SERIES, study)


@router.get("/studies/{study}/instances/count")
def count_instances_of_study(asked: Asked, study: str) -> Response:
    """Count the instances of a study."""
    return _count(asked, Level.IMAGE, study)


@router.get("/studies/{study}/series/{series}/instances/count")
def count_instances_of_series(asked: Asked, study: str, series: str) -> Response:
    """Count the instances of a series."""
    return _count(asked, Level.IMAGE, study, series)


def _count(
    asked: SearchContext,
    level: Level,
    study: str | None = None,
    series: str | None = None,
) -> Response:
    parsed = asked.parsed(study, series)
    # What negotiation calls DICOM JSON is what clients call JSON.
    choose(accept_of(asked.request), (Offer(DICOM_JSON),))
    found = asked.query.count(asked.actor, level, parsed.search)
    body = orjson.dumps({"count": found.total or 0, "approximate": found.at_least})
    response = Response(body, media_type="application/json")
    asked.describe(response, parsed, found)
    return response
