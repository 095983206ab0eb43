"""`keylatch keys usage`: how often a key was allowed and refused on each day."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch.storage.usage import KeyUsage
from keylatch_sidecar.api.usage import DEFAULT_DAYS, KeyUsageReport, describe
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import (
    DaysOption,
    Given,
    JSONOption,
    KeyId,
    OwnerOption,
    setting_options,
)
from keylatch_sidecar.cli.session import find, with_engine


@setting_options("store", "redis")
def usage(
    key_id: KeyId,
    days: DaysOption = DEFAULT_DAYS,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Show how often a key was allowed and, by reason, refused on each of the last days."""

    async def fetch(engine: Engine) -> KeyUsage | None:
        found = await find(engine, key_id, organization)
        if found is None:
            return None
        return await (await engine.keyring()).usage(found.organization_id, key_id, days)

    settings = Settings.load(**given)
    report = describe(output.require_found(with_engine(settings, fetch)))
    if as_json:
        output.print_json(report.model_dump(by_alias=True))
    else:
        _print(report)


def _print(report: KeyUsageReport) -> None:
    table = Table(box=None)
    for heading in ("day", "allowed", "refused"):
        table.add_column(heading, justify="right" if heading == "allowed" else "left")
    for each in report.days:
        table.add_row(each.day, f"{each.allowed:,}", _refusals(each.refused))
    table.add_row("total", f"{report.total.allowed:,}", _refusals(report.total.refused))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(f"last used: {report.last_used or 'never'}")
    if report.client is not None:
        client = report.client
        source = f"{client.agent or 'an unknown agent'} in {client.address or 'an unknown network'}"
        console.print(f"last client: {source}, {client.seen_at}")


def _refusals(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(refused.items()))
