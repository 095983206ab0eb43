"""The options and arguments that several commands share.

Options that override a setting are added by `setting_options`; a command declares only its own:

    @setting_options("store", "redis")
    def show(key_id: KeyId, as_json: JSONOption = False, *, given: Given) -> None:
        settings = Settings.load(**given)

Typer derives a command's options from its signature, so the decorator extends the signature.
Rejected: options of a Typer callback, which would have to precede the command's name
(`keylatch --store … keys show`); `click.option`, which Typer does not see.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from pydantic import TypeAdapter, ValidationError

from keylatch._variables import variable_name
from keylatch.core.keys import Scalar
from keylatch.core.timestamps import datetime_of
from keylatch.core.validation import expiry_after
from keylatch.errors import InvalidValue
from keylatch_sidecar.api.parameters import MAX_IDLE_DAYS, MAX_USAGE_DAYS
from keylatch_sidecar.api.schemas import Instant

Given = dict[str, str | None]
"""Settings from the command line by name; None: not given, so the environment decides."""
Command = Callable[..., None]

# Setting: (help, default as `--help` shows it). Values are strings, so that `Settings` checks them
# all and reports every mistake at once.
ENGINE_SETTINGS: Final = {
    "store": (
        "Store URL without a password: sqlite:///path.db or postgresql://…",
        "sqlite:///keylatch.db",
    ),
    "store_direct": (
        "URL of the primary without a transaction pooler, for leases and notifications.",
        "--store",
    ),
    "store_read": ("URL of a standby that may answer look-ups.", "none"),
    "durable": (
        "What a change waits for: local or replicated (a synchronous standby as well).",
        "local",
    ),
    "redis": ("URL of the shared cache, without a password.", "none"),
    "pepper_file": ("File with a secret that the store does not contain.", "none"),
    "prefix": ("First part of new tokens.", "kl"),
    "hasher": ("Hash function for new keys: argon2id or sha256.", "argon2id"),
    "lease": ("Seconds for which a process may use its caches without the store.", "1.0"),
    "max_keys": ("Maximum number of live keys per organisation; 0: no limit.", "10000"),
    "max_changes": (
        "Maximum number of changes per hour by the keys of an organisation; 0: no limit.",
        "1000",
    ),
    "audit_days": ("Days for which audit events are kept; 0: for ever.", "400"),
    "clients": ("Record the network from which each key was last used: on or off.", "off"),
    "log": ("Log format: text or json.", "text"),
    "log_failures": ("Log refused requests with their address: on or off.", "off"),
    "timing": ("Report the duration of checks in response headers: on or off.", "off"),
    "tracing": ("Create OpenTelemetry spans: on or off.", "off"),
}
PROXY_SETTINGS: Final = {
    "verify_request": (
        "Where proxies describe the original request to /verify: none, forwarded or original.",
        "none",
    ),
    "ext_authz_request": ("The same for /ext_authz: envoy, none, forwarded or original.", "envoy"),
    "proxy_cache_ttl": (
        "Seconds for which a proxy may cache an allow; revocations do not clear that cache.",
        "0",
    ),
    "drain": ("Seconds from SIGTERM to the stop, while /readyz answers 503.", "0"),
}
_SETTINGS: Final = ENGINE_SETTINGS | PROXY_SETTINGS


def setting_options(*names: str) -> Callable[[Command], Command]:
    """Add an option for each of these settings to a command, which gets the values as `given`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(**values, given=given)

        signature = inspect.signature(command)
        own = [each for name, each in signature.parameters.items() if name != "given"]
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *map(_setting_option, names)]
        )
        return run

    return decorate


def _setting_option(name: str) -> inspect.Parameter:
    text, default = _SETTINGS[name]
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=variable_name(name),
        callback=_from_command_line,
        help=text,
        show_default=default,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, option],
    )


def _from_command_line(
    context: typer.Context, parameter: typer.CallbackParam, value: str | None
) -> str | None:
    """The value if it is an argument, else None. `--help` names the variables, and `Settings` reads
    them: an argument takes precedence over both forms of a variable (`…` and `…_FILE`)."""
    source = context.get_parameter_source(parameter.name or "")
    return None if source is None or source.name == "ENVIRONMENT" else value


KeyId = Annotated[str, typer.Argument(metavar="ID", help="Id of the key.")]
OrganizationArgument = Annotated[
    str, typer.Argument(metavar="ORGANIZATION", help="Id of the organisation.")
]
OrganizationOption = Annotated[
    str, typer.Option("--organization", help="Organisation of the keys.")
]
OwnerOption = Annotated[
    str | None,
    typer.Option("--organization", help="Fail unless the key belongs to this organisation."),
]
PermissionOption = Annotated[str, typer.Option("--permission", help="FULL or SENDING.")]
EnvironmentOption = Annotated[
    str, typer.Option("--environment", help="Environment, such as live or test.")
]
ExpiresInOption = Annotated[
    str | None, typer.Option("--expires-in", help="Time to live, such as 90d, 12h or 30m.")
]
ExpiresAtOption = Annotated[
    str | None,
    typer.Option("--expires-at", help="Expiry in ISO 8601, such as 2030-01-01T00:00:00Z."),
]
MetadataOption = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="Metadata; may be repeated."),
]
ReasonOption = Annotated[
    str | None, typer.Option("--reason", help="Reason, which is stored with the key.")
]
IdleOption = Annotated[
    int | None,
    typer.Option(
        "--idle",
        metavar="DAYS",
        help="Only keys that were not used for this many days.",
        min=1,
        max=MAX_IDLE_DAYS,
    ),
]
DaysOption = Annotated[
    int, typer.Option(help="Number of days, including today.", min=1, max=MAX_USAGE_DAYS)
]
JSONOption = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]

_INSTANT: TypeAdapter[datetime] = TypeAdapter(Instant)


def expiry_of(now_ms: int, expires_in: str | None, expires_at: str | None) -> datetime | None:
    """When a key expires; None: neither option was given.

    Raises:
        InvalidValue: both were given, or the value is malformed.
    """
    if expires_in is not None:
        if expires_at is not None:
            raise InvalidValue("--expires-in", "cannot be combined with --expires-at")
        return datetime_of(expiry_after(expires_in, now_ms, "--expires-in"))
    if expires_at is None:
        return None
    try:
        return _INSTANT.validate_python(expires_at)
    except ValidationError:
        raise InvalidValue("--expires-at", "must be an ISO 8601 time with an offset") from None


def metadata_of(pairs: Sequence[str] | None) -> dict[str, Scalar] | None:
    """The values of `--metadata NAME=VALUE`; None: the option was not given.

    Raises:
        InvalidValue: a value has no `=`.
    """
    if not pairs:
        return None
    if not all("=" in pair for pair in pairs):
        raise InvalidValue("--metadata", "must be NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
