"""What each role may do, to what, of whom: the table that the policy reads.

`docs/access.md` is printed from it and tested cell by cell. A row without a role, and
a role without a relation, denies.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from storage.kernel.types import Purpose, Role


class Action(StrEnum):
    """What can be asked for."""

    ECHO = "echo"
    STORE = "store"
    FIND = "find"
    GET = "get"
    MOVE = "move"
    COMMIT = "commit"
    DELETE = "delete"
    SETTLE = "settle"
    TICKET = "ticket"
    FOLLOW = "follow"
    MEASURE = "measure"
    INSPECT = "inspect"
    PAGE = "page"
    ADMINISTER = "administer"
    READ_PEERS = "read_peers"
    READ_ACCOUNTS = "read_accounts"
    KEEP_ACCOUNTS = "keep_accounts"
    GRANT = "grant"
    KEEP_TOKENS = "keep_tokens"
    READ_AUDIT = "read_audit"
    OWN_ACCOUNT = "own_account"


class Kind(StrEnum):
    """What an action is done to."""

    STUDY = "studies"
    FEED = "change feed"
    STATISTICS = "statistics"
    NODE = "node"
    PEER = "peers"
    ACCOUNT = "accounts"
    TOKEN = "tokens"  # noqa: S105  # a kind of thing
    AUDIT = "audit records"
    PAGE = "web page"


class Relation(StrEnum):
    """Whose it is, seen from the actor.

    `PATIENT` is what lies in the actor's scope: a patient's own studies, or those a
    ticket names; an actor with a scope has no tenant beside it.
    """

    OWN = "own tenant"
    GRANTED = "granted tenant"
    PATIENT = "own patient"
    SELF = "self"
    OTHER = "other"


Relations = frozenset[Relation]

_O: Final[Relations] = frozenset({Relation.OWN})
_OG: Final[Relations] = frozenset({Relation.OWN, Relation.GRANTED})
_P: Final[Relations] = frozenset({Relation.PATIENT})
_S: Final[Relations] = frozenset({Relation.SELF})

#: Roles that accounts and tokens can be given; the others come with a door.
GRANTABLE: Final[tuple[Role, ...]] = (
    Role.ADMINISTRATOR,
    Role.SECURITY_ADMINISTRATOR,
    Role.AUDITOR,
    Role.ARCHIVE_MANAGER,
    Role.RADIOLOGIST,
    Role.REVIEWER,
    Role.CLINICIAN,
    Role.PATIENT,
    Role.DEVICE,
)
#: At most one of these in one hand (GB/T 22239-2019 8.1.4.2: three separate powers).
SEPARATE: Final = frozenset(
    {Role.ADMINISTRATOR, Role.SECURITY_ADMINISTRATOR, Role.AUDITOR}
)
#: Roles whose holder has no other.
ALONE: Final = frozenset({Role.PATIENT})
#: The roles of the table's columns, in their order.
COLUMNS: Final[tuple[Role, ...]] = (
    *GRANTABLE,
    Role.TICKET,
    Role.MODALITY,
    Role.PENDING,
)

_EVERYONE: Final[Mapping[Role, Relations]] = dict.fromkeys(
    (*GRANTABLE, Role.TICKET, Role.PENDING), _S
)
_READERS: Final[Mapping[Role, Relations]] = {
    Role.ARCHIVE_MANAGER: _O,
    Role.RADIOLOGIST: _OG,
    Role.REVIEWER: _OG,
    Role.CLINICIAN: _OG,
    Role.PATIENT: _P,
    Role.TICKET: _P,
    Role.DEVICE: _O,
    Role.MODALITY: _O,
}

#: Action to (what it is done to, role to relations). An open node's user and the node
#: itself may do everything. A remote AE needs the grant of its peer entry as well.
PERMISSIONS: Final[Mapping[Action, tuple[Kind, Mapping[Role, Relations]]]] = {
    Action.FIND: (Kind.STUDY, _READERS),
    Action.GET: (Kind.STUDY, _READERS),
    Action.STORE: (
        Kind.STUDY,
        {
            Role.ARCHIVE_MANAGER: _O,
            Role.RADIOLOGIST: _O,
            Role.DEVICE: _O,
            Role.MODALITY: _O,
        },
    ),
    Action.MOVE: (Kind.STUDY, {Role.ARCHIVE_MANAGER: _O, Role.MODALITY: _O}),
    Action.COMMIT: (
        Kind.STUDY,
        {Role.ARCHIVE_MANAGER: _O, Role.DEVICE: _O, Role.MODALITY: _O},
    ),
    Action.DELETE: (Kind.STUDY, {Role.ARCHIVE_MANAGER: _O}),
    Action.SETTLE: (Kind.STUDY, {Role.ARCHIVE_MANAGER: _O, Role.DEVICE: _O}),
    Action.TICKET: (Kind.STUDY, {Role.RADIOLOGIST: _OG, Role.CLINICIAN: _OG}),
    Action.FOLLOW: (Kind.FEED, {Role.ARCHIVE_MANAGER: _O, Role.DEVICE: _O}),
    Action.MEASURE: (
        Kind.STATISTICS,
        {
            Role.ADMINISTRATOR: _O,
            Role.ARCHIVE_MANAGER: _O,
            Role.RADIOLOGIST: _OG,
            Role.REVIEWER: _OG,
            Role.CLINICIAN: _OG,
        },
    ),
    Action.INSPECT: (
        Kind.NODE,
        {role: _O for role in GRANTABLE if role is not Role.PATIENT},
    ),
    # What the page shows, it asks for with the rights of who looks at it.
    Action.PAGE: (Kind.PAGE, dict.fromkeys((*GRANTABLE, Role.TICKET), _S)),
    Action.ECHO: (Kind.NODE, {Role.ADMINISTRATOR: _O, Role.MODALITY: _O}),
    Action.ADMINISTER: (Kind.PEER, {Role.ADMINISTRATOR: _O}),
    Action.READ_PEERS: (Kind.PEER, {Role.ADMINISTRATOR: _O}),
    Action.READ_ACCOUNTS: (
        Kind.ACCOUNT,
        {Role.SECURITY_ADMINISTRATOR: _OG, Role.AUDITOR: _OG},
    ),
    # Without SELF: nobody changes, or gives roles to, the account he acts with.
    Action.KEEP_ACCOUNTS: (Kind.ACCOUNT, {Role.SECURITY_ADMINISTRATOR: _OG}),
    Action.GRANT: (Kind.ACCOUNT, {Role.SECURITY_ADMINISTRATOR: _OG}),
    Action.OWN_ACCOUNT: (Kind.ACCOUNT, _EVERYONE),
    Action.KEEP_TOKENS: (Kind.TOKEN, {Role.SECURITY_ADMINISTRATOR: _OG}),
    Action.READ_AUDIT: (Kind.AUDIT, {Role.AUDITOR: _OG}),
}

#: Reasons a role may give for looking at patient data; the first is taken for granted.
PURPOSES: Final[Mapping[Role, tuple[Purpose, ...]]] = {
    Role.ARCHIVE_MANAGER: (Purpose.OPERATION,),
    Role.RADIOLOGIST: (Purpose.TREATMENT, Purpose.QUALITY),
    Role.REVIEWER: (Purpose.QUALITY,),
    Role.CLINICIAN: (Purpose.TREATMENT,),
    Role.PATIENT: (Purpose.OWN,),
    Role.DEVICE: (Purpose.OPERATION, Purpose.TREATMENT),
    Role.TICKET: tuple(Purpose),
    Role.MODALITY: (Purpose.OPERATION, Purpose.TREATMENT),
    Role.SYSTEM: tuple(Purpose),
    Role.OPEN: tuple(Purpose),
}
