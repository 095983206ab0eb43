"""`keylatch migrate`: brings the store's tables up to date, as any start does, and says how.

Exit codes: 0 they are, 1 they are not (with --check), 2 they are too new, or no store.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from keylatch.errors import KeylatchError
from keylatch.settings import Settings
from keylatch.storage.migrations import Step, steps_after
from keylatch.storage.schema import VERSION
from keylatch.storage.store import Store, file_of
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import StoreOption

_UPGRADE_SECONDS: Final = 3_600.0


def migrate(
    check: Annotated[
        bool, typer.Option("--check", help="Only say what would be done; exit 1 if anything.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Bring the store's tables up to date, and say who waits meanwhile.

    Every start does it too; on a large store, do it first, and give it the time it takes.
    """
    settings = Settings.load(store=store)
    try:
        version = asyncio.run(_version(settings.store))
        steps = steps_after(version)
        _print_plan(version, steps)
        if check and steps:
            raise typer.Exit(output.REFUSED)
        if steps:
            took = asyncio.run(_upgrade(settings.store))
            output.stderr.print(f"The store is at version {VERSION} now ({took:.1f} s).")
    except KeylatchError as error:
        output.fail(error.message, error.hint, output.ERROR)


def _print_plan(version: str | None, steps: Sequence[Step]) -> None:
    if not steps:
        output.stderr.print(f"The store is at version {version}: there is nothing to do.")
        return
    at = f"at version {version}" if version else "empty"
    output.stderr.print(f"The store is {at}, this keylatch needs {VERSION}:")
    for step in steps:
        blocks = f" Blocks {step.blocks}." if version else ""
        output.stderr.print(f"  {step.version}  {step.purpose}{blocks}", soft_wrap=True)


async def _version(url: str) -> str | None:
    file = file_of(url)
    if file is not None and not file.exists():
        return None  # and looking shall not make it
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
