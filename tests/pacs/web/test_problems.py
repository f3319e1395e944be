"""Errors as HTTP answers: every class of the tree has its status."""

from __future__ import annotations

import orjson
import pytest
from starlette.exceptions import HTTPException

from pacs.web.problems import failure_reason, problem_response
from storage.kernel import errors

CASES: list[tuple[Exception, int]] = [
    (errors.MalformedObject("m", 0x00100020), 400),
    (errors.InvalidParameter("p", "d"), 400),
    (errors.IdentityMismatch("m", 0x00100020), 400),
    (errors.Unsupported("u"), 406),
    (errors.UnsupportedSopClass("u"), 406),
    (errors.UnsupportedTransferSyntax("u"), 406),
    (errors.TooLarge("frames_list", 1), 413),
    (errors.NotFound("n"), 404),
    (errors.Gone("g"), 410),
    (errors.Conflict("c"), 409),
    (errors.DuplicateInstance("1.2", "00"), 409),
    (errors.NewerSchema("n"), 409),
    (errors.NotAllowed("n"), 403),
    (errors.NotAuthenticated("n"), 401),
    (errors.CodeNeeded("n"), 401),
    (errors.TooManyAttempts(30), 429),
    (errors.StorageFull("s"), 507),
    (errors.DependencyDown("d"), 503),
    (errors.LostRace("l"), 503),
    (errors.Cancelled("c"), 503),
    (errors.CorruptData("c"), 500),
    (errors.ImagingError("i"), 500),
    (HTTPException(405, headers={"Allow": "GET"}), 405),
    (ValueError("secret"), 500),
]


@pytest.mark.parametrize(("error", "status"), CASES, ids=lambda one: str(one)[:20])
def test_every_class_has_its_status(error: Exception, status: int) -> None:
    answer = problem_response(error)

    assert answer.status_code == status
    body = orjson.loads(bytes(answer.body))
    assert body["status"] == status
    assert body["code"]
    assert answer.media_type == "application/problem+json"


def test_no_class_of_the_tree_is_forgotten() -> None:
    def tree(kind: type[errors.ImagingError]) -> set[type[Exception]]:
        return {kind}.union(*(tree(sub) for sub in kind.__subclasses__()))

    ours = {
        kind for kind in tree(errors.ImagingError) if kind.__module__ == errors.__name__
    }
    # Branches that are never raised themselves.
    abstract = {errors.InvalidInput, errors.Unavailable}
    assert ours - abstract <= {type(error) for error, _ in CASES}


def test_what_is_not_ours_says_nothing_about_itself() -> None:
    assert b"secret" not in bytes(problem_response(ValueError("secret")).body)


def test_who_may_retry_is_told_when() -> None:
    assert "retry-after" in problem_response(errors.LostRace("l")).headers
    assert "www-authenticate" in problem_response(errors.NotAuthenticated("")).headers
    not_allowed = problem_response(HTTPException(405, headers={"Allow": "GET"}))
    assert not_allowed.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.DuplicateInstance("1.2", "00"), 0x0111),
        (errors.UnsupportedSopClass("u"), 0x0122),
        (errors.UnsupportedTransferSyntax("u"), 0xC122),
        (errors.IdentityMismatch("m", 0x00100020), 0xA900),
        (errors.TooLarge("x", 1), 0xA700),
        (errors.StorageFull("s"), 0xA700),
        (errors.MalformedObject("m"), 0xC000),
        (errors.Conflict("c"), 0x0110),
    ],
)
def test_failure_reasons(error: errors.ImagingError, reason: int) -> None:
    assert failure_reason(error) == reason
