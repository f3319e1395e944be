"""SQL of searches: rules become a tree of tests, its shape becomes a statement.

The tree without its values is what a statement depends on, so that SQLAlchemy
renders each shape once and the driver prepares it once. A statement names one
tenant: the (tenant, ...) indexes then give the rows and their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as numbers_from
from typing import Any

import orjson
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Select,
    String,
    Table,
    Text,
    UnaryExpression,
    and_,
    any_,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.sql.operators import custom_op

from pacs.domain.matching import (
    Condition,
    NameIs,
    NameLike,
    NamePattern,
    OneOf,
    Range,
    Rule,
    Wildcard,
)
from pacs.domain.study import Level
from pacs.imaging.charset import without_tones
from pacs.repository.tables import Instance, Patient, Series, Study
from storage.kernel.types import Scope

#: Sorts behind every Series Number and Instance Number.
_LAST = 2**62

#: A test on a column: operator, column, or a tree of tests. Hashable: the shape.
Tree = tuple[Any, ...]

_TABLES: dict[str, Table] = {
    model.__tablename__: model.metadata.tables[model.__tablename__]
    for model in (Patient, Study, Series, Instance)
}
#: Patient attributes are matched on the study's columns, where the indexes are.
_MATCHED_IN = {
    Level.PATIENT: "study",
    Level.STUDY: "study",
    Level.SERIES: "series",
    Level.IMAGE: "instance",
}
#: Columns with byte order, where a prefix is a range.
_ORDINAL = frozenset(
    {
        "study.patient_id",
        "study.issuer",
        "study.accession_number",
        "study.study_id",
        "study.name_alphabetic",
        "study.name_ideographic",
        "study.name_phonetic",
    }
)
#: Study columns whose index finds few rows, so that sorting them is cheap.
_SELECTIVE = frozenset(
    {
        "study.study_instance_uid",
        "study.patient_id",
        "study.accession_number",
        "study.name_alphabetic",
        "study.name_ideographic",
    }
)
_NAME_GROUPS = (
    "study.name_alphabetic",
    "study.name_ideographic",
    "study.name_phonetic",
)


@dataclass(frozen=True, slots=True)
class Phase:
    """One statement's part of an order: rows with a first value, then without."""

    number: int
    order_by: tuple[str, ...]
    key: tuple[str, ...]
    extra: Tree


@dataclass(frozen=True, slots=True)
class Statement:
    """Rendered SQL.

    Attributes
    ----------
    names : tuple of str
        Parameters in order, for drivers that count them.
    constants : dict
        Parameters that every run of the statement shares.
    """

    sql: str
    names: tuple[str, ...]
    constants: dict[str, Any]


class Lowering:
    """Turn rules into trees of tests; `values` follow the order of the tests."""

    def __init__(self, *, is_sqlite: bool) -> None:
        self._is_sqlite = is_sqlite
        self.values: list[Any] = []

    def condition(self, found: Condition) -> Tree:
        attribute, rule = found.attribute, found.rule
        name = f"{_MATCHED_IN[attribute.level]}.{attribute.column}"
        if isinstance(rule, NameIs):
            if name == "study.patient_name":
                return self._patient_name(rule)
            return self._referring_name(rule)
        if isinstance(rule, NameLike):
            hay = f"words:{name}"
            return ("and", *(self._word(hay, word) for word in rule.words))
        if attribute.many:
            return self._in_set(name, rule)
        return self._plain(name, rule)

    def scope(self, scope: Scope) -> Tree:
        """Test that a row is in a scope that is not empty."""
        tests: list[Tree] = [
            (
                "and",
                self._test("=", "study.tenant", key.tenant),
                self._test("=", "study.study_instance_uid", key.study_instance_uid),
            )
            for key in sorted(scope.studies, key=str)
        ]
        tests += [
            (
                "and",
                self._test("=", "study.tenant", key.tenant),
                self._test("=", "study.issuer", key.issuer),
                self._test("=", "study.patient_id", key.patient_id),
            )
            for key in sorted(scope.patients, key=str)
        ]
        return tests[0] if len(tests) == 1 else ("union", *tests)

    def free_word(self, word: str) -> Tree:
        """Test a word of the free-text box."""
        return (
            "or",
            self._word("words:study.patient_name", word),
            self._glob("lower:study.patient_id", f"{_literal(word)}*"),
            self._glob("lower:study.accession_number", f"{_literal(word)}*"),
        )

    def _test(self, operator: str, name: str, *values: Any) -> Tree:
        self.values += values
        return (operator, name)

    def _glob(self, name: str, pattern: str) -> Tree:
        return self._test("glob", name, self._pattern(pattern))

    def _pattern(self, pattern: str) -> str:
        """Write a pattern of ``*`` and ``?`` for GLOB or LIKE; the rest is literal."""
        if self._is_sqlite:
            return pattern.replace("[", "[[]")
        escaped = pattern.replace("\\", "\\\\").replace("%", "\\%")
        return escaped.replace("_", "\\_").replace("*", "%").replace("?", "_")

    def _list(self, name: str, values: Sequence[str]) -> Tree:
        """Test against any number of values with one parameter."""
        sent = orjson.dumps(values).decode() if self._is_sqlite else list(values)
        return self._test("list", name, sent)

    def _plain(self, name: str, rule: Rule) -> Tree:
        if isinstance(rule, OneOf):
            if len(rule.values) == 1:
                return self._test("=", name, rule.values[0])
            return self._list(name, [str(value) for value in rule.values])
        if isinstance(rule, Wildcard):
            return self._wildcard(name, rule)
        if isinstance(rule, Range):
            tests = []
            # Points and digits of times sort by bytes, not by a language.
            name = f"bytes:{name}" if name.endswith("_time") else name
            if rule.low is not None:
                tests.append(self._test(">=", name, rule.low))
            if rule.below is not None:
                tests.append(self._test("<", name, rule.below))
            return ("and", *tests)
        return ("blank", name)

    def _wildcard(self, name: str, rule: Wildcard, *, of_name: bool = False) -> Tree:
        """Match a pattern, by the index as far as its prefix goes."""
        tests: list[Tree] = []
        if rule.prefix and name in _ORDINAL:
            tests.append(self._test(">=", name, rule.prefix))
            above = _behind(rule.prefix)
            if above:
                tests.append(self._test("<", name, above))
            if rule.is_prefix:
                return ("and", *tests)
        # Trailing empty components of a stored name do not count.
        hay = f"trim:{name}" if of_name and not rule.pattern.endswith("*") else name
        return ("and", *tests, self._glob(hay, rule.pattern))

    def _in_set(self, name: str, rule: Rule) -> Tree:
        """Match a member of a backslash-joined set."""
        if isinstance(rule, OneOf):
            return (
                "or",
                *(self._glob(f"set:{name}", f"*\\{v}\\*") for v in rule.values),
            )
        if isinstance(rule, Wildcard):
            # The wild card must not reach over into the next member.
            return self._test("any_modality", name, self._pattern(rule.pattern))
        return ("blank", name)

    def _patient_name(self, rule: NameIs) -> Tree:
        if rule.any_group is None:
            pairs = zip(_NAME_GROUPS, rule.groups, strict=False)
            return ("and", *(self._name_group(n, g) for n, g in pairs if g))
        alphabetic, ideographic, phonetic = _NAME_GROUPS
        tests: list[Tree] = [
            self._name_group(alphabetic, rule.any_group),
            self._name_group(ideographic, rule.any_group),
        ]
        if rule.phonetic:
            tests.append(self._name_group(phonetic, rule.any_group))
        else:
            # Only the other groups have an index; a Latin or Chinese phonetic group
            # says something new only where there is no alphabetic group.
            alone = self._test("=", alphabetic, "")
            tests.append(("and", alone, self._name_group(phonetic, rule.any_group)))
        # Each branch by its own index, if each has one.
        return ("union" if all(map(_is_selective, tests)) else "or", *tests)

    def _name_group(self, name: str, pattern: NamePattern) -> Tree:
        tests: list[Tree] = []
        if pattern.exact is not None:
            padded = [pattern.exact + "^" * missing for missing in range(5)]
            self.values += padded
            tests.append(("in", name, len(padded)))
        if pattern.wildcard is not None:
            tests.append(self._wildcard(name, pattern.wildcard, of_name=True))
        return ("or", *tests)

    def _referring_name(self, rule: NameIs) -> Tree:
        """Match groups within ``=group=group=``, the form of the joined column."""
        if rule.any_group is not None:
            return self._referring_group("*=", rule.any_group)
        return (
            "and",
            *(
                self._referring_group("=" + "*=" * place, group)
                for place, group in enumerate(rule.groups)
                if group
            ),
        )

    def _referring_group(self, lead: str, pattern: NamePattern) -> Tree:
        hay = "groups:study.referring_search"
        tests: list[Tree] = []
        if pattern.exact is not None:
            tests.append(self._glob(hay, f"{lead}{pattern.exact}=*"))
        if pattern.wildcard is not None:
            tests.append(self._glob(hay, f"{lead}{pattern.wildcard.pattern}=*"))
        return ("or", *tests)

    def _word(self, hay: str, word: str) -> Tree:
        """Test a word: Latin ones begin a component, Chinese ones may be inside."""
        lead = "*^" if word.isascii() else "*"
        return self._glob(hay, f"{lead}{_literal(without_tones(word))}*")


def _literal(word: str) -> str:
    return word.replace("*", "").replace("?", "")


def _behind(prefix: str) -> str:
    """Return the least string greater than all that begin with `prefix`."""
    for end in range(len(prefix), 0, -1):
        point = ord(prefix[end - 1]) + 1
        if point == 0xD800:
            point = 0xE000
        if point <= 0x10FFFF:
            return prefix[: end - 1] + chr(point)
    return ""


@lru_cache(maxsize=512)
def compile_statement(
    level: Level,
    fields: tuple[str, ...],
    phase: Phase,
    tree: Tree,
    *,
    descending: bool,
    is_after: bool,
    form: str,
    is_sqlite: bool,
) -> Statement:
    """Render the statement of one shape.

    Parameters
    ----------
    form : {"page", "offset", "first", "all", "count"}
        With a limit, limit and offset, limit, neither; how many, up to a limit.
    """
    numbers = numbers_from()
    tests = _clause(tree, numbers, is_sqlite=is_sqlite)
    # Without statistics SQLite takes the index that gives the order, although a
    # selective one gives fewer rows; a sign before the column keeps it from that.
    selective = _is_selective(tree)
    how = "bare:" if is_sqlite and selective else ""
    keys = [_expression(how + name, is_sqlite=is_sqlite) for name in phase.key]
    wanted = [_expression(name, is_sqlite=is_sqlite) for name in fields]
    query = _scoped(level, [*wanted, *keys], tree, tests, is_sqlite=is_sqlite)
    operator, *rest = phase.extra
    extra = (operator, *(how + name for name in rest))
    query = query.where(_clause(extra, numbers, is_sqlite=is_sqlite))
    if is_after:
        bound = [bindparam(f"a{i}", type_=key.type) for i, key in enumerate(keys)]
        left, right = tuple_(*keys), tuple_(*bound)
        query = query.where(left < right if descending else left > right)
    limit: Any = bindparam("limit")
    offset: Any = bindparam("offset")
    if form == "count":
        inner = query.with_only_columns(literal_column("1")).limit(limit).subquery()
        query = select(func.count()).select_from(inner)
    else:
        for name in phase.order_by:
            expression = _expression(how + name, is_sqlite=is_sqlite)
            query = query.order_by(expression.desc() if descending else expression)
        if form != "all":
            query = query.limit(limit)
        if form == "offset":
            query = query.offset(offset)
    dialect = SQLiteDialect_pysqlite() if is_sqlite else _postgresql()
    compiled = query.compile(dialect=dialect)
    constants = {k: v for k, v in compiled.params.items() if v is not None}
    return Statement(compiled.string, tuple(compiled.positiontup or ()), constants)


def _postgresql() -> PGDialect_psycopg:
    return PGDialect_psycopg()  # type: ignore[no-untyped-call]  # not annotated there


def _scoped(
    level: Level,
    wanted: Sequence[ColumnElement[Any]],
    tree: Tree,
    tests: ColumnElement[bool],
    *,
    is_sqlite: bool,
) -> Select[Any]:
    """Return the query of one tenant's rows that pass `tests`."""
    tenant = bindparam("tenant", type_=Text())
    patient, study, series, instance = _TABLES.values()
    in_union = is_sqlite and any(part[0] == "union" for part in tree[1:])
    in_study = (_bare(study.c.tenant) if in_union else study.c.tenant) == tenant
    selective = _is_selective(tree)

    def of_tenant(table: Table) -> ColumnElement[bool]:
        """Test the tenant; on SQLite not by an index that would cost the order."""
        own = table.c.tenant
        return (_bare(own) if is_sqlite else own) == tenant

    if level is Level.PATIENT:
        query = select(*wanted).where(of_tenant(patient))
        if selective:
            theirs = select(study.c.patient_pk).where(in_study, tests)
            return query.where(patient.c.id.in_(theirs))
        of_patient = study.c.patient_pk == patient.c.id
        return query.where(
            select(literal_column("1")).where(of_patient, in_study, tests).exists()
        )
    if level is Level.STUDY:
        return select(*wanted).where(in_study, tests)
    joined = series.join(study, study.c.id == series.c.study_pk)
    own = series
    if level is Level.IMAGE:
        own = instance
        joined = instance.join(series, series.c.id == instance.c.series_pk).join(
            study, study.c.id == series.c.study_pk
        )
    query = select(*wanted).select_from(joined).where(tests)
    if selective:
        return query.where(in_study)
    for table, uid in ((instance, "sop_instance_uid"), (series, "series_instance_uid")):
        if _tests_key(tree, f"{table.name}.{uid}"):
            return query.where(in_study, table.c.tenant == tenant)
    return query.where(of_tenant(study), of_tenant(own))


def _bare(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return ``+column``, which SQLite does not look up in an index."""
    return UnaryExpression(column, operator=custom_op("+"), type_=column.type)


def _is_selective(tree: Tree) -> bool:
    """Tell whether an index finds the few rows that pass."""
    if tree[0] == "and":
        return any(map(_is_selective, tree[1:]))
    if tree[0] in {"or", "union"}:
        return all(map(_is_selective, tree[1:]))
    return tree[0] in {"=", ">=", "in", "list"} and tree[1] in _SELECTIVE


def _tests_key(tree: Tree, name: str) -> bool:
    """Tell whether rows must have one of the given values in column `name`."""
    if tree[0] == "and":
        return any(_tests_key(branch, name) for branch in tree[1:])
    return tree[0] in {"=", "list"} and tree[1] == name


def _clause(
    tree: Tree, numbers: Iterator[int], *, is_sqlite: bool
) -> ColumnElement[bool]:
    """Render a tree of tests; parameters are numbered in the order of the tests."""
    operator = tree[0]
    if operator in {"and", "or", "union"}:
        parts = [_clause(part, numbers, is_sqlite=is_sqlite) for part in tree[1:]]
        if operator == "union" and is_sqlite:
            return _in_union(parts)
        return and_(true(), *parts) if operator == "and" else or_(false(), *parts)
    column = _expression(tree[1], is_sqlite=is_sqlite)
    if operator == "null":
        return column.is_(None)
    if operator == "notnull":
        return column.is_not(None)
    if operator == "blank":
        if isinstance(column.type, String):
            return column.is_(None) | (func.length(column) == 0)
        return column.is_(None)

    def parameter(type_: Any = None) -> Any:
        return bindparam(
            f"p{next(numbers)}", type_=column.type if type_ is None else type_
        )

    if operator == "in":
        return column.in_([parameter() for _ in range(tree[2])])
    if operator == "list":
        if is_sqlite:
            given = func.json_each(parameter(Text())).table_valued("value")
            return column.in_(select(given.c.value))
        return column == any_(parameter(ARRAY(Text())))
    if operator == "any_modality":
        study, series = _TABLES["study"], _TABLES["series"]
        like = _like(series.c.modality, parameter(Text()), is_sqlite=is_sqlite)
        return (
            select(literal_column("1"))
            .select_from(series)
            .where(series.c.study_pk == study.c.id, like)
            .correlate(study)
            .exists()
        )
    if operator == "glob":
        return _like(column, parameter(Text()), is_sqlite=is_sqlite)
    test: ColumnElement[bool] = _COMPARED[operator](column, parameter())
    return test


def _in_union(parts: Sequence[ColumnElement[bool]]) -> ColumnElement[bool]:
    """Find studies that pass one of `parts`; SQLite would scan for an OR."""
    study = _TABLES["study"]
    of_tenant = study.c.tenant == bindparam("tenant", type_=Text())
    found = [
        select(study.c.id).where(of_tenant, part).correlate(None) for part in parts
    ]
    return study.c.id.in_(union_all(*found))


_COMPARED: dict[str, Any] = {
    "=": lambda column, value: column == value,
    ">=": lambda column, value: column >= value,
    "<": lambda column, value: column < value,
}


def _like(
    column: ColumnElement[Any], pattern: Any, *, is_sqlite: bool
) -> ColumnElement[bool]:
    """Compare with a pattern, case mattering: SQLite's LIKE would fold ASCII."""
    return column.bool_op("GLOB")(pattern) if is_sqlite else column.like(pattern)


def _expression(name: str, *, is_sqlite: bool) -> ColumnElement[Any]:
    """Return the column or computed expression called `name`."""
    made = _COMPUTED.get(name.removeprefix("bare:"))
    if made is not None:
        return made
    how, _, rest = name.rpartition(":")
    table, _, column_name = rest.partition(".")
    column: ColumnElement[Any] = _TABLES[table].c[column_name]
    if how == "bytes":
        return column if is_sqlite else column.collate("C")
    if how == "bare":
        return _bare(column)
    if how == "trim":
        return func.rtrim(column, "^")
    if how == "lower":
        return func.lower(column)
    if how == "set":
        return literal_column("'\\'").concat(column).concat(literal_column("'\\'"))
    return column


def _computed() -> dict[str, ColumnElement[Any]]:
    """Make the expressions that are no columns."""
    patient, study, series, instance = _TABLES.values()
    caret: ColumnElement[str] = literal_column("'^'")
    equals: ColumnElement[str] = literal_column("'='")
    joined: ColumnElement[str] = equals.concat(study.c.referring_search).concat(equals)
    for _ in range(4):
        joined = func.replace(joined, "^=", "=")
    spoken: ColumnElement[str] = caret
    for name in ("alphabetic", "ideographic", "phonetic", "pinyin"):
        spoken = spoken.concat(study.c[f"name_{name}"]).concat(caret)
    computed = {
        "groups:study.referring_search": joined,
        "words:study.patient_name": func.replace(spoken, " ", "^"),
        "words:study.referring_physician_name": caret.concat(
            func.replace(func.replace(study.c.referring_search, "=", "^"), " ", "^")
        ),
        "study.itself": literal_column("1", Integer()),
        "series.number_order": func.coalesce(
            series.c.series_number, literal_column(str(_LAST))
        ),
        "instance.number_order": func.coalesce(
            instance.c.instance_number, literal_column(str(_LAST))
        ),
        # Patients without an ID are told apart by a made-up issuer.
        "patient.shown_issuer": case(
            (patient.c.patient_id == literal_column("''"), literal_column("''")),
            else_=patient.c.issuer,
        ),
    }
    theirs = study.alias("theirs")
    for owner, key in (("patient", patient.c.id), ("of_patient", study.c.patient_pk)):
        for name, total in (
            ("n_studies", func.count()),
            ("n_series", func.coalesce(func.sum(theirs.c.n_series), 0)),
            ("n_instances", func.coalesce(func.sum(theirs.c.n_instances), 0)),
        ):
            computed[f"{owner}.{name}"] = (
                select(total)
                .select_from(theirs)
                .where(theirs.c.patient_pk == key)
                .correlate(key.table)
                .scalar_subquery()
            )
    return computed


_COMPUTED = _computed()
