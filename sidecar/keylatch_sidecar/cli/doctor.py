"""`keylatch doctor`: prints the findings of `keylatch_sidecar.operations.doctor`.

Exit codes: 0 all is well, or there are only warnings; 2 something fails.
"""

import asyncio
import logging
from dataclasses import asdict
from typing import Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keylatch.errors import ConfigurationError
from keylatch.settings import Settings
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import (
    HasherOption,
    JSONOption,
    LeaseOption,
    RedisOption,
    StoreOption,
)
from keylatch_sidecar.operations.doctor.finding import Finding, Status, failure, worst_status
from keylatch_sidecar.settings import ProxySettings

_STYLES: Final = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red"}


def doctor(
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    hasher: HasherOption = None,
    lease: LeaseOption = None,
) -> None:
    """Examine settings, host, store and Redis, and say what to do. It changes nothing.

    Run it as the user that runs keylatch, with the same settings.
    """
    logging.getLogger("keylatch").setLevel(logging.CRITICAL)  # it is all in the table
    findings: list[Finding] = []
    for load in (
        lambda: Settings.load(store=store, redis=redis, hasher=hasher, lease=lease),
        ProxySettings.load,
    ):
        try:
            load()
        except ConfigurationError as error:
            findings += [failure("settings", wrong, hint) for wrong, hint in error.mistakes]
    if not findings:
        from keylatch_sidecar.operations.doctor.examination import examine

        settings = Settings.load(store=store, redis=redis, hasher=hasher, lease=lease)
        findings = asyncio.run(examine(settings))
    if as_json:
        output.print_json(
            {
                "status": worst_status(findings),
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        _print(findings)
    if worst_status(findings) is Status.FAILURE:
        raise typer.Exit(output.ERROR)


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "check", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        style = _STYLES[finding.status]
        text = f"{finding.message}\nhint: {finding.hint}" if finding.hint else finding.message
        table.add_row(f"[{style}]{finding.status}[/]", finding.check, escape(text))
    Console(highlight=False).print(table)
