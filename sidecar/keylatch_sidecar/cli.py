"""`keylatch`: serve, manage keys, verify one. Speaks `error: …` and `hint: …`, never tracebacks.

Exit codes: 0 done, 1 refused, 2 wrong usage or the store cannot be reached. A token is never an
argument, because arguments land in shell histories and process lists; nor is one ever repeated.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from keylatch import credentials
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError, KeylatchError, StoreUnavailable
from keylatch.feed import Receipt
from keylatch.keyring import LIVE, ORGANIZATION_PATTERN, Changed, InvalidValue, Keyring
from keylatch.model import FULL, Allow, KeyRecord, Reason
from keylatch.refusals import ANSWERS
from keylatch.settings import Settings
from keylatch.store import Absent
from keylatch.tokens import SCAN_PATTERN
from keylatch_sidecar.receipts import revocation
from keylatch_sidecar.unsent import describe
from keylatch_sidecar.verify import wanted_of

T = TypeVar("T")

REFUSED = 1
UNUSABLE = 2
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

words = Console(stderr=True, highlight=False)

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="KEYLATCH_STORE",
        help="sqlite:///path.db or postgresql://…",
        show_default="sqlite:///keylatch.db",
    ),
]
RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis", envvar="KEYLATCH_REDIS", help="URL of the shared cache", show_default="none"
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
        help="Seconds to trust caches without hearing from the store.",
        show_default="1.0",
    ),
]
OrganizationOption = Annotated[str, typer.Option("--organization", help="Whose keys.")]
OwnerOption = Annotated[
    str | None,
    typer.Option("--organization", help="Only if the key is this organisation's."),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The id of the key.")]
OrganizationArgument = Annotated[str, typer.Argument(metavar="ORGANIZATION", help="Which one.")]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    if any(re.search(SCAN_PATTERN, argument) for argument in sys.argv):
        _refuse_token_in_argument()
    try:
        cli()
    except ConfigurationError as error:
        for wrong, hint in error.mistakes:
            _say(wrong, hint)
        sys.exit(UNUSABLE)


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8700,
    uds: Annotated[Path | None, typer.Option(help="Unix socket instead of a port.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 1,
    store: StoreOption = None,
    redis: RedisOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
    lease: LeaseOption = None,
) -> None:
    """Serve the management endpoints and answer proxies' verify calls."""
    import uvicorn

    logging.getLogger("keylatch").setLevel(logging.WARNING)
    given = {"store": store, "redis": redis, "prefix": prefix, "hasher": hasher, "lease": lease}
    _prepare_store(Settings.load(**given))
    for name, value in given.items():
        if value is not None:
            os.environ[f"KEYLATCH_{name.upper()}"] = value  # for the workers
    place = f"{host}:{port}" if uds is None else str(uds)
    if uds is not None and not os.access(uds.parent, os.W_OK):
        _fail(f"cannot make {uds}", "is its folder there, and writable?", UNUSABLE)
    # uvicorn raises a SIGTERM once more when all is stored and closed; by default that would kill
    # us before it has removed the socket.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        uvicorn.run(
            "keylatch_sidecar.app:from_environment",
            factory=True,
            host=host,
            port=port,
            uds=None if uds is None else str(uds),
            workers=workers,
            ws="none",  # an upgrade request is answered like any other
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,  # above the proxies' idle times, or they find closed ones
            access_log=False,
            log_level="info",
        )
    except OSError as error:
        _fail(f"cannot listen on {place}: {error.strerror}", "another path or port", UNUSABLE)
    except SystemExit as ended:  # uvicorn has logged why
        if ended.code:
            _fail(f"nothing is served on {place}", "the lines above say why", UNUSABLE)


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
        _print_json(_json(created.record) | {"token": created.token.reveal()})
        return
    sys.stdout.write(created.token.reveal() + "\n")
    words.print(
        f"Created {created.record.id} ({created.record.permission}) for {organization}. "
        "The token above is shown this once."
    )


@keys.command("list")
def list_keys(
    organization: OrganizationOption = "default",
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """List an organisation's keys, newest first."""
    if not re.fullmatch(ORGANIZATION_PATTERN, organization):
        _fail("no organisation has such a name", f"it matches {ORGANIZATION_PATTERN}", UNUSABLE)
    records = _with_keyring(
        Settings.load(store=store, redis=redis), lambda keyring: keyring.list(organization)
    )
    if as_json:
        _print_json([_json(record) for record in records])
        return
    table = Table(box=None)
    for heading in ("id", "name", "token", "permission", "created", "last used"):
        table.add_column(heading, no_wrap=heading in ("id", "token"), overflow="fold")
    for record in records:
        key = describe(record)
        used = key.last_used or "never"
        table.add_row(key.id, key.name, key.partial_token, key.permission, key.created_at, used)
    Console(highlight=False, markup=False).print(table)


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
    _print_record(_known(record), as_json)


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

    changed = _known(_with_engine(Settings.load(store=store, redis=redis), delete))
    receipt = revocation(changed.receipt).model_dump(by_alias=True)
    if as_json:
        _print_json(_json(changed.record) | {"revocation": receipt})
        return
    _print_record(changed.record, as_json)
    words.print(f"Revoked {changed.record.id}: {_spread(changed.receipt)}.")


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
        _fail("there is no such organisation", "its first key makes it", REFUSED)
    words.print(f"{'Enabled' if active else 'Disabled'} {organization}: {_spread(receipt)}.")


def _spread(receipt: Receipt) -> str:
    if not receipt.members:
        return "in force for every check that starts now"
    return f"acknowledged by {receipt.acknowledged} of {receipt.members} processes, in force"


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
        _refuse_token_in_argument()
    token = credentials.read([b"Bearer " + sys.stdin.buffer.readline(1024).strip()])
    if isinstance(token, Reason):
        _fail("there is no token on standard input", "keylatch verify < token.txt", REFUSED)
    wanted = wanted_of(permission or ())
    settings = Settings.load(store=store, redis=redis)
    verdict = _with_engine(settings, lambda engine: engine.resolve(token, wanted))
    if isinstance(verdict, Allow):
        words.print(f"Allowed: {verdict.principal.key_id} ({verdict.principal.permission})")
        return
    answer = ANSWERS[verdict.reason]
    code = UNUSABLE if answer.status == 503 else REFUSED
    words.print(f"Refused: {answer.error}")
    raise typer.Exit(code)


def _with_keyring(settings: Settings, work: Callable[[Keyring], Awaitable[T]]) -> T:
    async def run(engine: Engine) -> T:
        return await work(await engine.keyring())

    try:
        return _with_engine(settings, run)
    except InvalidValue as error:
        _fail(str(error), "keylatch keys create --help", UNUSABLE)


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
        _fail(error.message, error.hint, UNUSABLE)


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
        _fail(error.message, error.hint, UNUSABLE)


async def _find(engine: Engine, key_id: str, organization: str | None) -> KeyRecord | None:
    """The key with this id: an operator needs no organisation to find it."""
    found = await engine.store.find(key_id) if _ID.fullmatch(key_id) else None
    if found is None or isinstance(found, Absent):
        return None
    return found.record if organization in (None, found.record.organization_id) else None


def _known(found: T | None) -> T:
    if found is None:  # what was asked for is not repeated: it could be a secret
        _fail("there is no such key", "keylatch keys list --organization …", REFUSED)
    return found


def _json(record: KeyRecord) -> dict[str, Any]:
    return describe(record).model_dump(by_alias=True)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _print_record(record: KeyRecord, as_json: bool) -> None:
    if as_json:
        _print_json(_json(record))
        return
    for name, value in _json(record).items():
        sys.stdout.write(f"{name}: {value}\n")


def _refuse_token_in_argument() -> NoReturn:
    _say(
        "a token is never an argument: it is in your shell's history and in process lists now",
        "revoke that key; verify reads tokens from standard input, ids look like key_…",
    )
    sys.exit(UNUSABLE)


def _fail(wrong: str, hint: str, code: int) -> NoReturn:
    _say(wrong, hint)
    raise typer.Exit(code)


def _say(wrong: str, hint: str) -> None:
    sys.stderr.write(f"error: {wrong}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
