"""`keylatch keys create`, `list` and `show`."""

import asyncio
import re
import sys
from datetime import timedelta
from typing import Annotated

import typer

from keylatch.core.decisions import FULL
from keylatch.core.validation import LIVE, ORGANIZATION_PATTERN
from keylatch.management.keyring import Created, Keyring
from keylatch.settings import Settings
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import (
    EnvironmentOption,
    ExpiresAtOption,
    ExpiresInOption,
    Given,
    IdleOption,
    JSONOption,
    KeyId,
    MetadataOption,
    OrganizationOption,
    OwnerOption,
    PermissionOption,
    expiry_of,
    metadata_of,
    setting_options,
)
from keylatch_sidecar.cli.session import find, with_engine, with_keyring


@setting_options("store", "redis", "prefix", "hasher")
def create(
    name: Annotated[str, typer.Option(help="Name, which says what the key is for.")],
    organization: OrganizationOption = "default",
    permission: PermissionOption = FULL,
    environment: EnvironmentOption = LIVE,
    expires_in: ExpiresInOption = None,
    expires_at: ExpiresAtOption = None,
    metadata: MetadataOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Create a key and write its token to standard output. The token is not shown again."""

    async def run(keyring: Keyring) -> Created:
        return await keyring.create(
            organization,
            name,
            permission=permission,
            environment=environment,
            expires_at=expiry_of(keyring.now_ms(), expires_in, expires_at),
            metadata=metadata_of(metadata),
        )

    created = with_keyring(Settings.load(**given), run)
    if as_json:
        output.print_json(output.as_json(created.record) | {"token": created.token.reveal()})
        return
    output.print_token(created.token)
    output.stderr.print(
        f"Created {created.record.id} ({created.record.permission}) for {organization}. "
        "The token is not shown again."
    )


@setting_options("store", "redis")
def list_keys(
    organization: OrganizationOption = "default",
    limit: Annotated[int | None, typer.Option(help="Maximum number of keys.", min=1)] = None,
    idle: IdleOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """List the keys of an organisation, newest first."""
    if not re.fullmatch(ORGANIZATION_PATTERN, organization):
        message = "that is not an organisation id"
        output.fail(message, f"ids match {ORGANIZATION_PATTERN}", output.ERROR)
    write = output.print_json_of if as_json else output.print_table_of

    idle_time = None if idle is None else timedelta(days=idle)

    async def run(keyring: Keyring) -> None:
        is_first, remaining = True, limit or sys.maxsize
        async for page in keyring.pages(organization, idle=idle_time):
            records = page.records[:remaining]
            remaining -= len(records)
            is_last = remaining == 0 or page.next_cursor is None
            # In a thread, because writing may block: see `keylatch_sidecar.cli.key_import`.
            await asyncio.to_thread(write, records, is_first, is_last)
            if is_last:
                return
            is_first = False

    with_keyring(Settings.load(**given), run)


@setting_options("store", "redis")
def show(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Show one key."""
    settings = Settings.load(**given)
    record = output.require_found(
        with_engine(settings, lambda engine: find(engine, key_id, organization))
    )
    if as_json:
        output.print_json(output.as_json(record))
    else:
        output.print_record(record)
