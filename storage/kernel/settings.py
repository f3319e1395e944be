"""One typed settings tree: ``huying.toml`` and ``HUYING_*``, loaded once, frozen.

Order of precedence: command line, environment (``HUYING_HTTP__PORT=8080``),
``huying.toml`` (named by ``--config`` or ``HUYING_CONFIG``, else
``<data>/huying.toml``), defaults. An unknown key is an error that suggests the
nearest name.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from storage.kernel.errors import InvalidParameter
from storage.kernel.limits import GIB, MIB, Limits

AeTitle = Annotated[
    str, StringConstraints(pattern=r"^[ -\[\]-~]{1,16}$", strip_whitespace=True)
]


def _words(value: Any) -> Any:
    """Take a list from the environment, where it is text with commas."""
    if isinstance(value, str):
        return [one.strip() for one in value.split(",") if one.strip()]
    return value


Listed = BeforeValidator(_words)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SyncPolicy(StrEnum):
    """When received bytes are forced to stable storage (core: packs)."""

    INSTANCE = "instance"
    ASSOCIATION = "association"
    NONE = "none"


class DuplicatePolicy(StrEnum):
    """What to do with other content under a SOP Instance UID we hold."""

    NEVER = "never"
    IF_CHANGED = "if_changed"


class Node(_Part):
    """This machine's part in the region."""

    id: str = Field(
        "node-1",
        pattern=r"^[a-z0-9][a-z0-9-]{0,31}$",
        description="name of this host; local packs carry it",
    )
    role: Literal["hospital", "city", "province", "single"] = Field(
        "single", description="switches features on; single has them all"
    )


class Http(_Part):
    """The web listener."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="0: any free one")
    workers: int = Field(2, ge=1, le=64, description="processes")
    external_url: str = Field(
        "",
        description="base of URLs we write; empty: an open node's own Host, else paths",
    )
    idle_seconds: float = Field(60, gt=0, description="between requests")
    body_seconds: float = Field(60, gt=0, description="longest wait for body bytes")
    metrics_token: SecretStr = Field(
        SecretStr(""), description="bearer token of /metrics; empty: closed"
    )
    trusted_proxies: Annotated[tuple[str, ...], Listed] = Field(
        (), description="addresses whose X-Forwarded-For is believed"
    )


class Identity(_Part):
    """Accounts, logins, sessions, tokens, launch tickets."""

    min_length: int = Field(10, ge=10, le=64, description="characters of a password")
    password_days: float = Field(
        90, ge=0, description="a password must be changed after these; 0: never"
    )
    password_history: int = Field(
        5, ge=0, le=24, description="passwords that cannot be taken again"
    )
    hash_memory_kib: int = Field(
        65_536, ge=8, description="memory of one argon2id hash, KiB"
    )
    hash_passes: int = Field(3, ge=1, le=16, description="passes of argon2id")
    account_failures: int = Field(
        5, ge=1, le=100, description="failed logins with one name before its lock"
    )
    address_failures: int = Field(
        20, ge=1, le=10_000, description="failed logins from one address, likewise"
    )
    lock_seconds: float = Field(900, gt=0, description="how long a lock lasts")
    second_factor: Annotated[
        frozenset[
            Literal[
                "administrator",
                "security_administrator",
                "auditor",
                "archive_manager",
                "radiologist",
                "reviewer",
                "clinician",
                "patient",
            ]
        ],
        Listed,
    ] = Field(
        frozenset({"administrator", "security_administrator", "auditor"}),
        description="roles that need a code beside the password",
    )
    idle_minutes: float = Field(30, gt=0, le=30, description="unused session ends")
    session_hours: float = Field(12, gt=0, le=24, description="any session ends")
    max_sessions: int = Field(
        3, ge=1, le=20, description="of one account; a new login ends the oldest"
    )
    ticket_seconds: float = Field(
        60, gt=0, le=3600, description="a launch ticket must be used within these"
    )
    ticket_minutes: float = Field(
        30, gt=0, le=720, description="what a ticket opened ends; unused, in half"
    )
    token_days: float = Field(
        365, gt=0, le=3660, description="longest life of a machine's token"
    )
    basic: bool = Field(
        default=False,
        description="HTTP Basic for DICOMweb clients, over TLS or on loopback only",
    )


class AeSettings(_Part):
    """One of our AE titles and the tenant its arrivals belong to."""

    title: AeTitle
    tenant: str = "default"


class PeerSettings(_Part):
    """A remote AE known from the configuration file."""

    title: AeTitle
    host: str = ""
    port: int = Field(0, ge=0, le=65535)
    tenant: str = ""
    may: frozenset[Literal["echo", "store", "find", "get", "move", "commit"]] = (
        frozenset({"echo", "store"})
    )
    tls: bool = False
    forward: bool = Field(
        default=False, description="every settled study of its tenant is sent to it"
    )


class DimseTls(_Part):
    """The TLS listener; off while `port` is 0."""

    port: int = Field(0, ge=0, le=65535, description="0: no TLS listener")
    certificate: Path | None = Field(None, description="PEM, with the chain")
    key: Path | None = Field(None, description="PEM, without pass phrase")
    client_ca: Path | None = Field(
        None, description="when set, clients must present a certificate it signed"
    )


class Dimse(_Part):
    """The DICOM listener."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(11112, ge=0, le=65535, description="0: any free one")
    aet: AeTitle = Field("HUYING", description="our AE title")
    aes: tuple[AeSettings, ...] = Field(
        (), description="more AE titles of ours, and whose arrivals they take"
    )
    peers: tuple[PeerSettings, ...] = Field(
        (), description="remote AEs; more at run time with `huying peer`"
    )
    workers: int = Field(2, ge=1, le=16, description="processes")
    max_associations: int = Field(100, ge=1, le=10_000, description="at a time")
    max_associations_per_ae: int = Field(
        50, ge=1, le=10_000, description="at a time, of one calling AE"
    )
    acse_seconds: float = Field(30, gt=0, description="for the whole request")
    idle_seconds: float = Field(60, gt=0, description="between messages")
    read_seconds: float = Field(60, gt=0, description="inside one message")
    write_seconds: float = Field(60, gt=0, description="a peer that does not read")
    tls: DimseTls = DimseTls()


class Database(_Part):
    """SQLite in the data folder, or any SQLAlchemy URL."""

    url: SecretStr = Field(
        SecretStr(""), description="empty: SQLite in the data folder"
    )
    pool_size: int = Field(5, ge=1, description="connections of one process")


class Packs(_Part):
    """Append-only files that hold received instances."""

    sync: SyncPolicy = Field(
        SyncPolicy.INSTANCE,
        description="when an answer waits for the disk; weaker policies are named",
    )
    roll_bytes: int = Field(
        1 * GIB, ge=64 * 1024, description="a pack this long is closed"
    )
    min_free_bytes: int = Field(
        512 * MIB, ge=0, description="answer A700/507 when less is free"
    )
    seal: bool = Field(True, description="settled series get a pack of their own")
    htj2k: bool = Field(
        False, description="settled series get HTJ2K lossless frames beside their own"
    )
    seal_grace_seconds: float = Field(900, ge=0, description="longest read")
    rewrite_seconds: float = Field(
        86_400, ge=0, description="deadline for erasing deleted bytes"
    )


class S3(_Part):
    """An S3 service for sealed packs."""

    endpoint: str = Field("", description="host:port of the service")
    bucket: str = Field("huying", description="made on first use")
    access_key: SecretStr = Field(SecretStr(""), description="user")
    secret_key: SecretStr = Field(SecretStr(""), description="password")
    secure: bool = Field(True, description="HTTPS")
    region: str = Field("us-east-1", description="as the service names it")
    timeout_seconds: float = Field(10, gt=0, description="one request")


class Objects(_Part):
    """Where sealed packs live."""

    kind: Literal["files", "s3"] = Field("files", description="which store")
    s3: S3 = S3()


class Pacs(_Part):
    """Rules of the archive."""

    settle_seconds: float = Field(
        60, ge=0, description="a study is complete after this pause"
    )
    duplicates: DuplicatePolicy = Field(
        DuplicatePolicy.NEVER, description="whether other content replaces what we hold"
    )
    lenient_uids: bool = Field(False, description="accept illegal UIDs, flagged")
    require_patient_id: bool = Field(False, description="else accepted and flagged")
    accept_files_without_preamble: bool = Field(False, description="import only")
    permanent_delete: bool = Field(True, description="DELETE tombstones and erases")
    # One that hangs must not keep the others waiting.
    decoders: int = Field(2, ge=1, le=32, description="decoder processes per process")
    renderers: int = Field(
        1, ge=1, le=32, description="processes per process that draw volumes"
    )
    picture_cache_bytes: int = Field(
        32 * MIB, ge=0, description="pictures that one web process keeps in memory"
    )
    volume_cache_bytes: int = Field(
        1 * GIB, ge=MIB, description="volumes that one web process keeps in memory"
    )


class Worker(_Part):
    """The background process."""

    event_days: float = Field(
        30, gt=0, description="how long change events and commitment results are kept"
    )
    job_days: float = Field(7, gt=0, description="how long finished jobs are kept")


class Log(_Part):
    """Logging."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="least severe that is written"
    )
    json_lines: bool = Field(True, description="JSON, else plain text")


class Settings(_Part):
    """All settings of a node."""

    data: Path = Field(Path("data"), description="folder of everything local")
    open: bool = Field(False, description="no logins; loopback only")
    node: Node = Node()
    http: Http = Http()
    identity: Identity = Identity()
    dimse: Dimse = Dimse()
    database: Database = Database()
    packs: Packs = Packs()
    objects: Objects = Objects()
    pacs: Pacs = Pacs()
    worker: Worker = Worker()
    log: Log = Log()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _open_is_loopback_only(self) -> Self:
        if self.open:
            for name, host in (("http", self.http.host), ("dimse", self.dimse.host)):
                if not is_loopback(host):
                    raise ValueError(
                        f"open: refused, {name}.host {host} is not a loopback address"
                    )
        return self

    def database_url(self) -> str:
        """Return the SQLAlchemy URL of the index."""
        configured = self.database.url.get_secret_value()
        return configured or f"sqlite:///{self.data.resolve() / 'index.db'}"

    def jobs_url(self) -> str:
        """Return the SQLAlchemy URL of the durable jobs (core: processes)."""
        if self.embedded:
            return f"sqlite:///{self.data.resolve() / 'jobs.db'}"
        return self.database_url()

    @property
    def embedded(self) -> bool:
        """True while the index is SQLite."""
        return self.database_url().startswith("sqlite")


def is_loopback(host: str) -> bool:
    """Tell whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_settings(
    config: Path | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
) -> Settings:
    """Read file and environment, apply `overrides`, validate.

    Parameters
    ----------
    config : Path, optional
        ``huying.toml``; must exist when named here or in ``HUYING_CONFIG``.
    overrides : dict, optional
        Nested mapping with the highest precedence (the command line).
    environ : dict, optional
        For tests; else the process environment.

    Raises
    ------
    InvalidParameter
        With one sentence per wrong key, and the nearest right name.
    """
    env = dict(os.environ) if environ is None else environ
    overrides = overrides or {}
    if config is None and env.get("HUYING_CONFIG"):
        config = Path(env["HUYING_CONFIG"])
    tree: dict[str, Any] = {}
    from_env = _environment_tree(env)
    if config is None:
        folder = overrides.get("data") or from_env.get("data") or "data"
        candidate = Path(folder) / "huying.toml"
        config = candidate if candidate.is_file() else None
    if config is not None:
        try:
            tree = tomllib.loads(config.read_text("utf-8"))
        except OSError as error:
            raise InvalidParameter("config", f"{config}: {error.strerror}") from error
        except ValueError as error:
            raise InvalidParameter("config", f"{config}: {error}") from error
    _merge(tree, from_env)
    _merge(tree, overrides)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise InvalidParameter("settings", _explain(error)) from error


def _environment_tree(env: dict[str, str]) -> dict[str, Any]:
    """Turn ``HUYING_HTTP__PORT=8080`` into ``{"http": {"port": "8080"}}``."""
    tree: dict[str, Any] = {}
    for name, value in env.items():
        if not name.startswith("HUYING_") or name == "HUYING_CONFIG":
            continue
        *path, leaf = name.removeprefix("HUYING_").lower().split("__")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


def _merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(error: ValidationError) -> str:
    """Say what is wrong, one sentence per problem, with the nearest known key."""
    sentences = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path, known_keys(), n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            sentences.append(f"{path} is not a setting{hint}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            sentences.append(f"{path}: {said}" if path else said)
    return "; ".join(sentences)


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Return the dotted name of every setting."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
