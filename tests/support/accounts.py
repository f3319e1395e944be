"""A closed node in this process, with accounts, and browsers that use it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr
from pydicom.dataset import Dataset
from sqlalchemy import text

from gateway import app as composition
from gateway import face
from gateway.app import Node
from gateway.identity.recording import Origin
from gateway.identity.services import NewAccount
from pacs.web.intake import Intake
from storage.db import migrate
from storage.kernel.settings import Database, Identity, Packs, Settings
from storage.kernel.types import DEFAULT_TENANT, Actor, PatientKey, Role
from tests.support.dicomweb import serving
from tests.support.door import arrival
from tests.support.web import Response, request

SYSTEM = Actor(DEFAULT_TENANT, "test", roles=frozenset({Role.SYSTEM}))
CLI = Origin(door="cli")
PASSWORD = "Right#horse-7"  # noqa: S105  # of accounts that live for one test
#: Cheap hashes; the rest as it comes.
CHEAP = Identity(hash_memory_kib=8, hash_passes=1)


@dataclass
class Browser:
    """What a browser keeps between requests: its cookies, and the page's token."""

    url: str
    cookies: dict[str, str] = field(default_factory=dict)
    csrf: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send one request; what is not bytes goes as JSON."""
        sent = {"Accept": "application/json", **self.headers}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{k}={v}" for k, v in self.cookies.items())
        if self.csrf:
            sent["X-CSRF-Token"] = self.csrf
        data = body
        if body is not None and not isinstance(body, bytes):
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        answer = request(
            self.url + path,
            method=method,
            body=data,
            headers={**sent, **(headers or {})},
        )
        given = SimpleCookie(answer.headers.get("set-cookie", ""))
        for name, morsel in given.items():
            if morsel.value and morsel["max-age"] != "0":
                self.cookies[name] = morsel.value
            else:
                self.cookies.pop(name, None)
        return answer

    def get(self, path: str, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("GET", path, headers=named)

    def post(self, path: str, body: Any = None, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", path, body, named)

    def log_in(self, name: str, password: str = PASSWORD, code: str = "") -> Response:
        answer = self.post(
            "/api/v1/login", {"name": name, "password": password, "code": code}
        )
        if answer.status == 200:
            self.csrf = answer.json()["csrf"] or ""
        return answer


@dataclass
class Site:
    """A node of this process behind a listener of its own."""

    node: Node
    url: str
    face: FastAPI

    def browser(self, **headers: str) -> Browser:
        return Browser(self.url, headers=headers)

    def add(
        self,
        name: str,
        *roles: str,
        tenant: str = "default",
        readable: tuple[str, ...] = (),
        patients: tuple[PatientKey, ...] = (),
        must_change: bool = False,
    ) -> str:
        """Make an account; its password is `PASSWORD` unless it must be changed."""
        wanted = NewAccount(name, tenant, roles, "", readable, patients)
        password = self.node.identity.accounts.add(SYSTEM, wanted, CLI)
        if must_change:
            return password
        with self.node.database.write() as connection:
            connection.execute(
                text(
                    "UPDATE account SET must_change = 0, password_hash = :hash"
                    " WHERE name = :name"
                ),
                {
                    "name": name,
                    "hash": self.node.identity.logins.passwords.hash(PASSWORD),
                },
            )
        return PASSWORD

    def logged_in(self, name: str, *roles: str, **options: Any) -> Browser:
        """Make an account and log in with it."""
        self.add(name, *roles, **options)
        browser = self.browser()
        answer = browser.log_in(name)
        assert answer.status == 200, answer.text
        return browser

    def token(self, name: str, *roles: str, **options: Any) -> Browser:
        """Make a token; return what uses it."""
        wanted = NewAccount(name, options.pop("tenant", "default"), roles, **options)
        made = self.node.identity.tokens.add(SYSTEM, wanted, CLI)
        return self.browser(Authorization=f"Bearer {made}")

    def store(self, ds: Dataset, tenant: str = "default") -> None:
        self.node.ingest.accept(arrival(ds, tenant))

    def audit(self, **values: str) -> list[dict[str, Any]]:
        """Return the audit records that have these values, in order."""
        self.node.audit.flush()
        with self.node.database.read() as connection:
            found = connection.execute(
                text("SELECT * FROM audit_record ORDER BY sequence")
            ).mappings()
            return [
                dict(row)
                for row in found
                if all((row[name] or "") == value for name, value in values.items())
            ]


@contextmanager
def closed_site(
    folder: Path,
    *,
    url: str = "",
    identity: Identity = CHEAP,
    open_access: bool = False,
    **settings: Any,
) -> Iterator[Site]:
    """Run a node that asks for logins.

    Parameters
    ----------
    **settings
        More parts of `Settings`.
    """
    made = Settings(
        data=folder,
        open=open_access,
        database=Database(url=SecretStr(url)),
        packs=Packs(min_free_bytes=0),
        identity=identity,
        **settings,
    )
    migrate.upgrade(made.database_url())
    node = composition.open_node(made)
    intake = Intake(node.ingest, made.limits, body_seconds=5)
    try:
        web = face.web_application(node, intake)
        with serving(web) as address:
            yield Site(node, address, web)
    finally:
        intake.close()
        node.close()


def with_identity(**values: Any) -> Identity:
    """Return settings of cheap hashes and `values`."""
    return CHEAP.model_copy(update=values)
