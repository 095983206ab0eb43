"""`keylatch migrate`: migrates the store's tables to the version that this keylatch needs.

Exit codes: 0 up to date, 1 not up to date (with --check), 2 newer than this keylatch or no store.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from keylatch.errors import OperationalError
from keylatch.settings import Settings
from keylatch.storage.migrations import Step, steps_after
from keylatch.storage.schema import VERSION
from keylatch.storage.store import Store, file_of
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, setting_options

_UPGRADE_SECONDS: Final = 3_600.0


@setting_options("store")
def migrate(
    check: Annotated[
        bool,
        typer.Option("--check", help="List pending migrations and exit with 1 if there are any."),
    ] = False,
    *,
    given: Given,
) -> None:
    """Migrate the store's tables, after listing what each migration blocks meanwhile.

    A starting process migrates too; migrate a large store beforehand, because it takes time.
    """
    settings = Settings.load(**given)
    try:
        version = asyncio.run(_version(settings.store_direct or settings.store))
        steps = steps_after(version)
        _print_plan(version, steps)
        if check and steps:
            raise typer.Exit(output.REFUSED)
        if steps:
            took = asyncio.run(_upgrade(settings.store_direct or settings.store))
            output.stderr.print(f"The store is at version {VERSION} now ({took:.1f} s).")
    except OperationalError as error:
        output.fail(error.message, error.hint, output.ERROR)


def _print_plan(version: str | None, steps: Sequence[Step]) -> None:
    if not steps:
        output.stderr.print(f"The store is at version {version}: there is nothing to do.")
        return
    at = f"at version {version}" if version else "empty"
    output.stderr.print(f"The store is {at}, this keylatch needs {VERSION}:")
    for step in steps:
        waiting = f" Blocked meanwhile: {step.blocks}." if version else ""
        output.stderr.print(f"  {step.version}  {step.purpose}{waiting}", soft_wrap=True)


async def _version(url: str) -> str | None:
    file = file_of(url)
    if file is not None and not file.exists():
        return None  # opening it would create it
    store = Store(url)
    try:
        return await store.version()
    finally:
        await store.close()


async def _upgrade(url: str) -> float:
    store = Store(url, upgrade_seconds=_UPGRADE_SECONDS)
    started_at = time.monotonic()
    try:
        await store.open(int(time.time() * 1000))
        return time.monotonic() - started_at
    finally:
        await store.close()
