"""`keylatch`: serve, manage keys, verify one. Speaks `error: …` and `hint: …`, never tracebacks.

Exit codes: 0 done, 1 refused, 2 wrong usage or the store cannot be reached. A token is never an
argument, because arguments land in shell histories and process lists; nor is one ever repeated.
"""

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TextIO, TypeVar

import typer

from keylatch import credentials
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError, KeylatchError, StoreUnavailable
from keylatch.keyring import LIVE, ORGANIZATION_PATTERN, Changed, InvalidValue, Keyring
from keylatch.model import FULL, Allow, KeyRecord, Reason
from keylatch.refusals import ANSWERS
from keylatch.settings import Settings
from keylatch.store import Absent
from keylatch.tokens import SCAN_PATTERN
from keylatch_sidecar import intake, key_file, terminal
from keylatch_sidecar.bench_command import bench
from keylatch_sidecar.options import (
    ExtAuthzFactsOption,
    HasherOption,
    JSONOption,
    KeyId,
    LeaseOption,
    LogOption,
    OrganizationArgument,
    OrganizationOption,
    OwnerOption,
    PrefixOption,
    ProxyCacheOption,
    RedisOption,
    StoreOption,
    TimingOption,
    TracingOption,
    VerifyFactsOption,
)
from keylatch_sidecar.proxies import wanted_of
from keylatch_sidecar.receipts import revocation
from keylatch_sidecar.settings import ProxySettings

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

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


cli.command()(bench)


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    if any(re.search(SCAN_PATTERN, argument) for argument in sys.argv):
        terminal.refuse_token_in_argument()
    try:
        cli()
    except ConfigurationError as error:
        for wrong, hint in error.mistakes:
            terminal.say(wrong, hint)
        sys.exit(terminal.UNUSABLE)


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
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    store: StoreOption = None,
    redis: RedisOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
    lease: LeaseOption = None,
    log: LogOption = None,
    timing: TimingOption = None,
    tracing: TracingOption = None,
    verify_facts: VerifyFactsOption = None,
    ext_authz_facts: ExtAuthzFactsOption = None,
    proxy_cache_ttl: ProxyCacheOption = None,
) -> None:
    """Serve the management endpoints and answer proxies' verify calls."""
    from keylatch_sidecar import serving  # the server's library costs 0.1 s at import
    from keylatch_sidecar.serving import Listener

    logging.getLogger("keylatch").setLevel(logging.WARNING)
    given = {"store": store, "redis": redis, "prefix": prefix, "hasher": hasher, "lease": lease}
    given |= {"log": log, "timing": timing, "tracing": tracing}
    proxies = {
        "verify_facts": verify_facts,
        "ext_authz_facts": ext_authz_facts,
        "proxy_cache_ttl": proxy_cache_ttl,
    }
    settings = _all_or_every_mistake(
        lambda: Settings.load(**given), lambda: ProxySettings.load(**proxies)
    )
    _prepare_store(settings)
    for name, value in (given | proxies).items():
        if value is not None:
            os.environ[f"KEYLATCH_{name.upper()}"] = value  # for the workers
    listener = Listener(host, port, uds)
    admin = Listener.optional(admin_host, admin_port, admin_uds)
    grpc = Listener.optional(host, grpc_port, grpc_uds)
    taken = [other.key for other in (listener, admin, grpc) if other is not None]
    if len(set(taken)) < len(taken):
        terminal.fail("two want to listen in the same place", "another port", terminal.UNUSABLE)
    if grpc is not None:
        if workers > 1 and grpc.uds is not None:
            wrong = "several workers cannot share a Unix socket for gRPC"
            terminal.fail(wrong, "--grpc-port, or one worker", terminal.UNUSABLE)
        try:
            import keylatch_sidecar.grpc_authz  # noqa: F401 - here, and not in every worker
        except ImportError as error:
            wrong, _, hint = str(error).partition(": ")
            terminal.fail(wrong, hint, terminal.UNUSABLE)
    try:
        started = serving.run(listener, admin, grpc, workers, logs_json=settings.log == "json")
    except serving.CannotListen as error:
        terminal.fail(str(error), "another address, port or path", terminal.UNUSABLE)
    if not started:
        terminal.fail(
            f"nothing is served on {listener}", "the lines above say why", terminal.UNUSABLE
        )


def _all_or_every_mistake(first: Callable[[], T], *others: Callable[[], object]) -> T:
    """The first one's result, or what any of them found wrong."""
    results: list[T] = []
    mistakes: list[tuple[str, str]] = []
    for load in (lambda: results.append(first()), *others):
        try:
            load()
        except ConfigurationError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigurationError(mistakes)
    return results[0]


@keys.command("create")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    organization: OrganizationOption = "default",
    permission: Annotated[str, typer.Option(help="FULL or SENDING.")] = FULL,
    environment: Annotated[str, typer.Option(help="A word such as live or test.")] = LIVE,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
) -> None:
    """Create a key; its token alone goes to standard output, this once."""
    created = _with_keyring(
        Settings.load(store=store, redis=redis, prefix=prefix, hasher=hasher),
        lambda keyring: keyring.create(
            organization, name, permission=permission, environment=environment
        ),
    )
    if as_json:
        terminal.print_json(terminal.as_json(created.record) | {"token": created.token.reveal()})
        return
    sys.stdout.write(created.token.reveal() + "\n")
    terminal.words.print(
        f"Created {created.record.id} ({created.record.permission}) for {organization}. "
        "The token above is shown this once."
    )


@keys.command("import")
def import_keys(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines or CSV; - reads standard input.")
    ],
    form: Annotated[
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
    is created. Tokens and hashes of another system cannot be imported.
    """
    settings = Settings.load(store=store, redis=redis, prefix=prefix, hasher=hasher)
    form = intake.form_of(file, form)
    defaults = key_file.Defaults(organization, permission, environment)

    async def run(keyring: Keyring, stream: TextIO) -> int:
        asked = await asyncio.to_thread(
            key_file.read, stream, form, defaults, keyring.faults, from_line
        )
        if not dry_run:
            intake.forewarn(len(asked), settings.hasher)
            await intake.make(keyring, asked, batch)
        return len(asked)

    try:
        with intake.opened(file) as stream:
            made = _with_keyring(settings, lambda keyring: run(keyring, stream))
    except key_file.Mistakes as mistakes:
        intake.refuse(mistakes)
    if dry_run:
        terminal.words.print(f"The file asks for {made:,} keys; nothing was created.")
    else:
        terminal.words.print(f"Created {made:,} keys. The tokens above are shown this once.")


@keys.command("list")
def list_keys(
    organization: OrganizationOption = "default",
    limit: Annotated[int | None, typer.Option(help="Only so many.", min=1)] = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """List an organisation's keys, newest first."""
    if not re.fullmatch(ORGANIZATION_PATTERN, organization):
        terminal.fail(
            "no organisation has such a name",
            f"it matches {ORGANIZATION_PATTERN}",
            terminal.UNUSABLE,
        )
    show = terminal.print_json_of if as_json else terminal.print_table_of

    async def run(keyring: Keyring) -> None:
        is_first, left = True, limit or sys.maxsize
        async for page in keyring.pages(organization):
            records = page.records[:left]
            left -= len(records)
            is_last = left == 0 or page.goes_on_after is None
            # In a thread, because writing may take long: see `intake`.
            await asyncio.to_thread(show, records, is_first, is_last)
            if is_last:
                return
            is_first = False

    _with_keyring(Settings.load(store=store, redis=redis), run)


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
    record = _with_engine(settings, lambda engine: _find(engine, key_id, organization))
    record = terminal.known(record)
    if as_json:
        terminal.print_json(terminal.as_json(record))
    else:
        terminal.print_record(record)


@keys.command()
def revoke(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Revoke a key, at once and finally."""

    async def delete(engine: Engine) -> Changed | None:
        found = await _find(engine, key_id, organization)
        if found is None:
            return None
        return await (await engine.keyring()).delete(found.organization_id, key_id)

    changed = terminal.known(_with_engine(Settings.load(store=store, redis=redis), delete))
    receipt = revocation(changed.receipt).model_dump(by_alias=True)
    if as_json:
        terminal.print_json(terminal.as_json(changed.record) | {"revocation": receipt})
        return
    terminal.print_record(changed.record)
    terminal.words.print(f"Revoked {changed.record.id}: {terminal.spread(changed.receipt)}.")


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
    known = re.fullmatch(ORGANIZATION_PATTERN, organization)
    receipt = known and _with_keyring(
        settings, lambda keyring: keyring.set_organization_active(organization, active)
    )
    if not receipt:
        terminal.fail("there is no such organisation", "its first key makes it", terminal.REFUSED)
    terminal.words.print(
        f"{'Enabled' if active else 'Disabled'} {organization}: {terminal.spread(receipt)}."
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
    """Judge a token read from standard input: exit 0 allowed, 1 refused, 2 cannot decide."""
    if context.args:
        terminal.refuse_token_in_argument()
    token = credentials.read([b"Bearer " + sys.stdin.buffer.readline(1024).strip()])
    if isinstance(token, Reason):
        terminal.fail(
            "there is no token on standard input", "keylatch verify < token.txt", terminal.REFUSED
        )
    wanted = wanted_of(permission or ())
    settings = Settings.load(store=store, redis=redis)
    verdict = _with_engine(settings, lambda engine: engine.resolve(token, wanted))
    if isinstance(verdict, Allow):
        terminal.words.print(
            f"Allowed: {verdict.principal.key_id} ({verdict.principal.permission})"
        )
        return
    answer = ANSWERS[verdict.reason]
    code = terminal.UNUSABLE if answer.status == 503 else terminal.REFUSED
    terminal.words.print(f"Refused: {answer.error}")
    raise typer.Exit(code)


def _with_keyring(settings: Settings, work: Callable[[Keyring], Awaitable[T]]) -> T:
    async def run(engine: Engine) -> T:
        return await work(await engine.keyring())

    try:
        return _with_engine(settings, run)
    except InvalidValue as error:
        terminal.fail(str(error), "keylatch keys create --help", terminal.UNUSABLE)


def _with_engine(settings: Settings, work: Callable[[Engine], Awaitable[T]]) -> T:
    engine = Engine(settings)

    async def run() -> T:
        try:
            # A starting engine logs why it cannot and tries again later; this tells it now.
            await engine.store.open(int(time.time() * 1000))
            return await work(engine)
        finally:
            await engine.stop()

    try:
        return asyncio.run(run())
    except KeylatchError as error:
        terminal.fail(error.message, error.hint, terminal.UNUSABLE)


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
    except KeylatchError as error:
        terminal.fail(error.message, error.hint, terminal.UNUSABLE)


async def _find(engine: Engine, key_id: str, organization: str | None) -> KeyRecord | None:
    """The key with this id: an operator needs no organisation to find it."""
    found = await engine.store.find(key_id) if _ID.fullmatch(key_id) else None
    if found is None or isinstance(found, Absent):
        return None
    return found.record if organization in (None, found.record.organization_id) else None
