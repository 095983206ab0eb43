"""`keylatch secrets`: lists, rotates and retires the store's secrets; their values are never shown.

Exit codes: 0 done, 1 the secret is in use or --yes is missing, 2 wrong usage or no store.
"""

from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from keylatch.engine import Engine
from keylatch.errors import SecretInUse
from keylatch.revocation.propagation import Receipt
from keylatch.settings import Settings
from keylatch.storage.secrets import KINDS, SecretInfo
from keylatch_sidecar.api.schemas import iso
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, JSONOption, setting_options
from keylatch_sidecar.cli.session import account, with_engine

_ROLES: Final = {
    "primary": "used for new tokens and values",
    "enabled": "accepted",
    "pending": "not used yet: a rotation is unfinished",
}


@setting_options("store", "redis")
def list_secrets(as_json: JSONOption = False, *, given: Given) -> None:
    """List the secrets by id, kind, age and role. Their values are not shown."""

    async def run(engine: Engine) -> Sequence[SecretInfo]:
        return await (await engine.store_secrets()).list()

    stored = with_engine(Settings.load(**given), run)
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


@setting_options("store", "redis", "lease")
def rotate(
    check_key: Annotated[
        bool, typer.Option("--check-key", help="Only the MAC key of tokens.")
    ] = False,
    pepper: Annotated[
        bool, typer.Option("--pepper", help="Only the pepper of the shared cache.")
    ] = False,
    *,
    given: Given,
) -> None:
    """Replace the MAC key and the pepper for new tokens and values, without downtime.

    Existing tokens and values in Redis stay valid. After an interruption, run the command again.
    """
    named = [kind for kind, given in zip(KINDS, (check_key, pepper), strict=True) if given]

    async def run(engine: Engine) -> Receipt:
        return await (await engine.store_secrets()).rotate(named or KINDS, by=account())

    receipt = with_engine(Settings.load(**given), run)
    what = " and ".join({"mac": "MAC key", "pepper": "pepper"}[kind] for kind in named or KINDS)
    output.stderr.print(f"Rotated {what}: {output.propagation(receipt)}.")


@setting_options("store", "redis", "lease")
def retire(
    secret_id: Annotated[int, typer.Argument(metavar="ID", help="Id from secrets list.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Confirm for a MAC key, which tokens depend on.")
    ] = False,
    *,
    given: Given,
) -> None:
    """Delete a secret that was replaced at least five minutes ago.

    Tokens that were minted with a retired MAC key are refused like forged ones.
    """

    async def run(engine: Engine) -> Receipt | int:
        stored = await engine.store_secrets()
        dependants = await stored.count_dependent_keys(secret_id)
        is_mac_key = any(
            each.id == secret_id and each.kind == "mac" for each in await stored.list()
        )
        if is_mac_key and not yes:
            return dependants
        return await stored.retire(secret_id, by=account())

    try:
        result = with_engine(Settings.load(**given), run)
    except SecretInUse as error:
        output.fail(error.message, error.hint, output.REFUSED)
    if isinstance(result, int):
        output.fail(
            f"{result:,} live keys are older than its successor: their tokens would be refused",
            "rotate those keys first, or confirm with --yes",
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
