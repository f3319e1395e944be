"""Logging in, the own account, accounts, tokens and launch tickets over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from gateway.http.access import access, is_navigation
from gateway.http.bodies import Fields, json_answer, read_object
from gateway.http.client import Clients
from gateway.identity.grants import TokenRow
from gateway.identity.logins import LoginService
from gateway.identity.repository import AccountRow
from gateway.identity.services import AccountService, NewAccount
from gateway.identity.sessions import Login, csrf_of
from gateway.identity.tickets import (
    TicketService,
    WantedTicket,
    patients_of,
    studies_of,
)
from gateway.identity.tokens import TokenService
from pacs.services.permissions import Action
from pacs.services.policy import AccessPolicy
from storage.kernel.errors import InvalidParameter, NotAllowed, NotAuthenticated
from storage.kernel.types import Actor, PatientKey

PREFIX = "/api/v1"
router = APIRouter(tags=["identity"])
#: Outside the prefix: what people type or click.
pages = APIRouter(tags=["page"])

#: Where a browser goes once its ticket is exchanged.
AFTER_TICKET = "/"
MAX_LIMIT = 1000

Name = Annotated[str, Path(max_length=64, pattern=r"^[0-9A-Za-z._@-]+$")]


@dataclass(frozen=True, slots=True)
class CookieForm:
    """How the session's cookie is written.

    Attributes
    ----------
    is_secure : bool
        Browsers send it over TLS only; then its name keeps others from setting it.
    """

    is_secure: bool

    @property
    def name(self) -> str:
        return "__Host-huying" if self.is_secure else "huying"

    def set_on(self, response: Response, secret: str, login: Login) -> None:
        """Give a browser its session, until that ends at the latest."""
        session = login.session
        if session is None:
            raise NotAllowed("no session")
        response.set_cookie(
            self.name,
            secret,
            max_age=(session.expires_us - session.created_us) // 1_000_000,
            path="/",
            secure=self.is_secure,
            httponly=True,
            samesite="lax",
        )

    def clear_on(self, response: Response) -> None:
        response.delete_cookie(
            self.name,
            path="/",
            secure=self.is_secure,
            httponly=True,
            samesite="lax",
        )


@dataclass(frozen=True, slots=True)
class Services:
    """What these routes call.

    Attributes
    ----------
    login_page : Response
        For everybody.
    policy : AccessPolicy
        Tells pages what they need not offer.
    """

    logins: LoginService
    accounts: AccountService
    tokens: TokenService
    tickets: TicketService
    clients: Clients
    cookie: CookieForm
    external_url: str
    login_page: Response
    policy: AccessPolicy


async def services() -> Services:
    """Return the services. The application replaces this dependency."""
    raise NotImplementedError


Using = Annotated[Services, Depends(services)]


@router.post("/login")
async def log_in(request: Request, using: Using) -> Response:
    """Log in with `name`, `password` and, where a second factor is set up, `code`.

    Answers with a session cookie and the token for the header ``X-CSRF-Token``.
    """
    _same_origin(request, using)
    fields = Fields(await read_object(request))
    name, password = fields.text("name"), fields.text("password")
    code = fields.text("code", "", 16)
    fields.end()
    here = access()
    secret, login = await run_in_threadpool(
        using.logins.log_in, name, password, code, here.origin
    )
    if here.cookie:
        # Whatever session the browser had, it is over.
        await run_in_threadpool(
            using.logins.log_out, here.cookie, login.actor, here.origin
        )
    return _begun(using, secret, login)


@router.post("/logout", status_code=204, response_class=Response)
async def log_out(using: Using) -> Response:
    """End the session."""
    here, login = access(), _logged_in()
    if not here.cookie:
        raise InvalidParameter("session", "only sessions end; tokens are revoked")
    await run_in_threadpool(using.logins.log_out, here.cookie, login.actor, here.origin)
    response = Response(status_code=204)
    using.cookie.clear_on(response)
    return response


@router.get("/me")
def read_me(using: Using) -> Response:
    """Say who asks, what is to be done first, and the token against forged requests.

    `may` lists the actions that are allowed at all, so that a page offers no others.
    """
    here, login = access(), _logged_in()
    may = sorted(one for one in Action if using.policy.may(login.actor, one))
    return json_answer({**_described(login, here.cookie), "may": may})


@router.post("/me/password")
async def change_password(request: Request, using: Using) -> Response:
    """Change the own password: `present` and `password`. The session gets a new id."""
    fields = Fields(await read_object(request))
    present, wanted = fields.text("present"), fields.text("password")
    fields.end()
    secret, login = await run_in_threadpool(
        using.logins.change_password, _logged_in(), present, wanted, access().origin
    )
    return _begun(using, secret, login)


@router.post("/me/totp")
async def set_up_totp(request: Request, using: Using) -> Response:
    """Set up a second factor: without `code` it begins, with one it is confirmed.

    A second factor that is replaced is shown by `present_code`. The session gets a
    new id.
    """
    fields = Fields(await read_object(request))
    code, present = fields.text("code", "", 16), fields.text("present_code", "", 16)
    fields.end()
    here, login = access(), _logged_in()
    if not code:
        made = await run_in_threadpool(using.logins.begin_totp, login, here.origin)
        return json_answer({"secret": made.secret, "uri": made.uri, "qr": made.qr})
    secret, login = await run_in_threadpool(
        using.logins.confirm_totp, login, code, present, here.origin
    )
    return _begun(using, secret, login)


@router.post("/tickets", status_code=201)
async def issue_ticket(request: Request, using: Using) -> Response:
    """Give out a launch ticket for `study`, or `patient_id` with `issuer`.

    `purpose` says why; it is good once, for a short time, at the address in `url`.
    """
    fields = Fields(await read_object(request))
    issuer = fields.members.get("issuer")
    wanted = WantedTicket(
        study_uid=fields.text("study", "", 64),
        patient_id=fields.text("patient_id", "", 64),
        issuer=None if issuer is None else fields.text("issuer", "", 64),
        purpose=fields.text("purpose", "", 16),
    )
    fields.members.pop("issuer", None)
    fields.end()
    here, login = access(), _logged_in()
    made = await run_in_threadpool(using.tickets.issue, login, wanted, here.origin)
    return json_answer(
        {
            "id": made.public_id,
            "ticket": made.secret,
            "url": f"{using.external_url}/viewer?ticket={made.secret}",
            "purpose": made.purpose,
            "expires_us": made.expires_us,
        },
        201,
    )


@router.post("/tickets/exchange")
async def exchange_ticket(request: Request, using: Using) -> Response:
    """Exchange a launch ticket, once, for a session that sees what it names.

    With ``"as": "bearer"`` the session's token is in the answer instead of a cookie.
    """
    _same_origin(request, using)
    fields = Fields(await read_object(request))
    ticket, form = fields.text("ticket"), fields.text("as", "cookie", 8)
    fields.end()
    if form not in {"cookie", "bearer"}:
        raise InvalidParameter("as", "cookie or bearer")
    secret, login = await run_in_threadpool(
        using.tickets.exchange, ticket, access().origin
    )
    if form == "cookie":
        return _begun(using, secret, login)
    return json_answer({**_described(login, ""), "token": secret})


@pages.api_route("/viewer", methods=["GET", "HEAD"], include_in_schema=False)
@pages.api_route("/viewer/", methods=["GET", "HEAD"], include_in_schema=False)
async def launch(
    request: Request,
    using: Using,
    ticket: Annotated[str, Query(max_length=128)] = "",
) -> Response:
    """Exchange a launch ticket in the address for a session, and go on without it.

    A ticket that is spent leads on too where the present session sees what it named.
    """
    headers = {"Cache-Control": "no-store", "Location": AFTER_TICKET}
    response = Response(status_code=303, headers=headers)
    here = access()
    try:
        if not ticket or request.method != "GET":
            if here.actor is None:
                raise NotAuthenticated("log in first, or come with a ticket")
            return response
        if here.actor is not None and await run_in_threadpool(
            using.tickets.is_spent_on, here.actor, ticket
        ):
            return response
        secret, login = await run_in_threadpool(
            using.tickets.exchange, ticket, here.origin
        )
    except NotAuthenticated:
        if not is_navigation(dict(request.scope["headers"])):
            raise
        page = using.login_page
        return Response(page.body, status_code=401, headers=dict(page.headers))
    using.cookie.set_on(response, secret, login)
    return response


@pages.api_route("/login", methods=["GET", "HEAD"], include_in_schema=False)
async def read_login_page(using: Using) -> Response:
    """Return the page to log in with."""
    page = using.login_page
    return Response(page.body, headers=dict(page.headers))


@router.get("/accounts")
def list_accounts(
    using: Using,
    after: Annotated[str, Query(max_length=64, pattern=r"^[0-9A-Za-z._@-]*$")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 100,
) -> Response:
    """List accounts in order of their names, behind `after`."""
    found = using.accounts.list(_actor(), after=after, limit=limit)
    return json_answer([_account(one) for one in found])


@router.post("/accounts", status_code=201)
async def add_account(request: Request, using: Using) -> Response:
    """Make an account; the answer has the password to log in with once."""
    fields = Fields(await read_object(request))
    actor = _actor()
    patients = tuple(_patient(one, actor) for one in fields.objects("patients"))
    wanted = _wanted(fields, actor, patients)
    fields.end()
    password = await run_in_threadpool(
        using.accounts.add, actor, wanted, access().origin
    )
    return json_answer({"name": wanted.name.lower(), "password": password}, 201)


@router.post("/accounts/{name}/disable", status_code=204, response_class=Response)
def disable_account(using: Using, name: Name) -> Response:
    """Let nobody log in with an account, and end its sessions."""
    using.accounts.disable(_actor(), name, access().origin)
    return Response(status_code=204)


@router.post("/accounts/{name}/enable", status_code=204, response_class=Response)
def enable_account(using: Using, name: Name) -> Response:
    """Let an account be used again."""
    using.accounts.enable(_actor(), name, access().origin)
    return Response(status_code=204)


@router.post("/accounts/{name}/reset-password")
def reset_password(using: Using, name: Name) -> Response:
    """Answer with a new password to log in with once; all sessions end."""
    password = using.accounts.reset_password(_actor(), name, access().origin)
    return json_answer({"password": password})


@router.post("/accounts/{name}/reset-totp", status_code=204, response_class=Response)
def reset_totp(using: Using, name: Name) -> Response:
    """Forget a second factor that was lost."""
    using.accounts.reset_totp(_actor(), name, access().origin)
    return Response(status_code=204)


@router.put("/accounts/{name}/roles", status_code=204, response_class=Response)
async def set_roles(request: Request, using: Using, name: Name) -> Response:
    """Give an account other `roles`, and other tenants to read (`readable`)."""
    fields = Fields(await read_object(request))
    roles = fields.words("roles")
    readable = fields.words("readable") if "readable" in fields.members else None
    fields.end()
    here, actor = access(), _actor()

    def give() -> None:
        using.accounts.set_roles(actor, name, roles, here.origin, readable=readable)

    await run_in_threadpool(give)
    return Response(status_code=204)


@router.get("/tokens")
def list_tokens(using: Using) -> Response:
    """List the tokens of machines, without what they are proved by."""
    return json_answer([_token(one) for one in using.tokens.list(_actor())])


@router.post("/tokens", status_code=201)
async def add_token(request: Request, using: Using) -> Response:
    """Make a token for a machine; it is in this answer only."""
    fields = Fields(await read_object(request))
    actor, here = _actor(), access()
    wanted, days = _wanted(fields, actor, ()), fields.number("days")
    fields.end()

    def make() -> str:
        return using.tokens.add(actor, wanted, here.origin, days=days)

    token = await run_in_threadpool(make)
    return json_answer({"name": wanted.name.lower(), "token": token}, 201)


@router.delete("/tokens/{name}", status_code=204, response_class=Response)
def revoke_token(using: Using, name: Name) -> Response:
    """Revoke a token."""
    using.tokens.revoke(_actor(), name, access().origin)
    return Response(status_code=204)


def _logged_in() -> Login:
    login = access().login
    if login is None:
        raise NotAuthenticated("log in first")
    return login


def _actor() -> Actor:
    actor = access().actor
    if actor is None:
        raise NotAuthenticated("log in first")
    return actor


def _same_origin(request: Request, using: Services) -> None:
    """Keep other sites' pages from logging a browser in as somebody of theirs."""
    headers = dict(request.scope["headers"])
    if not using.clients.is_same_origin(headers):
        raise NotAllowed("requests of other sites are not accepted")


def _begun(using: Services, secret: str, login: Login) -> Response:
    """Answer with a session."""
    response = json_answer(_described(login, secret))
    using.cookie.set_on(response, secret, login)
    return response


def _described(login: Login, cookie: str) -> dict[str, Any]:
    actor, session = login.actor, login.session
    scope = actor.scope
    return {
        "name": actor.name,
        "tenant": actor.tenant,
        "readable": sorted(actor.readable),
        "roles": sorted(actor.roles),
        "kind": login.kind,
        "must": list(login.must),
        "purpose": None if actor.purpose is None else actor.purpose.value,
        "studies": None if scope is None else studies_of(scope),
        "patients": None if scope is None else patients_of(scope),
        "expires_us": None if session is None else session.expires_us,
        "csrf": csrf_of(cookie) if cookie else None,
    }


def _wanted(
    fields: Fields, actor: Actor, patients: tuple[PatientKey, ...]
) -> NewAccount:
    return NewAccount(
        name=fields.text("name", None, 64),
        tenant=fields.text("tenant", actor.tenant, 64),
        roles=fields.words("roles"),
        display_name=fields.text("display_name", "", 256),
        readable=fields.words("readable", ()),
        patients=patients,
    )


def _patient(one: Any, actor: Actor) -> PatientKey:
    fields = Fields(dict(one))
    made = PatientKey(
        fields.text("tenant", actor.tenant, 64),
        fields.text("issuer", "", 64),
        fields.text("patient_id", None, 64),
    )
    fields.end()
    return made


def _account(one: AccountRow) -> dict[str, Any]:
    return {
        "name": one.name,
        "display_name": one.display_name,
        "tenant": one.tenant,
        "readable": sorted(one.readable),
        "roles": sorted(one.roles),
        "patients": [
            {"tenant": key.tenant, "issuer": key.issuer, "patient_id": key.patient_id}
            for key in sorted(one.patients, key=str)
        ],
        "state": one.state,
        "must_change": one.must_change,
        "second_factor": bool(one.totp_secret),
        "created_us": one.created_us,
        "login_us": one.login_us,
    }


def _token(one: TokenRow) -> dict[str, Any]:
    return {
        "name": one.name,
        "tenant": one.tenant,
        "readable": sorted(one.readable),
        "roles": sorted(one.roles),
        "created_by": one.created_by,
        "created_us": one.created_us,
        "expires_us": one.expires_us,
        "revoked_us": one.revoked_us,
    }
