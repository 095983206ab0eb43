"""Settings: from keyword arguments, then `KEYLATCH_*` variables, then defaults.

A wrong setting stops the start, and so does a variable that is none; all mistakes are listed at
once, each with a hint. A store or Redis URL may hold a password, so no message repeats a value.
"""

import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from redis.asyncio import ConnectionPool
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from keylatch._variables import (
    EnvironmentSettings,
    Mistake,
    find_unknown,
    read_files,
    variable_name,
)
from keylatch.core.decisions import PERMISSION_PATTERN
from keylatch.core.tokens import ENVIRONMENT_PATTERN, PREFIX_PATTERN
from keylatch.errors import ConfigurationError
from keylatch.storage import pepper_file

S = TypeVar("S", bound=EnvironmentSettings)


_HINTS: Final = {
    "store": "sqlite:///path.db for one host, postgresql://user@host/database for many",
    "pepper_file": "a file with lines of 32 bytes or more: openssl rand -hex 32 > FILE",
    "redis": "redis://host:6379/0, rediss:// for TLS, unix:///path.sock, or empty for none",
    "store_file": "the path of a file that holds the store's URL and nothing else",
    "redis_file": "the path of a file that holds the URL of Redis and nothing else",
    "prefix": f"the first word of new tokens matches {PREFIX_PATTERN}",
    "hasher": "argon2id or sha256",
    "lease": "seconds, more than 0 and at most 60",
    "environment": f"matches {ENVIRONMENT_PATTERN}; empty: keys of every environment",
    "permissions": f"comma-separated words matching {PERMISSION_PATTERN}, FULL among them",
    "environments": f"comma-separated words matching {ENVIRONMENT_PATTERN}; empty: any word",
    "clients": "off, or on: keep each key's last network and user agent's name",
    "max_keys": "a whole number of live keys for each organisation; 0: no limit",
    "max_changes": "a whole number of changes for each organisation and hour; 0: no limit",
    "audit_days": "whole days, 0 to 36500; 0: keep the audit log for ever",
    "log": "text or json",
    "log_failures": "off or on",
    "timing": "off or on",
    "tracing": "off, or on with the package: pip install 'keylatch[otel]'",
    "realm": "up to 64 printable ASCII characters without quotes and backslashes",
}


class Settings(EnvironmentSettings):
    """What an engine needs to know. Build it with `load`, which explains every mistake."""

    store: str = Field(default="sqlite:///keylatch.db", repr=False)
    """Where keys live: `sqlite:///path.db` or `postgresql://…`."""
    redis: str = Field(default="", repr=False)
    """Redis or Valkey URL of the shared cache; empty: work without."""
    store_file: str = ""
    """A file that holds `store`, which may have a password; empty: none."""
    redis_file: str = ""
    """A file that holds `redis`; empty: none."""
    pepper_file: str = ""
    """A file with a secret that the store does not hold; see `peppers`. Empty: none."""
    prefix: str = "kl"
    """First word of new tokens."""
    hasher: Literal["argon2id", "sha256"] = "argon2id"
    """How new keys are hashed."""
    lease: float = Field(default=1.0, gt=0, le=60)
    """X: seconds a process may trust its caches without hearing from the store."""
    environment: str = ""
    """The only environment whose keys are welcome; empty: all of them."""
    permissions: str = "FULL,SENDING"
    """The permissions that management may give to keys, separated by commas."""
    environments: str = ""
    """The environments that management may make keys for, separated by commas; empty: any."""
    realm: str = "keylatch"
    """The realm named in `WWW-Authenticate` (RFC 9110 section 11.5)."""

    max_keys: int = Field(default=10_000, ge=0)
    """Live keys that an organisation may have for a key to create another one; 0: no limit."""
    max_changes: int = Field(default=1_000, ge=0)
    """Changes that an organisation's keys may make within an hour; 0: no limit."""
    audit_days: int = Field(default=400, ge=0, le=36_500)
    """How long the sidecar keeps the audit log; 0: for ever."""

    clients: Literal["off", "on"] = "off"
    """Whether to keep from which network and with what program each key was used last."""
    log: Literal["text", "json"] = "text"
    """`json`: the sidecar logs JSON lines; everywhere, requests get an id for such lines."""
    log_failures: Literal["off", "on"] = "off"
    """`on`: a line in the log for each request that is refused because of its key, limited."""
    timing: Literal["off", "on"] = "off"
    """`on`: answers tell in headers how long the check took, and who knew."""

    tracing: Literal["off", "on"] = "off"
    """`on`: checks that ask somebody make spans of OpenTelemetry."""

    @property
    def traces_requests(self) -> bool:
        """Whether requests leave a trail."""
        return self.log == "json" or self.timing == "on"

    @field_validator("store")
    @classmethod
    def _store_is_supported(cls, url: str) -> str:
        url = url.strip()  # a blank that was copied along would name another file
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # of a bad port, quoting what may be a password
            raise ValueError("not a database URL") from None
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ValueError("neither sqlite nor postgresql")
        if "@" in (parsed.host or ""):  # half of a password, which error messages would repeat
            raise ValueError("an @ in a password is written %40")
        if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ValueError("an in-memory store loses every key when the process ends")
        if backend == "sqlite" and "?" in url:
            raise ValueError("SQLite takes no options; a ? in a path is written %3F")
        return url

    @field_validator("redis")
    @classmethod
    def _redis_is_a_url(cls, url: str) -> str:
        url = url.strip()
        if not url:
            return url
        try:  # make_connection opens nothing; it is what refuses unknown options
            ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError):  # both quote the URL
            raise ValueError("not a Redis URL") from None
        return url

    @field_validator("pepper_file")
    @classmethod
    def _pepper_file_is_readable(cls, path: str) -> str:
        if path:
            pepper_file.read(Path(path))
        return path

    @property
    def file_peppers(self) -> tuple[bytes, ...]:
        """What `pepper_file` holds.

        Raises:
            ConfigurationError: it cannot be read any more.
        """
        try:
            return pepper_file.read(Path(self.pepper_file)) if self.pepper_file else ()
        except ValueError as error:
            wrong = f"KEYLATCH_PEPPER_FILE: {error}"
            raise ConfigurationError([(wrong, _HINTS["pepper_file"])]) from None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know at start."""
        if self.pepper_file and pepper_file.is_world_readable(Path(self.pepper_file)):
            return ("KEYLATCH_PEPPER_FILE is world-readable: chmod o-r",)
        return ()

    @field_validator("tracing")
    @classmethod
    def _tracing_is_installed(cls, tracing: str) -> str:
        if tracing == "on" and find_spec("opentelemetry") is None:
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
    def _permissions_are_words(cls, permissions: str) -> str:
        words = [
            _require_match(PERMISSION_PATTERN, word.strip()) for word in permissions.split(",")
        ]
        if "FULL" not in words:
            raise ValueError("FULL is missing")
        return ",".join(words)

    @field_validator("environments")
    @classmethod
    def _environments_are_words(cls, environments: str) -> str:
        words = environments.split(",") if environments else []
        return ",".join(_require_match(ENVIRONMENT_PATTERN, word.strip()) for word in words)

    @field_validator("realm")
    @classmethod
    def _realm_is_quotable(cls, realm: str) -> str:
        return _require_match(r"[ !#-\[\]-~]{1,64}", realm)

    @property
    def grantable(self) -> tuple[str, ...]:
        """`permissions` as words."""
        return tuple(self.permissions.split(","))

    @property
    def allowed_environments(self) -> tuple[str, ...]:
        """`environments` as words; none: any word will do."""
        return tuple(self.environments.split(",")) if self.environments else ()

    @classmethod
    def load(cls, **arguments: Any) -> "Settings":
        """Settings from keyword arguments (None: not given) over the environment.

        Raises:
            ConfigurationError: naming every wrong setting, with a hint for each.
        """
        return load_settings(cls, arguments, _HINTS, find_unknown(os.environ))


def load_settings(
    model: type[S],
    arguments: Mapping[str, Any],
    hints: Mapping[str, str],
    also_wrong: Iterable[Mistake] = (),
) -> S:
    """Settings of this kind, from arguments (None: not given) over the environment.

    Args:
        model: the settings class to build.
        arguments: given by the caller.
        hints: what each field may be.
        also_wrong: mistakes that were found elsewhere, to be listed with those found here.

    Raises:
        ConfigurationError: naming every wrong setting, with a hint for each.
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
    """The setting that a person has to look at for this field."""
    return f"{name}_file" if in_files.get(name) else name


def _require_match(pattern: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError("does not match the required pattern")
    return text
