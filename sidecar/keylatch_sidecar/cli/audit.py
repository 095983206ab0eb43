"""`keylatch audit`: who did what to which key, as a table or as JSON lines to keep elsewhere."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from keylatch.core.decisions import AuditEvent
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings
from keylatch_sidecar.api.audit import describe
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import RedisOption, StoreOption
from keylatch_sidecar.cli.session import with_keyring

_PAGE = 500
_DEFAULT_LIMIT = 50


def audit(
    organization: Annotated[
        str | None, typer.Option(help="Only this one's lines.", show_default="everybody's")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Only what was done to this key.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="At most so many, the newest.", min=1, show_default="50; all as JSON lines"
        ),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="One JSON object a line, on standard output.")
    ] = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Show the audit log, the newest first."""
    total = limit or (sys.maxsize if json_lines else _DEFAULT_LIMIT)
    table = Table(box=None)
    for heading in ("at", "actor", "action", "organisation", "key", "details"):
        table.add_column(heading, overflow="fold")

    async def run(keyring: Keyring) -> None:
        remaining, before = total, None
        while remaining:
            events = await keyring.events(
                organization, min(remaining, _PAGE), key_id=key, before=before
            )
            for event in events:
                _write(event) if json_lines else table.add_row(*_cells(event))
            if len(events) < min(remaining, _PAGE):
                return
            remaining, before = remaining - len(events), events[-1].id

    with_keyring(Settings.load(store=store, redis=redis), run)
    if not json_lines:
        Console(highlight=False, markup=False).print(table)
        output.stderr.print("JSON lines of all of it: keylatch audit --json-lines")


def _write(event: AuditEvent) -> None:
    sys.stdout.write(json.dumps(describe(event).model_dump(by_alias=True)) + "\n")


def _cells(event: AuditEvent) -> list[str]:
    line = describe(event)
    details = ", ".join(f"{name}: {value}" for name, value in line.details.items())
    return [
        line.at,
        line.actor,
        line.action,
        line.organization_id or "",
        line.key_id or "",
        details,
    ]
