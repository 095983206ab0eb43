"""`keylatch audit`: prints audit events, as a table or as JSON lines for other log stores."""

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
from keylatch_sidecar.cli.options import Given, setting_options
from keylatch_sidecar.cli.session import with_keyring

_PAGE = 500
_DEFAULT_LIMIT = 50


@setting_options("store", "redis")
def audit(
    organization: Annotated[
        str | None, typer.Option(help="Only events of this organisation.", show_default="all")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Only events of this key.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of events.", min=1, show_default="50; all with --json-lines"
        ),
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Write one JSON object per line.")
    ] = False,
    *,
    given: Given,
) -> None:
    """Show audit events, newest first."""
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

    with_keyring(Settings.load(**given), run)
    if not json_lines:
        Console(highlight=False, markup=False).print(table)
        output.stderr.print("All events, as JSON lines: keylatch audit --json-lines")


def _write(event: AuditEvent) -> None:
    sys.stdout.write(json.dumps(describe(event).model_dump(by_alias=True)) + "\n")


def _cells(event: AuditEvent) -> list[str]:
    shown = describe(event)
    details = ", ".join(f"{name}: {value}" for name, value in shown.details.items())
    ids = [shown.organization_id or "", shown.key_id or ""]
    return [shown.at, shown.actor, shown.action, *ids, details]
