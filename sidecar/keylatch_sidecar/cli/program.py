"""`keylatch`: serve, manage keys, verify one. Speaks `error: …` and `hint: …`, never tracebacks.

Exit codes: 0 done, 1 refused, 2 wrong usage or the store cannot be reached. A token is never an
argument, because arguments land in shell histories and process lists; nor is one ever repeated.
"""

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, TextIO, TypeVar
from urllib.parse import unquote

import typer

from keylatch._variables import export_variables
from keylatch.core import credentials
from keylatch.core.decisions import FULL, Allow, Reason
from keylatch.core.refusals import ANSWERS
from keylatch.core.tokens import SCAN_PATTERN
from keylatch.core.validation import LIVE, ORGANIZATION_PATTERN
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError, OperationalError, StoreUnavailable
from keylatch.management.keyring import Created, Keyring
from keylatch.settings import Settings
from keylatch_sidecar.cli import key_changes as life_commands
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.audit import audit
from keylatch_sidecar.cli.backup import (
    apply_revocations,
    backup,
    export_revocations,
    restore,
)
from keylatch_sidecar.cli.bench import bench
from keylatch_sidecar.cli.doctor import doctor
from keylatch_sidecar.cli.migrate import migrate
from keylatch_sidecar.cli.options import (
    AuditDaysOption,
    ClientsOption,
    ExtAuthzRequestOption,
    HasherOption,
    IdleOption,
    JSONOption,
    KeyId,
    LeaseOption,
    LogFailuresOption,
    LogOption,
    MaxChangesOption,
    MaxKeysOption,
    OrganizationArgument,
    OrganizationOption,
    OwnerOption,
    PepperFileOption,
    PrefixOption,
    ProxyCacheOption,
    RedisOption,
    StoreOption,
    TimingOption,
    TracingOption,
    VerifyRequestOption,
)
from keylatch_sidecar.cli.scan import scan
from keylatch_sidecar.cli.secrets import secrets
from keylatch_sidecar.cli.session import find, with_engine, with_keyring
from keylatch_sidecar.cli.usage import usage
from keylatch_sidecar.forward_auth.decision import all_of
from keylatch_sidecar.importing import batches as intake
from keylatch_sidecar.importing import file as key_file
from keylatch_sidecar.settings import ProxySettings

T = TypeVar("T")

# A store or Redis as an argument, or as the value of an option: with a password before the @, where
# SQLAlchemy looks for it, or among its parameters.
_URL_WITH_PASSWORD: Final = re.compile(
    r"(--?[\w-]+=)?\s*(postgres|redis|valkey|unix)[\w+]*://"
    r"([^:/]*:[^@]+@|.*[?&][^=&]*passw[^=&]*=)",
    re.IGNORECASE | re.DOTALL,
)

cli = typer.Typer(
    help="API keys for web applications: create, list, revoke and verify them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks would show local variables
    add_completion=False,
)
keys = typer.Typer(help="Manage the keys of an organisation.", no_args_is_help=True)
cli.add_typer(keys, name="keys")
organizations = typer.Typer(help="Disable or enable an organisation.", no_args_is_help=True)
cli.add_typer(organizations, name="organizations")
revocations = typer.Typer(
    help="Export what is revoked or disabled, and apply it after a restore.", no_args_is_help=True
)
cli.add_typer(revocations, name="revocations")


life_commands.register(keys, organizations)
cli.command()(audit)
cli.command()(bench)
cli.command()(doctor)
cli.command()(migrate)
cli.command()(backup)
cli.command()(restore)
keys.command()(usage)
cli.command()(scan)
cli.add_typer(secrets, name="secrets")
revocations.command("export")(export_revocations)
revocations.command("apply")(apply_revocations)


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    if any(re.search(SCAN_PATTERN, argument) for argument in sys.argv):
        output.refuse_token_in_argument()
    if any(_URL_WITH_PASSWORD.match(unquote(argument)) for argument in sys.argv[1:]):
        output.refuse_password_in_argument()
    try:
        cli()
    except ConfigurationError as error:
        for message, hint in error.mistakes:
            output.print_error(message, hint)
        sys.exit(output.ERROR)


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8700,
    uds: Annotated[Path | None, typer.Option(help="Unix socket instead of a port.")] = None,
    admin_host: Annotated[str, typer.Option(help="Address of --admin-port.")] = "127.0.0.1",
    admin_port: Annotated[
        int | None, typer.Option(help="Manage keys on this port only.", min=1, max=65535)
    ] = None,
    admin_uds: Annotated[Path | None, typer.Option(help="Or on this Unix socket only.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Answer Envoy's gRPC on this port.", min=1, max=65535)
    ] = None,
    grpc_uds: Annotated[Path | None, typer.Option(help="Or on this Unix socket.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics here, without a key.", min=1, max=65535)
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    store: StoreOption = None,
    redis: RedisOption = None,
    pepper_file: PepperFileOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
    lease: LeaseOption = None,
    max_keys: MaxKeysOption = None,
    max_changes: MaxChangesOption = None,
    audit_days: AuditDaysOption = None,
    clients: ClientsOption = None,
    log: LogOption = None,
    log_failures: LogFailuresOption = None,
    timing: TimingOption = None,
    tracing: TracingOption = None,
    verify_request: VerifyRequestOption = None,
    ext_authz_request: ExtAuthzRequestOption = None,
    proxy_cache_ttl: ProxyCacheOption = None,
) -> None:
    """Serve the management endpoints and answer proxies' verify calls."""
    from keylatch_sidecar import server
    from keylatch_sidecar.http_server.limits import MIN_DESCRIPTORS
    from keylatch_sidecar.server import Listener

    logging.getLogger("keylatch").setLevel(logging.WARNING)
    options = {"store": store, "redis": redis, "prefix": prefix, "hasher": hasher, "lease": lease}
    options |= {"max_keys": max_keys, "max_changes": max_changes, "audit_days": audit_days}
    options |= {"clients": clients, "log": log, "timing": timing, "tracing": tracing}
    options |= {"log_failures": log_failures}
    options |= {"pepper_file": pepper_file}
    proxy_options = {
        "verify_request": verify_request,
        "ext_authz_request": ext_authz_request,
        "proxy_cache_ttl": proxy_cache_ttl,
    }
    settings = _load_all(
        lambda: Settings.load(**options), lambda: ProxySettings.load(**proxy_options)
    )
    _prepare_store(settings)
    export_variables(options | proxy_options)  # to the workers
    listener = Listener(host, port, uds)
    admin = Listener.optional(admin_host, admin_port, admin_uds)
    grpc = Listener.optional(host, grpc_port, grpc_uds)
    metrics = Listener.optional(metrics_host, metrics_port, None)
    addresses = [
        other.scope_address for other in (listener, admin, grpc, metrics) if other is not None
    ]
    if len(set(addresses)) < len(addresses):
        output.fail("two listeners have the same address", "another port", output.ERROR)
    if grpc is not None:
        if workers > 1 and grpc.uds is not None:
            message = "several workers cannot share a Unix socket for gRPC"
            output.fail(message, "--grpc-port, or one worker", output.ERROR)
        try:
            import keylatch_sidecar.forward_auth.ext_authz_grpc  # noqa: F401 - here, and not in every worker
        except ImportError as error:
            message, _, hint = str(error).partition(": ")
            output.fail(message, hint, output.ERROR)
    try:
        started = server.run(
            listener,
            admin,
            grpc,
            workers,
            metrics_listener=metrics,
            logs_json=settings.log == "json",
        )
    except server.TooFewDescriptors as error:
        hint = f"ulimit -n, or LimitNOFILE= of systemd: {MIN_DESCRIPTORS} at least"
        output.fail(str(error), hint, output.ERROR)
    except server.CannotListen as error:
        output.fail(str(error), "another address, port or path", output.ERROR)
    if not started:
        output.fail(f"the server did not start on {listener}", "see the lines above", output.ERROR)


def _load_all(first: Callable[[], T], *others: Callable[[], object]) -> T:
    """The first one's result, or what any of them found wrong."""
    results: list[T] = []
    errors: list[tuple[str, str]] = []
    for load in (lambda: results.append(first()), *others):
        try:
            load()
        except ConfigurationError as error:
            errors += error.mistakes
    if errors:
        raise ConfigurationError(errors)
    return results[0]


@keys.command("create")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    organization: OrganizationOption = "default",
    permission: Annotated[str, typer.Option(help="FULL or SENDING.")] = FULL,
    environment: Annotated[str, typer.Option(help="A word such as live or test.")] = LIVE,
    expires_in: life_commands.ExpiresInOption = None,
    expires_at: life_commands.ExpiresAtOption = None,
    metadata: life_commands.MetadataOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
) -> None:
    """Create a key; its token alone goes to standard output, this once."""

    async def run(keyring: Keyring) -> Created:
        return await keyring.create(
            organization,
            name,
            permission=permission,
            environment=environment,
            expires_at=life_commands.expiry_of(keyring.now_ms(), expires_in, expires_at),
            metadata=life_commands.metadata_of(metadata),
        )

    settings = Settings.load(store=store, redis=redis, prefix=prefix, hasher=hasher)
    created = with_keyring(settings, run)
    if as_json:
        output.print_json(output.as_json(created.record) | {"token": created.secret})
        return
    output.print_token(created.token)
    output.stderr.print(
        f"Created {created.record.id} ({created.record.permission}) for {organization}. "
        "The token above is shown this once."
    )


@keys.command("import")
def import_keys(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines or CSV; - reads standard input.")
    ],
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="jsonl or csv.", show_default="by the file's name, else jsonl"
        ),
    ] = None,
    organization: OrganizationOption = "default",
    permission: Annotated[str, typer.Option(help="FULL or SENDING.")] = FULL,
    environment: Annotated[str, typer.Option(help="A word such as live or test.")] = LIVE,
    from_line: Annotated[int, typer.Option(help="Leave out the lines before this one.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Keys a transaction.", min=1, max=10_000)] = 1_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file only.")] = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
) -> None:
    """Create a key for each line of a file; their tokens go to standard output, this once.

    A line has a "name", and may have "organization", "permission", "environment" and
    "expiresAt"; the options count for what it leaves out. All mistakes are told before anything
    is created. A line with a "scheme" brings a key that was made elsewhere, by its hash, or by
    itself as "raw"; such keys are reported and never printed.
    """
    settings = Settings.load(store=store, redis=redis, prefix=prefix, hasher=hasher)
    file_format = intake.file_format(file, file_format)
    defaults = key_file.Defaults(organization, permission, environment)

    async def run(keyring: Keyring, stream: TextIO) -> str:
        rows = await asyncio.to_thread(
            key_file.read, stream, file_format, defaults, keyring.validate, from_line
        )
        if dry_run:
            await intake.preview(keyring, rows, batch)
            return f"The file asks for {len(rows):,} keys; nothing was created."
        intake.warn_of_hashing_cost(intake.count_to_hash(rows), settings.hasher)
        return (await intake.import_rows(keyring, rows, batch)).summary()

    try:
        with intake.open_input(file) as stream:
            summary = with_keyring(settings, lambda keyring: run(keyring, stream))
    except key_file.FileErrors as mistakes:
        intake.exit_with_errors(mistakes)
    output.stderr.print(summary)


@keys.command("list")
def list_keys(
    organization: OrganizationOption = "default",
    limit: Annotated[int | None, typer.Option(help="Only so many.", min=1)] = None,
    idle: IdleOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """List an organisation's keys, newest first."""
    if not re.fullmatch(ORGANIZATION_PATTERN, organization):
        output.fail(
            "no organisation has such a name",
            f"it matches {ORGANIZATION_PATTERN}",
            output.ERROR,
        )
    show = output.print_json_of if as_json else output.print_table_of
    idle_time = None if idle is None else timedelta(days=idle)

    async def run(keyring: Keyring) -> None:
        is_first, remaining = True, limit or sys.maxsize
        async for page in keyring.pages(organization, idle=idle_time):
            records = page.records[:remaining]
            remaining -= len(records)
            is_last = remaining == 0 or page.next_cursor is None
            # In a thread, because writing may take long: see `intake`.
            await asyncio.to_thread(show, records, is_first, is_last)
            if is_last:
                return
            is_first = False

    with_keyring(Settings.load(store=store, redis=redis), run)


@keys.command()
def show(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Show one key."""
    settings = Settings.load(store=store, redis=redis)
    record = with_engine(settings, lambda engine: find(engine, key_id, organization))
    record = output.require_found(record)
    if as_json:
        output.print_json(output.as_json(record))
    else:
        output.print_record(record)


@organizations.command()
def disable(
    organization: OrganizationArgument, store: StoreOption = None, redis: RedisOption = None
) -> None:
    """Refuse all keys of an organisation, at once, until it is enabled again."""
    _set_active(organization, False, Settings.load(store=store, redis=redis))


@organizations.command()
def enable(
    organization: OrganizationArgument, store: StoreOption = None, redis: RedisOption = None
) -> None:
    """Let the keys of an organisation in again."""
    _set_active(organization, True, Settings.load(store=store, redis=redis))


def _set_active(organization: str, active: bool, settings: Settings) -> None:
    is_valid_name = re.fullmatch(ORGANIZATION_PATTERN, organization)
    receipt = is_valid_name and with_keyring(
        settings, lambda keyring: keyring.set_organization_active(organization, active)
    )
    if not receipt:
        output.fail("there is no such organisation", "its first key makes it", output.REFUSED)
    output.stderr.print(
        f"{'Enabled' if active else 'Disabled'} {organization}: {output.propagation(receipt)}."
    )


@cli.command(context_settings={"allow_extra_args": True})
def verify(
    context: typer.Context,
    permission: Annotated[
        list[str] | None, typer.Option(help="What the key must be allowed to do; repeatable.")
    ] = None,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Check a token read from standard input: exit 0 allowed, 1 refused, 2 cannot decide."""
    if context.args:
        output.refuse_token_in_argument()
    line = sys.stdin.buffer.readline(1024).strip()
    token = credentials.read([b"Bearer " + line], allow_pipe=True)
    if isinstance(token, Reason):
        output.fail(
            "there is no token on standard input", "keylatch verify < token.txt", output.REFUSED
        )
    requirement = all_of(permission or ())
    settings = Settings.load(store=store, redis=redis)
    decision = with_engine(settings, lambda engine: engine.check(token, requirement))
    if isinstance(decision, Allow):
        output.stderr.print(
            f"Allowed: {decision.principal.key_id} ({decision.principal.permission})"
        )
        return
    answer = ANSWERS[decision.reason]
    code = output.ERROR if answer.status == 503 else output.REFUSED
    output.stderr.print(f"Refused: {answer.error}")
    raise typer.Exit(code)


def _prepare_store(settings: Settings) -> None:
    """Set it up once and not in every worker; one that is too new stops us.

    One that cannot be reached does not: it may come up later, and until then we answer 503.
    """
    engine = Engine(settings)

    async def run() -> None:
        try:
            with contextlib.suppress(StoreUnavailable):
                await engine.store.open(int(time.time() * 1000))
        finally:
            await engine.stop()

    try:
        asyncio.run(run())
    except OperationalError as error:
        output.fail(error.message, error.hint, output.ERROR)
