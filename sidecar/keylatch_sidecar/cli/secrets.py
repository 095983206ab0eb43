"""`keylatch secrets`: the store's own secrets, listed, rotated and retired; none is ever shown.

Exit codes: 0 done, 1 it must stay or was not confirmed, 2 wrong usage or no store.
"""

from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from keylatch.engine import Engine
from keylatch.errors import SecretInUse
from keylatch.revocation.invalidations import Receipt
from keylatch.settings import Settings
from keylatch.storage.secrets import KINDS, SecretInfo
from keylatch_sidecar.api.schemas import iso
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import JSONOption, LeaseOption, RedisOption, StoreOption
from keylatch_sidecar.cli.session import account, with_engine

_ROLES: Final = {
    "primary": "makes everything new",
    "enabled": "verifies what it made",
    "pending": "not used yet: a rotation is not finished",
}

secrets = typer.Typer(
    help="The store's own secrets: the check key of tokens and the pepper of the shared cache.",
    no_args_is_help=True,
)


@secrets.command("list")
def list_secrets(
    as_json: JSONOption = False, store: StoreOption = None, redis: RedisOption = None
) -> None:
    """List them by id and age; what they are is never shown."""

    async def run(engine: Engine) -> Sequence[SecretInfo]:
        return await (await engine.store_secrets()).list()

    stored = with_engine(Settings.load(store=store, redis=redis), run)
    if as_json:
        output.print_json([_as_json(secret) for secret in stored])
        return
    table = Table(box=None)
    for heading in ("id", "kind", "since", "role"):
        table.add_column(heading)
    for secret in stored:
        row = (str(secret.id), secret.kind, iso(secret.status_since), _ROLES[secret.status])
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


@secrets.command()
def rotate(
    check_key: Annotated[bool, typer.Option("--check-key", help="Only that of tokens.")] = False,
    pepper: Annotated[bool, typer.Option("--pepper", help="Only that of the cache.")] = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    lease: LeaseOption = None,
) -> None:
    """Make all that is new with new secrets, while everything goes on; both, if none is named.

    Old tokens and old values in Redis stay good. If it is cut off, run it again.
    """
    named = [kind for kind, given in zip(KINDS, (check_key, pepper), strict=True) if given]

    async def run(engine: Engine) -> Receipt:
        return await (await engine.store_secrets()).rotate(named or KINDS, by=account())

    receipt = with_engine(Settings.load(store=store, redis=redis, lease=lease), run)
    what = " and ".join({"mac": "MAC key", "pepper": "pepper"}[kind] for kind in named or KINDS)
    output.stderr.print(f"Rotated {what}: {output.propagation(receipt)}.")


@secrets.command()
def retire(
    secret_id: Annotated[int, typer.Argument(metavar="ID", help="As secrets list has it.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Also a check key, which tokens depend on.")
    ] = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    lease: LeaseOption = None,
) -> None:
    """Delete one that was replaced five minutes ago or earlier.

    Tokens whose check was made with a retired check key are refused like made-up ones.
    """

    async def run(engine: Engine) -> Receipt | int:
        vault = await engine.store_secrets()
        dependants = await vault.count_dependent_keys(secret_id)
        is_check = any(each.id == secret_id and each.kind == "mac" for each in await vault.list())
        if is_check and not yes:
            return dependants
        return await vault.retire(secret_id, by=account())

    try:
        result = with_engine(Settings.load(store=store, redis=redis, lease=lease), run)
    except SecretInUse as error:
        output.fail(error.message, error.hint, output.REFUSED)
    if isinstance(result, int):
        output.fail(
            f"{result:,} live keys are older than its successor: their tokens would be refused",
            "give them new tokens first; --yes retires it all the same",
            output.REFUSED,
        )
    output.stderr.print(f"Retired {secret_id}: {output.propagation(result)}.")


def _as_json(secret: SecretInfo) -> dict[str, object]:
    return {
        "id": secret.id,
        "kind": secret.kind,
        "since": iso(secret.status_since),
        "status": secret.status,
    }
