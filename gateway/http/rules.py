"""What each route needs: the table that the gate of the web face reads.

A path that no row names does not exist for anybody. `{name}` is one segment, which
the audit keeps where it is a UID; `**` is any rest. The first row that matches wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pacs.services.permissions import Action

READ: Final = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route needs.

    Attributes
    ----------
    methods : tuple of str
    path : str
    action : Action or None
        None: everybody may, without a login; the route takes care of itself.
    audited : bool
        The gate records each request; else the service behind the route does, or
        there is nothing to record.
    """

    methods: tuple[str, ...]
    path: str
    action: Action | None
    audited: bool = True


_STUDIES = "/dicom-web/studies"
_V1 = "/api/v1"

RULES: Final[tuple[Rule, ...]] = (
    # Frames first: they are asked for most.
    Rule(READ, f"{_STUDIES}/{{study}}/series", Action.FIND),
    Rule(READ, f"{_STUDIES}/{{study}}/instances", Action.FIND),
    Rule(READ, f"{_STUDIES}/{{study}}/series/{{series}}/instances", Action.FIND),
    Rule(
        READ,
        f"{_STUDIES}/{{study}}/series/{{series}}/instances/{{instance}}/**",
        Action.GET,
    ),
    Rule(
        READ,
        f"{_STUDIES}/{{study}}/series/{{series}}/instances/{{instance}}",
        Action.GET,
    ),
    Rule(READ, f"{_STUDIES}/{{study}}/series/{{series}}/**", Action.GET),
    Rule(READ, f"{_STUDIES}/{{study}}/series/{{series}}", Action.GET),
    Rule(READ, f"{_STUDIES}/{{study}}/**", Action.GET),
    Rule(READ, f"{_STUDIES}/{{study}}", Action.GET),
    Rule(READ, f"{_STUDIES}/count", Action.FIND),
    Rule(READ, f"{_STUDIES}/{{study}}/series/count", Action.FIND),
    Rule(READ, f"{_STUDIES}/{{study}}/instances/count", Action.FIND),
    Rule(READ, f"{_STUDIES}/{{study}}/series/{{series}}/instances/count", Action.FIND),
    Rule(READ, "/dicom-web/series/count", Action.FIND),
    Rule(READ, "/dicom-web/instances/count", Action.FIND),
    Rule(READ, _STUDIES, Action.FIND),
    Rule(READ, "/dicom-web/series", Action.FIND),
    Rule(READ, "/dicom-web/instances", Action.FIND),
    Rule(("POST",), _STUDIES, Action.STORE),
    Rule(("POST",), f"{_STUDIES}/{{study}}", Action.STORE),
    Rule(
        ("DELETE",),
        f"{_STUDIES}/{{study}}/series/{{series}}/instances/{{instance}}",
        Action.DELETE,
    ),
    Rule(("DELETE",), f"{_STUDIES}/{{study}}/series/{{series}}", Action.DELETE),
    Rule(("DELETE",), f"{_STUDIES}/{{study}}", Action.DELETE),
    # Capabilities (PS3.18 8.9) say nothing of patients.
    Rule(("OPTIONS",), "/dicom-web/**", Action.FIND, audited=False),
    Rule(("OPTIONS",), "/dicom-web", Action.FIND, audited=False),
    Rule(READ, "/dicom-web", Action.FIND, audited=False),
    Rule(READ, "/dicom-web/capabilities", Action.FIND, audited=False),
    Rule(READ, "/wado", Action.GET),
    Rule(READ, f"{_V1}/instances/{{instance}}/file", Action.GET),
    Rule(READ, f"{_V1}/study-list", Action.FIND),
    Rule(READ, f"{_V1}/viewer/manifest/{{study}}", Action.GET),
    Rule(READ, f"{_V1}/viewer/overlays/{{study}}", Action.GET),
    Rule(READ, f"{_V1}/viewer/overlays/{{study}}/series/{{series}}", Action.GET),
    Rule(READ, f"{_V1}/viewer/series/{{series}}/**", Action.GET),
    Rule((*READ, "POST"), f"{_V1}/viewer/**", Action.GET),
    Rule(("POST",), f"{_V1}/studies/{{study}}/settle", Action.SETTLE),
    Rule(READ, f"{_V1}/activity", Action.MEASURE, audited=False),
    Rule(READ, f"{_V1}/changes", Action.FOLLOW),
    Rule(READ, f"{_V1}/commitments/{{transaction}}", Action.COMMIT),
    Rule(READ, f"{_V1}/node", Action.INSPECT, audited=False),
    Rule(READ, f"{_V1}/peers", Action.READ_PEERS),
    # The services behind these record what they do, with what it was done to.
    Rule(
        ("PUT", "DELETE"),
        f"{_V1}/peers/{{title}}",
        Action.ADMINISTER,
        audited=False,
    ),
    Rule(("POST",), f"{_V1}/tickets", Action.TICKET, audited=False),
    Rule(("POST",), f"{_V1}/tickets/exchange", None, audited=False),
    Rule(READ, f"{_V1}/accounts", Action.READ_ACCOUNTS),
    Rule(("POST",), f"{_V1}/accounts", Action.KEEP_ACCOUNTS, audited=False),
    Rule(("PUT",), f"{_V1}/accounts/{{name}}/roles", Action.GRANT, audited=False),
    Rule(("POST",), f"{_V1}/accounts/{{name}}/**", Action.KEEP_ACCOUNTS, audited=False),
    Rule(READ, f"{_V1}/tokens", Action.KEEP_TOKENS),
    Rule(("POST",), f"{_V1}/tokens", Action.KEEP_TOKENS, audited=False),
    Rule(("DELETE",), f"{_V1}/tokens/{{name}}", Action.KEEP_TOKENS, audited=False),
    Rule(READ, f"{_V1}/audit", Action.READ_AUDIT),
    Rule(READ, f"{_V1}/audit/**", Action.READ_AUDIT),
    Rule(("POST",), f"{_V1}/login", None, audited=False),
    Rule(("POST",), f"{_V1}/logout", Action.OWN_ACCOUNT, audited=False),
    Rule(READ, f"{_V1}/me", Action.OWN_ACCOUNT, audited=False),
    Rule(("POST",), f"{_V1}/me/password", Action.OWN_ACCOUNT, audited=False),
    Rule(("POST",), f"{_V1}/me/totp", Action.OWN_ACCOUNT, audited=False),
    Rule(READ, "/", Action.PAGE, audited=False),
    Rule(READ, "/assets/{name}", Action.PAGE, audited=False),
    Rule(READ, "/login", None, audited=False),
    Rule(READ, "/viewer", None, audited=False),
    Rule(READ, "/viewer/", None, audited=False),
    Rule(READ, "/api/openapi.json", Action.INSPECT, audited=False),
    Rule(READ, "/healthz", None, audited=False),
    Rule(READ, "/readyz", None, audited=False),
    Rule(READ, "/metrics", None, audited=False),
)


@dataclass(slots=True)
class _Branch:
    """A place in the tree of segments."""

    named: dict[str, _Branch] = field(default_factory=dict)
    any: tuple[str, _Branch] | None = None
    here: dict[str, Rule] = field(default_factory=dict)
    below: dict[str, Rule] = field(default_factory=dict)


class RuleTable:
    """Find the rule of a request.

    Parameters
    ----------
    rules : iterable of Rule

    Raises
    ------
    ValueError
        Two rows name the same method and path, or one segment by two names.
    """

    def __init__(self, rules: Iterable[Rule] = RULES) -> None:
        self._root = _Branch()
        for rule in rules:
            self._add(rule)

    def _add(self, rule: Rule) -> None:
        branch = self._root
        *path, last = rule.path.removeprefix("/").split("/")
        for segment in path if last == "**" else (*path, last):
            if segment.startswith("{"):
                name = segment[1:-1]
                if branch.any is None:
                    branch.any = (name, _Branch())
                if branch.any[0] != name:
                    raise ValueError(
                        f"{rule.path}: {name} is {branch.any[0]} elsewhere"
                    )
                branch = branch.any[1]
            else:
                branch = branch.named.setdefault(segment, _Branch())
        place = branch.below if last == "**" else branch.here
        for method in rule.methods:
            if place.setdefault(method, rule) is not rule:
                raise ValueError(f"{method} {rule.path} is named twice")

    def match(self, method: str, path: str) -> tuple[Rule | None, Mapping[str, str]]:
        """Return the rule of a request, and the segments it names.

        Returns
        -------
        rule : Rule or None
            None: there is no such path, or not with this method (`methods`).
        """
        here, below, names = self._find(path)
        rule = here.get(method) if here else None
        if rule is None:
            for one in reversed(below):
                rule = one.get(method)
                if rule is not None:
                    break
        return rule, names

    def methods(self, path: str) -> frozenset[str]:
        """Return the methods that `path` has; none: there is no such path."""
        here, below, _ = self._find(path)
        return frozenset(here or ()).union(*below)

    def _find(
        self, path: str
    ) -> tuple[dict[str, Rule] | None, list[dict[str, Rule]], dict[str, str]]:
        """Return the rules of a path itself, those of ``**`` above it, and names."""
        segments = path.split("/")
        del segments[0]
        names: dict[str, str] = {}
        below: list[dict[str, Rule]] = []
        branch = self._root
        for position, segment in enumerate(segments):
            if position and branch.below:
                below.append(branch.below)
            following = branch.named.get(segment)
            if following is None:
                if branch.any is None or not segment:
                    return None, below, names
                names[branch.any[0]] = segment
                following = branch.any[1]
            branch = following
        return branch.here, below, names
