"""``huying init``, ``huying user`` and ``huying token``.

Whoever may run commands on the data folder is the node itself to them; the audit names
the user of the operating system. `gateway.cli` registers these commands.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.options import Config, Data, opened, settings_for
from gateway.options import Http as HttpOption
from storage.kernel.errors import InvalidParameter, NotFound
from storage.kernel.types import DEFAULT_TENANT, Actor, PatientKey

if TYPE_CHECKING:
    from gateway.identity.grants import TokenRow
    from gateway.identity.recording import Origin
    from gateway.identity.repository import AccountRow
    from storage.kernel.settings import Http

user_app = typer.Typer(help="Accounts of people.", no_args_is_help=True)
token_app = typer.Typer(help="Tokens of machines.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME")]
Roles = Annotated[
    list[str], typer.Option("--role", help="A role; may be given several times.")
]
Tenant = Annotated[str, typer.Option(help="The institution it belongs to.")]
Reads = Annotated[
    list[str] | None,
    typer.Option("--reads", help="Another institution whose studies it may see."),
]
#: What the first account can do: keep the node, and its archive.
FIRST_ROLES = ("administrator", "archive_manager")


def add_commands(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(init)
    app.add_typer(user_app, name="user")
    app.add_typer(token_app, name="token")


def init(
    *,
    admin: Annotated[
        str, typer.Option(help="Name of the first account.", metavar="NAME")
    ] = "admin",
    tenant: Tenant = DEFAULT_TENANT,
    http: HttpOption = None,
    data: Data = None,
    config: Config = None,
) -> None:
    """Make the database and the first administrator; print his password, once."""
    from gateway.identity.services import NewAccount

    with opened(settings_for(data, config, http=http), make=True) as node:
        password = node.identity.accounts.add(
            _operator(),
            NewAccount(admin, tenant, FIRST_ROLES, "first administrator"),
            _origin(),
            first=True,
        )
        web = _web_address(node.settings.http)
    _print_password(admin.strip().lower(), password)
    typer.echo(
        f"Start the node with `huying serve`, open {web}/ and log in: the page asks"
        " for a password of your own and sets up a second factor.\n"
        f"{admin.strip().lower()} keeps the node and its archive, for the start:"
        f" {' and '.join(FIRST_ROLES)}.\n"
        "Give everybody an account with the roles of their work, and part these two:"
        " `huying user add NAME --role radiologist`;\n"
        "`huying user roles NAME --role ROLE` changes them."
    )


@user_app.command("add")
def user_add(
    name: Name,
    *,
    role: Roles,
    tenant: Tenant = DEFAULT_TENANT,
    reads: Reads = None,
    display_name: Annotated[str, typer.Option(help="As people know them.")] = "",
    patient: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose studies a patient sees: ID, or ID^^^ISSUER.", metavar="ID"
        ),
    ] = None,
    data: Data = None,
    config: Config = None,
) -> None:
    """Make an account, and print the password to log in with once."""
    from gateway.identity.services import NewAccount

    wanted = NewAccount(
        name,
        tenant,
        tuple(role),
        display_name,
        tuple(reads or ()),
        tuple(_patient(tenant, one) for one in patient or ()),
    )
    with opened(settings_for(data, config)) as node:
        password = node.identity.accounts.add(_operator(), wanted, _origin())
    _print_password(name.strip().lower(), password)


@user_app.command("list")
def user_list(*, data: Data = None, config: Config = None) -> None:
    """List the accounts."""
    after = ""
    with opened(settings_for(data, config)) as node:
        while found := node.identity.accounts.list(
            _operator(), after=after, limit=1000
        ):
            for one in found:
                typer.echo(_account_line(one))
            after = found[-1].name


@user_app.command("disable")
def user_disable(name: Name, *, data: Data = None, config: Config = None) -> None:
    """Let nobody log in with an account, and end its sessions."""
    with opened(settings_for(data, config)) as node:
        node.identity.accounts.disable(_operator(), name, _origin())


@user_app.command("enable")
def user_enable(name: Name, *, data: Data = None, config: Config = None) -> None:
    """Let an account be used again; a lock after failures is lifted too."""
    with opened(settings_for(data, config)) as node:
        node.identity.accounts.enable(_operator(), name, _origin())


@user_app.command("reset-password")
def user_reset(name: Name, *, data: Data = None, config: Config = None) -> None:
    """Print a new password to log in with once; all sessions end."""
    with opened(settings_for(data, config)) as node:
        password = node.identity.accounts.reset_password(_operator(), name, _origin())
    _print_password(name.strip().lower(), password)


@user_app.command("roles")
def user_roles(
    name: Name,
    *,
    role: Roles,
    reads: Reads = None,
    data: Data = None,
    config: Config = None,
) -> None:
    """Give an account these roles instead of those it has; its sessions end."""
    with opened(settings_for(data, config)) as node:
        node.identity.accounts.set_roles(
            _operator(), name, role, _origin(), readable=reads
        )


@user_app.command("totp")
def user_totp(
    name: Name,
    *,
    reset: Annotated[
        bool, typer.Option("--reset", help="Forget it; the next login sets it up.")
    ] = False,
    data: Data = None,
    config: Config = None,
) -> None:
    """Say whether an account has a second factor, or forget one that was lost."""
    with opened(settings_for(data, config)) as node:
        if reset:
            node.identity.accounts.reset_totp(_operator(), name, _origin())
        account = node.identity.accounts.find(_operator(), name)
    if account is None:
        raise NotFound("no such account")
    typer.echo("has a second factor" if account.totp_secret else "no second factor")


@token_app.command("add")
def token_add(
    name: Name,
    *,
    role: Roles,
    tenant: Tenant = DEFAULT_TENANT,
    reads: Reads = None,
    days: Annotated[
        float | None, typer.Option(help="How long it is good; default: the longest.")
    ] = None,
    data: Data = None,
    config: Config = None,
) -> None:
    """Make a token, and print it, once."""
    from gateway.identity.services import NewAccount

    wanted = NewAccount(name, tenant, tuple(role), readable=tuple(reads or ()))
    with opened(settings_for(data, config)) as node:
        token = node.identity.tokens.add(_operator(), wanted, _origin(), days=days)
    typer.echo(token)


@token_app.command("list")
def token_list(*, data: Data = None, config: Config = None) -> None:
    """List the tokens, revoked ones too."""
    with opened(settings_for(data, config)) as node:
        for one in node.identity.tokens.list(_operator()):
            typer.echo(_token_line(one))


@token_app.command("revoke")
def token_revoke(name: Name, *, data: Data = None, config: Config = None) -> None:
    """Revoke a token. Running processes know within seconds."""
    with opened(settings_for(data, config)) as node:
        node.identity.tokens.revoke(_operator(), name, _origin())


def _operator() -> Actor:
    """Return who runs the command."""
    from gateway.console import operator

    return operator()


def _web_address(http: Http) -> str:
    """Return where a browser on this machine, or behind the proxy, finds the page."""
    if http.external_url:
        return http.external_url.rstrip("/")
    # Listening on all addresses is no address to open.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{http.port}"


def _origin() -> Origin:
    from gateway.console import DOOR
    from gateway.identity.recording import Origin

    return Origin(door=DOOR)


def _patient(tenant: str, text: str) -> PatientKey:
    """Return the patient that ``ID`` or ``ID^^^ISSUER`` names (HL7 v2 CX)."""
    patient_id, *rest = text.split("^")
    if len(rest) not in {0, 3} or any(rest[:2]):
        raise InvalidParameter("patient", f"{text} is not ID or ID^^^ISSUER")
    return PatientKey(tenant, rest[2] if rest else "", patient_id)


def _print_password(name: str, password: str) -> None:
    typer.echo(f"account     {name}")
    typer.echo(f"password    {password}")
    typer.echo("It is not shown again, and must be changed at the first login.")


def _account_line(one: AccountRow) -> str:
    marks = [
        *(["disabled"] if not one.is_active else []),
        *(["second factor"] if one.totp_secret else []),
        *([f"reads {' '.join(sorted(one.readable))}"] if one.readable else []),
    ]
    roles = " ".join(sorted(one.roles))
    return "  ".join((f"{one.name:<24}", f"{one.tenant:<16}", roles, *marks))


def _token_line(one: TokenRow) -> str:
    until = datetime.fromtimestamp(one.expires_us / 1e6, UTC).date().isoformat()
    state = "revoked" if one.revoked_us is not None else f"until {until}"
    roles = " ".join(sorted(one.roles))
    return "  ".join((f"{one.name:<24}", f"{one.tenant:<16}", roles, state))
