"""The options and arguments that several commands share."""

from typing import Annotated

import typer

from keylatch_sidecar.api.parameters import MAX_IDLE_DAYS, MAX_USAGE_DAYS


def _from_command_line(
    context: typer.Context, parameter: typer.CallbackParam, value: str | None
) -> str | None:
    """The value if it was an argument: what is in the environment, `Settings` reads by itself, and
    tells from an argument that comes before it."""
    source = context.get_parameter_source(parameter.name or "")
    return None if source is None or source.name == "ENVIRONMENT" else value


StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="KEYLATCH_STORE",
        callback=_from_command_line,
        help="sqlite:///path.db or postgresql://… without a password.",
        show_default="sqlite:///keylatch.db",
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis",
        envvar="KEYLATCH_REDIS",
        callback=_from_command_line,
        help="URL of the shared cache, without a password.",
        show_default="none",
    ),
]
PepperFileOption = Annotated[
    str | None,
    typer.Option(
        "--pepper-file",
        envvar="KEYLATCH_PEPPER_FILE",
        help="A file with a secret that the store does not hold.",
        show_default="none",
    ),
]
PrefixOption = Annotated[
    str | None,
    typer.Option(
        "--prefix", envvar="KEYLATCH_PREFIX", help="First word of new tokens.", show_default="kl"
    ),
]
HasherOption = Annotated[
    str | None,
    typer.Option(
        "--hasher",
        envvar="KEYLATCH_HASHER",
        help="How new keys are hashed: argon2id or sha256.",
        show_default="argon2id",
    ),
]
LeaseOption = Annotated[
    str | None,  # and not a float: Settings names it along with the other mistakes
    typer.Option(
        "--lease",
        envvar="KEYLATCH_LEASE",
        help="Lease duration in seconds: how long caches are trusted without the store.",
        show_default="1.0",
    ),
]
MaxKeysOption = Annotated[
    str | None,
    typer.Option(
        "--max-keys",
        envvar="KEYLATCH_MAX_KEYS",
        help="Live keys of an organisation; 0: no limit.",
        show_default="10000",
    ),
]
MaxChangesOption = Annotated[
    str | None,
    typer.Option(
        "--max-changes",
        envvar="KEYLATCH_MAX_CHANGES",
        help="Changes by an organisation's keys within an hour; 0: no limit.",
        show_default="1000",
    ),
]
AuditDaysOption = Annotated[
    str | None,
    typer.Option(
        "--audit-days",
        envvar="KEYLATCH_AUDIT_DAYS",
        help="How long to keep the audit log; 0: for ever.",
        show_default="400",
    ),
]
ClientsOption = Annotated[
    str | None,
    typer.Option(
        "--clients",
        envvar="KEYLATCH_CLIENTS",
        help="on: keep from which network each key was used last.",
        show_default="off",
    ),
]
LogOption = Annotated[
    str | None,
    typer.Option(
        "--log", envvar="KEYLATCH_LOG", help="How to log: text or json.", show_default="text"
    ),
]
LogFailuresOption = Annotated[
    str | None,
    typer.Option(
        "--log-failures",
        envvar="KEYLATCH_LOG_FAILURES",
        help="Log refused requests with their address: on or off.",
        show_default="off",
    ),
]
TimingOption = Annotated[
    str | None,
    typer.Option(
        "--timing",
        envvar="KEYLATCH_TIMING",
        help="Tell in headers how long checks took: on or off.",
        show_default="off",
    ),
]
TracingOption = Annotated[
    str | None,
    typer.Option(
        "--tracing",
        envvar="KEYLATCH_TRACING",
        help="Make spans of OpenTelemetry: on or off.",
        show_default="off",
    ),
]
VerifyRequestOption = Annotated[
    str | None,
    typer.Option(
        "--verify-request",
        envvar="KEYLATCH_VERIFY_REQUEST",
        help="Where proxies tell /verify what they were asked: none, forwarded or original.",
        show_default="none",
    ),
]
ExtAuthzRequestOption = Annotated[
    str | None,
    typer.Option(
        "--ext-authz-request",
        envvar="KEYLATCH_EXT_AUTHZ_REQUEST",
        help="The same for /ext_authz: envoy, none, forwarded or original.",
        show_default="envoy",
    ),
]
ProxyCacheOption = Annotated[
    str | None,
    typer.Option(
        "--proxy-cache-ttl",
        envvar="KEYLATCH_PROXY_CACHE_TTL",
        help="Seconds a proxy may remember an allow; a revoke does not reach it there.",
        show_default="0",
    ),
]
OrganizationOption = Annotated[str, typer.Option("--organization", help="Whose keys.")]
OwnerOption = Annotated[
    str | None,
    typer.Option("--organization", help="Only if the key is this organisation's."),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The id of the key.")]
OrganizationArgument = Annotated[str, typer.Argument(metavar="ORGANIZATION", help="Which one.")]
IdleOption = Annotated[
    int | None,
    typer.Option(
        "--idle", metavar="DAYS", help="Only keys not used for so long.", min=1, max=MAX_IDLE_DAYS
    ),
]
DaysOption = Annotated[
    int, typer.Option(help="How far back, today included.", min=1, max=MAX_USAGE_DAYS)
]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
