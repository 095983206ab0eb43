"""`keylatch doctor`: prints the findings of `keylatch_sidecar.operations.doctor`.

Exit codes: 0 no failures (there may be warnings), 2 at least one failure.
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
from keylatch_sidecar.cli.options import Given, JSONOption, setting_options
from keylatch_sidecar.operations.doctor.finding import Finding, Status, failure, worst_status
from keylatch_sidecar.settings import ProxySettings

_STYLES: Final = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red"}


@setting_options("store", "redis", "hasher", "lease")
def doctor(as_json: JSONOption = False, *, given: Given) -> None:
    """Examine settings, host, store and Redis, and suggest what to do. Nothing is changed.

    Run it as the user that runs keylatch, with the same settings.
    """
    logging.getLogger("keylatch").setLevel(logging.CRITICAL)  # the table has it all
    findings: list[Finding] = []
    for load in (lambda: Settings.load(**given), ProxySettings.load):
        try:
            load()
        except ConfigurationError as error:
            findings += [failure("settings", wrong, hint) for wrong, hint in error.mistakes]
    if not findings:
        from keylatch_sidecar.operations.doctor.examination import examine

        findings = asyncio.run(examine(Settings.load(**given)))
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
