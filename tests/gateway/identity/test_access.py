"""The table of roles: printed, decided by, and kept from saying too much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from gateway import app as composition
from gateway import face
from gateway.http.rules import RULES, Rule, RuleTable
from gateway.reference import CELLS, access_reference
from pacs.services.permissions import (
    COLUMNS,
    GRANTABLE,
    PERMISSIONS,
    PURPOSES,
    SEPARATE,
    Action,
    Kind,
    Relation,
)
from pacs.services.policy import AccessPolicy, KnownPeer, Reason, Resource
from pacs.web.intake import Intake
from storage.db import migrate
from storage.kernel.errors import NotAllowed
from storage.kernel.settings import Settings
from storage.kernel.types import (
    Actor,
    PatientKey,
    Purpose,
    Role,
    Scope,
    StudyKey,
    TenantId,
)
from tests.support.accounts import CHEAP
from tests.support.reference import FOLDER

OWN, GRANTED, OTHER = TenantId("own"), TenantId("granted"), TenantId("other")
MINE = PatientKey("own", "", "P1")
EVERYTHING = frozenset(Action)


class EveryPeer:
    """Knows the modality, and grants it everything."""

    may = EVERYTHING

    def find(self, title: str) -> KnownPeer | None:
        return KnownPeer(title, "", 0, "own", frozenset(self.may))


POLICY = AccessPolicy(our_aes={"HUYING": ""}, peers=EveryPeer(), open_access=False)


def actor(role: Role) -> Actor:
    """Return an actor of one role, with a scope where its role always has one."""
    scoped = role in {Role.PATIENT, Role.TICKET, Role.PENDING}
    scope = Scope(patients=frozenset({MINE})) if scoped else None
    return Actor(OWN, "me", frozenset({GRANTED}), frozenset({role}), scope)


def resource(kind: Kind, relation: Relation) -> Resource:
    """Return something that stands in that relation to `actor`."""
    if relation is Relation.SELF:
        return Resource(kind, OWN, account="me")
    if relation is Relation.PATIENT:
        return Resource(kind, OWN, patient=MINE)
    tenant = {
        Relation.OWN: OWN, Relation.GRANTED: GRANTED, Relation.OTHER: OTHER
    }[relation]  # fmt: skip
    account = "somebody" if kind is Kind.ACCOUNT else ""
    return Resource(kind, tenant, account, patient=PatientKey(tenant, "", "P2"))


def printed_cells() -> Iterator[tuple[Action, Role, frozenset[str]]]:
    """Yield each cell of the table in `docs/access.md`."""
    page = (FOLDER.parent / "access.md").read_text("utf-8")
    table = page.partition("## Actions")[2].partition("## Routes")[0]
    head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    roles = [Role(name) for name in re.findall(r"`(\w+)`", head)]
    for line in rows:
        name, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for role, cell in zip(roles, cells, strict=True):
            said = frozenset() if cell == "–" else frozenset(cell.split(", "))
            yield Action(name.strip("`")), role, said


CELLS_PRINTED = list(printed_cells())


def test_the_page_has_every_cell() -> None:
    assert {(action, role) for action, role, _ in CELLS_PRINTED} == {
        (action, role) for action in Action for role in COLUMNS
    }


@pytest.mark.parametrize(
    ("action", "role", "said"),
    CELLS_PRINTED,
    ids=[f"{action}-{role}" for action, role, _ in CELLS_PRINTED],
)
def test_the_policy_decides_as_the_page_says(
    action: Action, role: Role, said: frozenset[str]
) -> None:
    kind = PERMISSIONS[action][0]
    scoped = actor(role).scope is not None
    for relation in Relation:
        if scoped and relation in {Relation.OWN, Relation.GRANTED}:
            # Whoever has a scope has no tenant beside it.
            wanted = False
        elif not scoped and relation is Relation.PATIENT:
            continue
        else:
            wanted = CELLS.get(relation, "other") in said

        decision = POLICY.decide(actor(role), action, resource(kind, relation))

        assert decision.allowed is wanted, relation
        assert (decision.reason is Reason.ALLOWED) is wanted
    assert POLICY.may(actor(role), action) is bool(said)


def roles_that_may(action: Action, relation: Relation) -> set[Role]:
    return {role for role, cell in PERMISSIONS[action][1].items() if relation in cell}


def test_nobody_does_anything_to_what_is_others() -> None:
    for action in Action:
        assert not roles_that_may(action, Relation.OTHER)


def test_nobody_changes_or_grants_to_himself() -> None:
    for action in (Action.KEEP_ACCOUNTS, Action.GRANT, Action.KEEP_TOKENS):
        assert not roles_that_may(action, Relation.SELF)


def test_three_powers_are_apart() -> None:
    """GB/T 22239-2019: who keeps the node, who gives rights, who watches."""
    powers = {
        role: {action for action, (_, row) in PERMISSIONS.items() if role in row}
        for role in SEPARATE
    }
    shared = set.intersection(*powers.values())

    assert shared <= {Action.INSPECT, Action.PAGE, Action.OWN_ACCOUNT}
    assert Action.ADMINISTER in powers[Role.ADMINISTRATOR]
    assert {Action.GRANT, Action.KEEP_ACCOUNTS} <= powers[Role.SECURITY_ADMINISTRATOR]
    assert powers[Role.AUDITOR] == shared | {Action.READ_AUDIT, Action.READ_ACCOUNTS}
    for role in SEPARATE:
        for action in powers[role]:
            assert PERMISSIONS[action][0] is not Kind.STUDY


def test_a_patient_reads_his_own_and_nothing_else() -> None:
    able = {action for action, (_, row) in PERMISSIONS.items() if Role.PATIENT in row}

    assert able == {Action.FIND, Action.GET, Action.PAGE, Action.OWN_ACCOUNT}


def test_whoever_finds_gets_and_the_other_way_round() -> None:
    """Rows are selected by one set of tenants; so both must reach as far."""
    assert PERMISSIONS[Action.FIND][1] == PERMISSIONS[Action.GET][1]


@pytest.mark.parametrize("role", [role for role in COLUMNS if role in PURPOSES])
@pytest.mark.parametrize("purpose", Purpose)
def test_a_purpose_must_be_one_of_the_role_s(role: Role, purpose: Purpose) -> None:
    decision = POLICY.decide(actor(role), Action.GET, None, purpose)

    assert decision.allowed is (purpose in PURPOSES[role])
    if not decision.allowed:
        assert decision.reason is Reason.PURPOSE


def test_what_is_no_action_is_denied() -> None:
    for role in COLUMNS:
        assert not POLICY.may(actor(role), "fly")
    with pytest.raises(NotAllowed, match="fly"):
        POLICY.require(actor(Role.ADMINISTRATOR), "fly")


def test_without_a_role_nothing_is_allowed() -> None:
    nobody = Actor(OWN, "me")

    assert not any(POLICY.may(nobody, action) for action in Action)


def test_a_remote_ae_needs_its_grant_too() -> None:
    peers = EveryPeer()
    peers.may = frozenset({Action.STORE})
    policy = AccessPolicy(our_aes={"HUYING": ""}, peers=peers, open_access=False)
    asking = actor(Role.MODALITY)

    assert policy.may(asking, Action.STORE)
    assert policy.decide(asking, Action.FIND).reason is Reason.PEER
    assert not policy.may(asking, Action.DELETE)


def test_a_scope_names_studies_too() -> None:
    study = StudyKey("own", "1.2")
    ticket = Actor(
        OWN, "t", roles=frozenset({Role.TICKET}), scope=Scope(frozenset({study}))
    )

    def may(key: StudyKey) -> bool:
        found = Resource(Kind.STUDY, key.tenant, study=key)
        return POLICY.decide(ticket, Action.GET, found).allowed

    assert may(study)
    assert not may(StudyKey("own", "1.3"))
    assert not may(StudyKey("granted", "1.2"))


def test_several_roles_reach_as_far_as_any_of_them_and_no_further() -> None:
    both = Actor(
        OWN,
        "me",
        frozenset({GRANTED}),
        frozenset({Role.ARCHIVE_MANAGER, Role.RADIOLOGIST}),
    )

    assert POLICY.acting(both, Action.FIND).tenants == (GRANTED, OWN)
    assert POLICY.acting(both, Action.FOLLOW).tenants == (OWN,)
    assert not POLICY.decide(both, Action.DELETE, Resource(Kind.STUDY, GRANTED)).allowed


@pytest.mark.parametrize("role", GRANTABLE)
def test_every_role_can_log_in_and_see_a_page(role: Role) -> None:
    assert POLICY.may(actor(role), Action.OWN_ACCOUNT)
    assert POLICY.may(actor(role), Action.PAGE)


# -- routes


def every_route(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Yield method and path of each route, those without a description too."""
    for route in app.routes:
        contexts = getattr(route, "effective_route_contexts", None)
        found: list[Any] = list(contexts()) if contexts else [route]
        for one in found:
            path = getattr(one, "path_format", None) or one.path
            for method in one.methods:
                yield method, path


@pytest.fixture(scope="module")
def web_face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    settings = Settings(data=tmp_path_factory.mktemp("face"), identity=CHEAP)
    migrate.upgrade(settings.database_url())
    node = composition.open_node(settings)
    intake = Intake(node.ingest, settings.limits, body_seconds=1)
    yield face.web_application(node, intake)
    intake.close()
    node.close()


def test_every_route_has_declared_what_it_needs(web_face: FastAPI) -> None:
    table = RuleTable()
    routes = list(every_route(web_face))

    assert len(routes) > 90
    missing = [
        (method, path)
        for method, path in routes
        if table.match(method, path.replace("{path}", "some/path"))[0] is None
    ]
    assert not missing, "add a row to gateway/http/rules.py"


def test_every_rule_that_is_no_pattern_has_a_route(web_face: FastAPI) -> None:
    shapes = {
        (method, re.sub(r"\{[^}]*\}", "{}", path))
        for method, path in every_route(web_face)
    }
    later = {"/dicom-web", "/dicom-web/**", "/api/v1/viewer/**", "/api/v1/audit/**"}

    for rule in RULES:
        if "**" in rule.path or rule.path in later:
            continue
        shape = re.sub(r"\{[^}]*\}", "{}", rule.path)
        assert any((method, shape) in shapes for method in rule.methods), rule.path


#: Routes that ask for no login; each takes care of itself.
PUBLIC = {
    "/healthz", "/readyz", "/metrics", "/login", "/viewer", "/viewer/",
    "/api/v1/login", "/api/v1/tickets/exchange",
}  # fmt: skip


def test_only_these_routes_ask_for_no_login() -> None:
    assert {rule.path for rule in RULES if rule.action is None} == PUBLIC


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "/dicom-web/studies/1.2/series/1.3", Action.GET),
        ("GET", "/dicom-web/studies/1.2/anything/new", Action.GET),
        ("DELETE", "/dicom-web/studies/1.2/anything", None),
        ("GET", "/dicom-web/studies/", None),
        ("GET", "/dicom-web//studies", None),
        ("GET", "/dicom-web/studies/../peers", Action.GET),
        ("GET", "//api/v1/peers", None),
        ("GET", "/api/v1/peers/", None),
        ("GET", "/API/V1/peers", None),
        ("GET", "/api/v1/accounts/x/y", None),
        ("PUT", "/api/v1/accounts/x/roles", Action.GRANT),
        ("GET", "", None),
        ("GET", "*", None),
    ],
)
def test_paths_find_their_rule(method: str, path: str, found: Action | None) -> None:
    rule, _ = RuleTable().match(method, path)

    assert (None if rule is None else rule.action) == found


def test_the_table_refuses_rows_that_contradict() -> None:
    row = Rule(("GET",), "/a/{x}", Action.GET)

    with pytest.raises(ValueError, match="twice"):
        RuleTable([row, Rule(("GET",), "/a/{x}", None)])
    with pytest.raises(ValueError, match="elsewhere"):
        RuleTable([row, Rule(("GET",), "/a/{y}/b", None)])


def test_the_page_is_current() -> None:
    page = Path(FOLDER.parent / "access.md").read_text("utf-8")

    assert page == access_reference(), "run `make docs`"
