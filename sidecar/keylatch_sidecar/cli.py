"""`keylatch`: serve, manage keys, verify one. Speaks `error: …` and `hint: …`, never tracebacks.

Exit codes: 0 done, 1 refused, 2 wrong usage or the store cannot be reached. A token is never an
argument, because arguments land in shell histories and process lists.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from keylatch import credentials
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError, KeylatchError
from keylatch.keyring import LIVE, InvalidValue, Keyring
from keylatch.model import FULL, Allow, KeyRecord, Reason
from keylatch.refusals import ANSWERS
from keylatch.settings import Settings
from keylatch_sidecar.unsent import describe
from keylatch_sidecar.verify import wanted_by

T = TypeVar("T")

REFUSED = 1
UNUSABLE = 2

cli = typer.Typer(
    help="API keys for web applications: create, list, revoke and verify them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks would show local variables
    add_completion=False,
)
keys = typer.Typer(help="Manage the keys of an organisation.", no_args_is_help=True)
cli.add_typer(keys, name="keys")

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
OrganizationOption = Annotated[str, typer.Option("--organization", help="Whose keys.")]
JSONOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def main() -> None:
    """The console script."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
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
    prefix: Annotated[
        str | None, typer.Option(envvar="KEYLATCH_PREFIX", help="First word of new tokens.")
    ] = None,
    hasher: Annotated[
        str | None, typer.Option(envvar="KEYLATCH_HASHER", help="argon2id or sha256.")
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(envvar="KEYLATCH_LEASE", help="Seconds to trust caches unheard."),
    ] = None,
) -> None:
    """Serve the management endpoints and answer proxies' verify calls."""
    import uvicorn

    logging.getLogger("keylatch").setLevel(logging.WARNING)
    given = {"store": store, "redis": redis, "prefix": prefix, "hasher": hasher, "lease": lease}
    Settings.load(**given)
    for name, value in given.items():
        if value is not None:
            os.environ[f"KEYLATCH_{name.upper()}"] = str(value)  # for the workers
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
        timeout_keep_alive=75,  # above the proxies' idle times, or they find closed connections
        access_log=False,
        log_level="info",
    )


@keys.command("create")
def create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    organization: OrganizationOption = "default",
    permission: Annotated[str, typer.Option(help="FULL or SENDING.")] = FULL,
    environment: Annotated[str, typer.Option(help="A word such as live or test.")] = LIVE,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Create a key; its token alone goes to standard output, this once."""
    created = _with_keyring(
        store,
        redis,
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
    records = _with_keyring(store, redis, lambda keyring: keyring.list(organization))
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
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id of the key.")],
    organization: OrganizationOption = "default",
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Show one key."""
    record = _known(
        _with_keyring(store, redis, lambda keyring: keyring.get(organization, key_id)),
        key_id,
        organization,
    )
    _print_record(record, as_json)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id of the key.")],
    organization: OrganizationOption = "default",
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Revoke a key, at once and finally."""
    record = _known(
        _with_keyring(store, redis, lambda keyring: keyring.delete(organization, key_id)),
        key_id,
        organization,
    )
    _print_record(record, as_json)
    words.print(f"Revoked {record.id}.")


@cli.command()
def verify(
    permission: Annotated[
        list[str] | None, typer.Option(help="What the key must be allowed to do; repeatable.")
    ] = None,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Judge a token read from standard input: exit 0 allowed, 1 refused, 2 cannot decide."""
    token = credentials.read([b"Bearer " + sys.stdin.buffer.readline(1024).strip()])
    if isinstance(token, Reason):
        _fail("there is no token on standard input", "keylatch verify < token.txt", REFUSED)
    wanted = wanted_by("&".join(f"permission={word}" for word in permission or ()).encode())
    verdict = _with_engine(store, redis, lambda engine: engine.resolve(token, wanted))
    if isinstance(verdict, Allow):
        words.print(f"Allowed: {verdict.principal.key_id} ({verdict.principal.permission})")
        return
    answer = ANSWERS[verdict.reason]
    code = UNUSABLE if answer.status == 503 else REFUSED
    words.print(f"Refused: {answer.error}")
    raise typer.Exit(code)


def _with_keyring(
    store: str | None, redis: str | None, work: Callable[[Keyring], Awaitable[T]]
) -> T:
    async def run(engine: Engine) -> T:
        return await work(await engine.keyring())

    try:
        return _with_engine(store, redis, run)
    except InvalidValue as error:
        _fail(str(error), "keylatch keys create --help", UNUSABLE)


def _with_engine(store: str | None, redis: str | None, work: Callable[[Engine], Awaitable[T]]) -> T:
    engine = Engine(Settings.load(store=store, redis=redis))

    async def run() -> T:
        try:
            return await work(engine)
        finally:
            await engine.stop()

    try:
        return asyncio.run(run())
    except KeylatchError as error:
        _fail(error.message, error.hint, UNUSABLE)


def _known(record: KeyRecord | None, key_id: str, organization: str) -> KeyRecord:
    if record is None:
        _fail(
            f"there is no key {key_id[:64]!r} in organisation {organization!r}",
            f"keylatch keys list --organization {organization}",
            REFUSED,
        )
    return record


def _json(record: KeyRecord) -> dict[str, Any]:
    return describe(record).model_dump(by_alias=True)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _print_record(record: KeyRecord, as_json: bool) -> None:
    if as_json:
        _print_json(_json(record))
        return
    for name, value in _json(record).items():
        sys.stdout.write(f"{name}: {value}\n")


def _fail(wrong: str, hint: str, code: int) -> NoReturn:
    _say(wrong, hint)
    raise typer.Exit(code)


def _say(wrong: str, hint: str) -> None:
    sys.stderr.write(f"error: {wrong}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
