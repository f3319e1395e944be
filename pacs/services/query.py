"""One search for every door: C-FIND, QIDO-RS and the study list of the web page."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson
from sqlalchemy import Connection

from pacs.domain.fragments import merged
from pacs.domain.matching import (
    BY_TAG,
    LEVELS,
    REQUEST_ATTRIBUTES_SEQUENCE,
    UNIQUE_KEYS,
    conditions,
    has_wildcard,
    reaches,
    supported,
)
from pacs.domain.study import Level, StoredInstance
from pacs.repository import locate
from pacs.repository.search import (
    ORDERS,
    Order,
    Selection,
    count,
    first_instances,
    page,
    stream,
)
from pacs.services import cursors
from pacs.services.answers import (
    ANSWERS,
    AVAILABILITY,
    KEY_FIELDS,
    SearchRequest,
    field_of,
)
from pacs.services.study_list import (
    StudyFilter,
    StudyList,
    StudySummary,
    list_studies,
)
from storage.db.engine import Database
from storage.kernel.errors import (
    InvalidParameter,
    NotFound,
    TooLarge,
    Unavailable,
    format_tag,
)
from storage.kernel.limits import Limits
from storage.kernel.types import Actor

__all__ = [
    "ROOTS",
    "HeaderSource",
    "QueryService",
    "SearchPage",
    "SearchRequest",
    "StudyFilter",
    "StudyList",
    "StudySummary",
]

#: Levels of each Query/Retrieve information model (PS3.4 C.6.1, C.6.2, C.6.3).
ROOTS: Mapping[str, tuple[Level, ...]] = {
    "PATIENT": LEVELS,
    "STUDY": LEVELS[1:],
    "PATIENT_STUDY_ONLY": LEVELS[:2],
}


#: What a page says that is not the last (PS3.18 8.3.4.4).
ADDITIONAL = "There are additional results that can be requested."


class HeaderSource(Protocol):
    """Gives attributes that the index does not hold."""

    def metadata(self, instance: StoredInstance) -> bytes:
        """Return an instance's attributes as one JSON object (PS3.18 Annex F)."""
        ...


@dataclass(frozen=True, slots=True)
class SearchPage:
    """The answer to a search.

    Attributes
    ----------
    rows : tuple of str
        JSON objects.
    more : bool
        More matches can be asked for, by `cursor` or by offset.
    total : int or None
        All matches, when known.
    at_least : bool
        Counting stopped at `total`; there may be more.
    warnings : tuple of str
        Texts for ``Warning: 299`` (PS3.18 8.3.4).
    """

    rows: tuple[str, ...]
    more: bool = False
    cursor: str = ""
    total: int | None = None
    at_least: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def body(self) -> bytes:
        """The rows as a JSON array."""
        return f"[{','.join(self.rows)}]".encode()


class QueryService:
    """Search studies, series and instances for an actor.

    Parameters
    ----------
    database : Database
    limits : Limits
    headers : HeaderSource, optional
        Without it ``includefield`` knows indexed attributes only.
    """

    def __init__(
        self,
        *,
        database: Database,
        limits: Limits,
        headers: HeaderSource | None = None,
    ) -> None:
        self._database = database
        self._limits = limits
        self._headers = headers

    def supported(self, level: Level) -> frozenset[int]:
        """Return the tags that `find` at `level` answers with."""
        return supported(level)

    def find(
        self,
        actor: Actor,
        level: Level,
        keys: Mapping[int, str],
        *,
        root: str,
        relational: bool = False,
        fuzzy: bool = False,
        limit: int | None = None,
    ) -> Generator[Mapping[int, str], None, None]:
        """Find matches of a C-FIND identifier (PS3.4 C.4.1.3), newest study first.

        Each match has the text of every known attribute among `keys` and of the
        unique keys down to `level`. Close the iterator to stop early: it holds a
        server-side cursor.

        Raises
        ------
        InvalidParameter
            The level is not of this root, a unique key of a level above is no
            single value, or a key has the wrong form. Raised at once.
        TooLarge
            While iterating: more than `limit` or ``find_results`` matches.
        """
        levels = ROOTS.get(root)
        if levels is None or level not in levels:
            raise InvalidParameter("QueryRetrieveLevel", f"{level} is not of this root")
        above = levels[: levels.index(level)]
        if not relational:
            _check_hierarchy(above, keys)
        wanted = conditions(level, keys, self._limits, fuzzy=fuzzy)
        unique = {UNIQUE_KEYS[upper] for upper in (*above, level)}
        tags = sorted(supported(level) & (keys.keys() | unique) - {AVAILABILITY})
        selection = Selection(
            level, wanted, tuple(field_of(level, tag) for tag in tags)
        )
        allowed = self._limits.find_results
        if limit is not None:
            allowed = min(allowed, limit)
        constant = {}
        if AVAILABILITY in keys and level is not Level.PATIENT:
            constant[AVAILABILITY] = "ONLINE"
        return self._matches(actor, selection, tags, constant, allowed)

    def _matches(
        self,
        actor: Actor,
        selection: Selection,
        tags: Sequence[int],
        constant: Mapping[int, str],
        allowed: int,
    ) -> Generator[Mapping[int, str], None, None]:
        with (
            self._database.read() as connection,
            closing(stream(connection, actor, selection)) as rows,
        ):
            for number, row in enumerate(rows):
                if number >= allowed:
                    raise TooLarge("find_results", allowed)
                match = {
                    tag: value
                    if type(value) is str
                    else ("" if value is None else str(value))
                    for tag, value in zip(tags, row, strict=True)
                }
                match.update(constant)
                yield match

    def search(self, actor: Actor, level: Level, request: SearchRequest) -> SearchPage:
        """Answer a QIDO-RS search with ready JSON (PS3.18 10.6).

        Raises
        ------
        InvalidParameter, TooLarge
            A key, the cursor or the order has the wrong form.
        """
        keys, contradiction = _within(request)
        if contradiction:
            return SearchPage((), total=0)
        warnings = [
            f"Matching on {format_tag(tag)} is not supported at this level; ignored."
            for tag in sorted(keys)
            if not reaches(level, tag) or not _is_matched(tag)
        ]
        limit = self._limits.query_limit
        if request.limit is not None:
            if request.limit > limit:
                warnings.append(f"The limit was reduced to {limit}.")
            limit = min(limit, request.limit)
        if not 0 <= request.offset < 2**62:
            raise InvalidParameter("offset", "out of range")
        order = _order(level, request)
        answer = ANSWERS[level](request)
        selection = Selection(
            level,
            conditions(level, keys, self._limits, fuzzy=request.fuzzy),
            (KEY_FIELDS[level], *answer.fields),
            order=order,
        )
        after = cursors.decode(request.cursor, selection) if request.cursor else None
        extra = self._not_indexed(level, request, warnings)
        with self._database.read() as connection:
            found = page(
                connection,
                actor,
                selection,
                limit=limit + 1,
                offset=request.offset,
                after=after,
            )
            kept = found.rows[:limit]
            more = len(found.rows) > limit
            total, at_most = None, self._limits.find_results
            if request.total:
                total = count(connection, actor, selection, at_most=at_most)
            elif not more and after is None and (kept or not request.offset):
                total = request.offset + len(kept)
            rows = answer.render(row[1:] for row in kept)
            if extra and kept:
                places = [row[0] for row in kept]
                headers = self._read_headers(connection, actor, level, places, warnings)
                rows = [
                    merged(row, {tag: head[tag] for tag in extra if tag in head})
                    for row, head in zip(rows, headers, strict=True)
                ]
        cursor = ""
        if more:
            warnings.append(ADDITIONAL)
            last = found.place(limit - 1) if limit else None
            cursor = cursors.encode(last, selection) if last is not None else ""
        at_least = request.total and total == at_most
        return SearchPage(tuple(rows), more, cursor, total, at_least, tuple(warnings))

    def count(self, actor: Actor, level: Level, request: SearchRequest) -> SearchPage:
        """Count the matches of a search without answering with any.

        Raises
        ------
        InvalidParameter, TooLarge
            As `search`.
        """
        whole = replace(request, limit=0, offset=0, cursor="", order="", total=True)
        found = self.search(actor, level, whole)
        warnings = tuple(text for text in found.warnings if text != ADDITIONAL)
        return replace(found, more=False, cursor="", warnings=warnings)

    def _not_indexed(
        self, level: Level, request: SearchRequest, warnings: list[str]
    ) -> tuple[str, ...]:
        """Return the attributes that must be read from stored headers."""
        tags = sorted(
            tag
            for tag in request.include
            if tag not in BY_TAG
            and tag != REQUEST_ATTRIBUTES_SEQUENCE
            and reaches(level, tag)
        )
        if tags and self._headers is None:
            warnings.append("Attributes that are not indexed are not returned.")
            return ()
        return tuple(f"{tag:08X}" for tag in tags)

    def _read_headers(
        self,
        connection: Connection,
        actor: Actor,
        level: Level,
        pks: Sequence[int],
        warnings: list[str],
    ) -> list[dict[str, Any]]:
        """Read one representative header for each row; empty where there is none."""
        stored = _representatives(connection, actor, level, pks)
        headers: list[dict[str, Any]] = []
        for pk in pks:
            try:
                body = self._metadata_of(stored[pk]) if pk in stored else b"{}"
                headers.append(orjson.loads(body))
            except (NotFound, Unavailable):
                headers.append({})
        if not all(headers):
            warnings.append("Attributes of some results could not be read.")
        return headers

    def _metadata_of(self, instance: StoredInstance) -> bytes:
        return b"{}" if self._headers is None else self._headers.metadata(instance)

    def list_studies(
        self,
        actor: Actor,
        wanted: StudyFilter,
        *,
        cursor: str = "",
        limit: int = 50,
    ) -> StudyList:
        """Return a page of the study list, newest first."""
        with self._database.read() as connection:
            return list_studies(
                connection, actor, wanted, self._limits, cursor=cursor, limit=limit
            )


def _order(level: Level, request: SearchRequest) -> Order | None:
    """Return the order that was asked for; None: the level's own.

    Raises
    ------
    InvalidParameter
        This search has no such order. Series and instances have theirs within a study
        only: over all of them no index could give it.
    """
    if not request.order:
        return None
    known = ORDERS[level] if level is Level.STUDY or request.study_uid else {}
    if request.order not in known:
        names = ", ".join(known) or "nothing"
        raise InvalidParameter("orderby", f"this search is ordered by {names}")
    return known[request.order]


def _check_hierarchy(above: Iterable[Level], keys: Mapping[int, str]) -> None:
    """Require the unique key of each level above as a single value (C.4.1.3.1)."""
    for upper in above:
        tag = UNIQUE_KEYS[upper]
        value = keys.get(tag, "").strip(" \0")
        if (
            not value
            or has_wildcard(value)
            or (upper is not LEVELS[0] and "\\" in value)
        ):
            raise InvalidParameter(
                BY_TAG[tag].keyword, "is required, as a single value, at this level"
            )


def _is_matched(tag: int) -> bool:
    attribute = BY_TAG.get(tag)
    return attribute is not None and bool(attribute.column)


def _within(request: SearchRequest) -> tuple[dict[int, str], bool]:
    """Add the parents to the keys; tell whether both name different ones."""
    keys = dict(request.keys)
    parents = (
        (UNIQUE_KEYS[Level.STUDY], request.study_uid),
        (UNIQUE_KEYS[Level.SERIES], request.series_uid),
    )
    for tag, uid in parents:
        if uid is None:
            continue
        asked = keys.get(tag, "").strip(" \0*")
        if asked and uid not in asked.split("\\"):
            return keys, True
        keys[tag] = uid
    return keys, False


def _representatives(
    connection: Connection, actor: Actor, level: Level, pks: Sequence[int]
) -> dict[int, StoredInstance]:
    """Return a stored instance for each row: itself, or the first of its kind."""
    firsts = first_instances(connection, actor, level, pks)
    uids = list(dict.fromkeys(uid for _, uid in firsts.values()))
    # The same UID may be stored for several tenants: row keys tell them apart.
    by_pk = {
        stored.pk: stored
        for stored in locate.by_keys(connection, actor, instance_uids=uids)
    }
    return {pk: by_pk[first] for pk, (first, _) in firsts.items() if first in by_pk}
