"""Settings: from keyword arguments, then `KEYLATCH_*` variables, then defaults.

A wrong setting stops the start, and so does an unknown variable; all mistakes are reported at
once, each with a hint. A store or Redis URL may hold a password, so no message repeats a value.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from keylatch._variables import (
    EnvironmentSettings,
    Mistake,
    find_unknown,
    read_files,
    variable_name,
)
from keylatch.caches.redis_client import check_url
from keylatch.core.decisions import PERMISSION_PATTERN
from keylatch.core.tokens import ENVIRONMENT_PATTERN, PREFIX_PATTERN
from keylatch.errors import ConfigurationError
from keylatch.storage import conninfo, pepper_file

S = TypeVar("S", bound=EnvironmentSettings)


_HINTS: Final = {
    "store": "sqlite:///path.db for one host, postgresql://user@host/database for many",
    "store_direct": "postgresql:// of the primary itself; empty: the same as KEYLATCH_STORE",
    "store_read": "postgresql:// of a standby of the same store, or empty for none",
    "durable": "local, or replicated with a PostgreSQL store",
    "pepper_file": "a file with lines of 32 bytes or more: openssl rand -hex 32 > FILE",
    "redis": "redis://host:6379/0, redis+sentinel://, redis+cluster:// or unix://, with special "
    "characters of a password written %XX; empty: none",
    "store_file": "the path of a file that contains the store's URL and nothing else",
    "store_direct_file": "the path of a file that contains that URL and nothing else",
    "store_read_file": "the path of a file that contains that URL and nothing else",
    "redis_file": "the path of a file that contains the Redis URL and nothing else",
    "prefix": f"the first word of new tokens, matching {PREFIX_PATTERN}",
    "hasher": "argon2id or sha256",
    "lease": "seconds, more than 0 and at most 60",
    "environment": f"a word matching {ENVIRONMENT_PATTERN}; empty: keys of every environment",
    "permissions": f"comma-separated words matching {PERMISSION_PATTERN}, FULL among them",
    "environments": f"comma-separated words matching {ENVIRONMENT_PATTERN}; empty: any word",
    "clients": "off or on: store each key's last network and user agent name",
    "max_keys": "a whole number of live keys for each organisation; 0: no limit",
    "max_changes": "a whole number of changes for each organisation and hour; 0: no limit",
    "audit_days": "whole days, 0 to 36500; 0: never delete from the audit log",
    "log": "text or json",
    "log_failures": "off or on",
    "timing": "off or on",
    "tracing": "off, or on with the package: pip install 'keylatch[otel]'",
    "realm": "up to 64 printable ASCII characters without quotes and backslashes",
}


def _split(words: object) -> object:
    if not isinstance(words, str):
        return words
    return tuple(word.strip() for word in words.split(",")) if words else ()


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""A sequence of words; in a variable they are separated by commas."""


class Settings(EnvironmentSettings):
    """The settings of an engine. Build it with `load`, which explains every mistake."""

    store: str = Field(default="sqlite:///keylatch.db", repr=False)
    """Where keys are stored: `sqlite:///path.db` or `postgresql://…`."""
    store_direct: str = Field(default="", repr=False)
    """A URL that reaches the primary without a transaction pooler, for leases and notifications;
    empty: `store`."""
    store_read: str = Field(default="", repr=False)
    """A URL of a standby that may answer look-ups; it is believed only if its history is that of
    this process. Empty: none."""
    durable: Literal["local", "replicated"] = "local"
    """`replicated`: a store without synchronous standbys is refused."""
    redis: str = Field(default="", repr=False)
    """Redis or Valkey URL of the shared cache; empty: no shared cache."""
    store_file: str = ""
    """A file that contains `store`, for a URL with a password; empty: none."""
    store_direct_file: str = ""
    """A file that contains `store_direct`; empty: none."""
    store_read_file: str = ""
    """A file that contains `store_read`; empty: none."""
    redis_file: str = ""
    """A file that contains `redis`; empty: none."""
    pepper_file: str = ""
    """A file with a secret that the store does not contain; empty: none."""
    prefix: str = "kl"
    """First word of new tokens."""
    hasher: Literal["argon2id", "sha256"] = "argon2id"
    """How new keys are hashed."""
    lease: float = Field(default=1.0, gt=0, le=60)
    """Lease duration: seconds for which a process may use its caches without the store."""
    environment: str = ""
    """The only environment whose keys are accepted; empty: all of them."""
    permissions: Words = ("FULL", "SENDING")
    """The permissions that a key can have."""
    environments: Words = ()
    """The environments that a key can be created for; empty: any word."""
    realm: str = "keylatch"
    """The realm in `WWW-Authenticate` (RFC 9110 section 11.5)."""

    max_keys: int = Field(default=10_000, ge=0)
    """A key cannot create keys while its organisation has this many live ones; 0: no limit."""
    max_changes: int = Field(default=1_000, ge=0)
    """Changes that the keys of an organisation can make within an hour; 0: no limit."""
    audit_days: int = Field(default=400, ge=0, le=36_500)
    """Days after which the sidecar deletes audit events; 0: never."""

    clients: bool = False
    """Store the network and the user agent that used each key last."""
    log: Literal["text", "json"] = "text"
    """`json`: the sidecar logs JSON, and requests get an id for `keylatch.logs`."""
    log_failures: bool = False
    """Log each request that is refused because of its key, at a limited rate."""
    timing: bool = False
    """Add response headers with the duration of the check and what decided it."""
    tracing: bool = False
    """Create OpenTelemetry spans for checks that call Redis, the store or argon2."""

    @property
    def traces_requests(self) -> bool:
        """Whether each request gets a `RequestTrace`."""
        return self.log == "json" or self.timing

    @field_validator("store")
    @classmethod
    def _store_is_supported(cls, url: str) -> str:
        url = url.strip()  # a trailing blank would name another file
        if conninfo.is_postgresql(url):
            return _require_postgresql(url)
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # a bad port; the message quotes a possible password
            raise ValueError("not a database URL") from None
        if parsed.get_backend_name() != "sqlite":
            raise ValueError("neither sqlite nor postgresql")
        if parsed.database in (None, "", ":memory:"):
            raise ValueError("an in-memory store loses every key when the process ends")
        if "?" in url:
            raise ValueError("a SQLite URL has no options; a ? in a path is written %3F")
        return url

    @field_validator("store_direct", "store_read")
    @classmethod
    def _other_url_is_of_the_same_kind(cls, url: str, info: ValidationInfo) -> str:
        url = url.strip()
        if not url:
            return url
        if not conninfo.is_postgresql(url):
            raise ValueError(conninfo.NOT_POSTGRESQL)
        _refuse_without_postgresql(info)
        return _require_postgresql(url)

    @field_validator("durable")
    @classmethod
    def _store_has_standbys(cls, durable: str, info: ValidationInfo) -> str:
        if durable == "replicated":
            _refuse_without_postgresql(info)
        return durable

    @field_validator("redis")
    @classmethod
    def _redis_is_a_url(cls, url: str) -> str:
        return check_url(url) if url.strip() else ""

    @field_validator("pepper_file")
    @classmethod
    def _pepper_file_is_readable(cls, path: str) -> str:
        if path:
            pepper_file.read(Path(path))
        return path

    @property
    def file_peppers(self) -> tuple[bytes, ...]:
        """The secrets in `pepper_file`.

        Raises:
            ConfigurationError: the file cannot be read any more.
        """
        try:
            return pepper_file.read(Path(self.pepper_file)) if self.pepper_file else ()
        except ValueError as error:
            wrong = f"KEYLATCH_PEPPER_FILE: {error}"
            raise ConfigurationError([(wrong, _HINTS["pepper_file"])]) from None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings to log at start."""
        if self.pepper_file and pepper_file.is_world_readable(Path(self.pepper_file)):
            return ("KEYLATCH_PEPPER_FILE is world-readable: chmod o-r",)
        return ()

    @field_validator("tracing")
    @classmethod
    def _tracing_is_installed(cls, tracing: bool) -> bool:
        if tracing and find_spec("opentelemetry") is None:
            raise ValueError("the package opentelemetry-api is missing")
        return tracing

    @field_validator("prefix")
    @classmethod
    def _prefix_is_a_word(cls, prefix: str) -> str:
        return _require_match(PREFIX_PATTERN, prefix)

    @field_validator("environment")
    @classmethod
    def _environment_is_a_word(cls, environment: str) -> str:
        return environment and _require_match(ENVIRONMENT_PATTERN, environment)

    @field_validator("permissions")
    @classmethod
    def _permissions_are_words(cls, permissions: tuple[str, ...]) -> tuple[str, ...]:
        if "FULL" not in permissions:
            raise ValueError("FULL is missing")
        return tuple(_require_match(PERMISSION_PATTERN, word) for word in permissions)

    @field_validator("environments")
    @classmethod
    def _environments_are_words(cls, environments: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_require_match(ENVIRONMENT_PATTERN, word) for word in environments)

    @field_validator("realm")
    @classmethod
    def _realm_is_quotable(cls, realm: str) -> str:
        return _require_match(r"[ !#-\[\]-~]{1,64}", realm)

    @classmethod
    def load(cls, **arguments: Any) -> "Settings":
        """Settings from keyword arguments (None: not given), then from the environment.

        Raises:
            ConfigurationError: names every wrong setting, with a hint for each.
        """
        return load_settings(cls, of_one_store(arguments), _HINTS, find_unknown(os.environ))


def of_one_store(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments (None: not given), and where the store is one of them, its other URLs as well.

    Without that, leases of a store from the command line would be asked for in the store of the
    environment, and its look-ups too.
    """
    given = {name for name, value in arguments.items() if value is not None}
    if given.isdisjoint(("store", "store_file")):
        return dict(arguments)
    others = ("store_direct", "store_read")
    absent = [name for name in others if given.isdisjoint((name, f"{name}_file"))]
    return {**arguments, **dict.fromkeys(absent, "")}


def load_settings(
    model: type[S],
    arguments: Mapping[str, Any],
    hints: Mapping[str, str],
    also_wrong: Iterable[Mistake] = (),
) -> S:
    """Settings from arguments (None: not given), then from the environment.

    Args:
        model: the settings class to build.
        arguments: of the caller, by field.
        hints: the allowed values, by field.
        also_wrong: mistakes that the caller has found, to report with those found here.

    Raises:
        ConfigurationError: names every wrong setting, with a hint for each.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    in_files, mistakes = read_files(model, arguments, hints)
    mistakes += also_wrong
    try:
        settings = model(**arguments | in_files)
    except ValidationError as error:
        mistakes += [
            (
                f"{variable_name(_field_at_fault(name, in_files))}: "
                + problem["msg"].removeprefix("Value error, "),
                hints.get(name, "no such setting"),
            )
            for problem in error.errors(include_input=False, include_url=False)
            for name in [str(problem["loc"][0])]
        ]
    if not mistakes:
        return settings
    raise ConfigurationError(mistakes)


def _field_at_fault(name: str, in_files: Mapping[str, str]) -> str:
    """The setting to correct: the file's where the value came from a file."""
    return f"{name}_file" if in_files.get(name) else name


def _refuse_without_postgresql(info: ValidationInfo) -> None:
    store = info.data.get("store")  # missing: it is wrong itself
    if store is not None and not conninfo.is_postgresql(store):
        raise ValueError("the store is not PostgreSQL")


def _require_postgresql(url: str) -> str:
    with contextlib.suppress(ImportError):  # the store says which package is missing
        conninfo.parse(url)
    return url


def _require_match(pattern: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError("does not match the required pattern")
    return text
