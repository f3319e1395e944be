"""Requests made from our own OpenAPI description: none is answered 5xx.

`schemathesis` makes legal and illegal requests of every route that the description
names. Each goes through the real listener of an open node; half of them name an object
that is there, so that they get past "no such study", and carry a hostile query.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.support.datasets import ct_slice, part10, uid
from tests.support.dicomweb import multipart
from tests.support.node import RunningNode
from tests.support.web import request

#: Requests for each route and kind; a run over all of them takes about a minute.
EXAMPLES = 25
KNOWN = {
    "study": uid(1), "series": uid(1, 1), "instance": uid(1, 1, 1),
    "frames": "1", "frame": "1", "number": "1", "path": "7FE00010",
}  # fmt: skip
QUERIES: tuple[dict[str, str], ...] = (
    {}, {"limit": "0"}, {"limit": "-1"}, {"limit": "99999999999999999999"},
    {"offset": "999999"}, {"includefield": "all"}, {"includefield": "00080005.1"},
    {"orderby": "'; DROP TABLE study"}, {"cursor": "AAAA"}, {"cursor": "WzAsMCwxXQ"},
    {"PatientName": "*" * 2000}, {"PatientName": "\0"}, {"StudyDate": "-"},
    {"StudyDate": "20240101-99999999"}, {"fuzzymatching": "true"},
    {"window": "1,0,linear"}, {"window": "nan,nan,sigmoid"},
    {"window": "40,400,linear"},
    {"viewport": "0,0"}, {"viewport": "1e9,1e9"}, {"viewport": "64,64,0,0,-8,-8"},
    {"quality": "101"}, {"quality": "1"}, {"annotation": "patient,technique,x"},
    {"accept": "application/zip"}, {"accept": "image/jphc"}, {"accept": "x/y;q=2"},
    {"accept": 'multipart/related; type="'}, {"presentationUID": "1.2"},
    {"requestType": "WADO", "studyUID": uid(1), "seriesUID": uid(1, 1),
     "objectUID": uid(1, 1, 1)},
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    running = RunningNode.start(tmp_path_factory.mktemp("schema"))
    yield running
    running.stop()


def fill(node: RunningNode) -> None:
    """Store what the requests name; some of them delete it."""
    body, headers = multipart([part10(ct_slice(number=n)) for n in (1, 2)])
    answer = request(
        f"{node.dicomweb}/studies", method="POST", body=body, headers=headers
    )
    assert answer.status in {200, 202, 409}, answer.text


def test_no_request_of_the_description_is_answered_5xx(node: RunningNode) -> None:
    schema = schemathesis.openapi.from_url(f"{node.http}/api/openapi.json")
    asked: Counter[int] = Counter()
    failures: list[str] = []
    turn, queries = itertools.count(), itertools.cycle(QUERIES)
    n_operations = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        more: dict[str, str] = {}
        if next(turn) % 2:
            parameters = case.path_parameters
            for name in parameters.keys() & KNOWN.keys():
                parameters[name] = KNOWN[name]
            more = next(queries)
        answer = case.call(timeout=60, params={**case.query, **more})
        asked[answer.status_code] += 1
        if answer.status_code >= 500:
            failures.append(
                f"{case.method} {answer.request.url}: {answer.status_code}"
                f" {answer.text[:300]}"
            )

    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]  # the schema is ours
        n_operations += 1
        fill(node)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                given(case=operation.as_strategy(generation_mode=mode))(run)()
            except Unsatisfiable:
                # A route without parameters can be asked in one way only.
                assert mode is GenerationMode.NEGATIVE

    assert failures == []
    # They were not all refused at the door.
    assert asked[200] > 5 * n_operations, asked
    assert asked[400] > n_operations, asked
    assert asked[404] > n_operations, asked
    assert request(f"{node.http}/readyz").status == 200
