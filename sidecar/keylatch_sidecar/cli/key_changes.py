"""`keylatch keys rotate`, `change`, `disable`, `revoke`, …: changes to an existing key."""

from typing import Annotated, Any

import typer

from keylatch.core.decisions import KeyRecord
from keylatch.core.validation import grace_of, parse_duration_ms
from keylatch.errors import InvalidValue
from keylatch.management.keyring import Changed, Keyring, Rotated
from keylatch.settings import Settings
from keylatch_sidecar.api.receipts import revocation
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import (
    ExpiresAtOption,
    ExpiresInOption,
    Given,
    JSONOption,
    KeyId,
    MetadataOption,
    OwnerOption,
    ReasonOption,
    expiry_of,
    metadata_of,
    setting_options,
)
from keylatch_sidecar.cli.session import with_key


@setting_options("store", "redis", "prefix", "hasher")
def rotate(
    key_id: KeyId,
    grace: Annotated[
        str,
        typer.Option(help="Time for which the present secret stays valid, such as 24h, 30m or 0."),
    ] = "1d",
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Give a key a new secret and write its token to standard output. It is not shown again."""

    async def run(keyring: Keyring, record: KeyRecord) -> Rotated | None:
        seconds = 0 if grace == "0" else parse_duration_ms(grace, "--grace") // 1000
        return await keyring.rotate(record.organization_id, record.id, grace=grace_of(seconds))

    rotated = with_key(Settings.load(**given), key_id, organization, run)
    key = output.as_json(rotated.record)
    if as_json:
        output.print_json(key | {"token": rotated.secret})
        return
    output.print_token(rotated.token)
    ends = key["previous"]["expiresAt"] if key["previous"] else None
    previous = "is no longer valid" if ends is None else f"is valid until {ends}"
    output.stderr.print(
        f"Rotated {rotated.record.id}: {output.propagation(rotated.receipt)}. "
        f"The token is not shown again; the previous one {previous}."
    )


@setting_options("store", "redis")
def cancel_rotation(
    key_id: KeyId, organization: OwnerOption = None, as_json: JSONOption = False, *, given: Given
) -> None:
    """Within the grace of a rotation: keep the previous secret and invalidate the new one."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.cancel_rotation(record.organization_id, record.id)

    changed = with_key(Settings.load(**given), key_id, organization, run)
    _print_change("Cancelled the rotation of", changed, as_json)


@setting_options("store", "redis")
def finish_rotation(
    key_id: KeyId, organization: OwnerOption = None, as_json: JSONOption = False, *, given: Given
) -> None:
    """Within the grace of a rotation: invalidate the previous secret now."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.finish_rotation(record.organization_id, record.id)

    changed = with_key(Settings.load(**given), key_id, organization, run)
    _print_change("Finished the rotation of", changed, as_json)


@setting_options("store", "redis")
def change(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="New name.")] = None,
    permission: Annotated[str | None, typer.Option(help="FULL or SENDING.")] = None,
    expires_in: ExpiresInOption = None,
    expires_at: ExpiresAtOption = None,
    never_expires: Annotated[bool, typer.Option("--never-expires", help="Remove expiry.")] = False,
    metadata: MetadataOption = None,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Change the name, permission, expiry or metadata of a key."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        values: dict[str, Any] = {"name": name, "permission": permission}
        values["metadata"] = metadata_of(metadata)
        values["expires_at"] = expiry_of(keyring.now_ms(), expires_in, expires_at)
        values = {field: value for field, value in values.items() if value is not None}
        if never_expires:
            values["expires_at"] = None
        if not values:
            raise InvalidValue("change", "give at least one of the options")
        return await keyring.change(record.organization_id, record.id, **values)

    changed = with_key(Settings.load(**given), key_id, organization, run)
    _print_live_change("Changed", changed, as_json)


@setting_options("store", "redis")
def disable(
    key_id: KeyId, organization: OwnerOption = None, as_json: JSONOption = False, *, given: Given
) -> None:
    """Refuse a key, with immediate effect, until it is enabled again."""
    _set_active(key_id, False, organization, as_json, Settings.load(**given))


@setting_options("store", "redis")
def enable(
    key_id: KeyId, organization: OwnerOption = None, as_json: JSONOption = False, *, given: Given
) -> None:
    """Accept a disabled key again."""
    _set_active(key_id, True, organization, as_json, Settings.load(**given))


@setting_options("store", "redis")
def revoke(
    key_id: KeyId,
    reason: ReasonOption = None,
    descendants: Annotated[
        bool, typer.Option("--descendants", help="Also revoke keys that were created with it.")
    ] = False,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Revoke a key, with immediate effect. This cannot be undone."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.delete(
            record.organization_id, record.id, reason=reason, descendants=descendants
        )

    changed = with_key(Settings.load(**given), key_id, organization, run)
    _print_change("Revoked", changed, as_json)
    if descendants and not as_json:
        output.stderr.print(f"Revoked {changed.count:,} keys in total.")


def _set_active(
    key_id: str, active: bool, organization: str | None, as_json: bool, settings: Settings
) -> None:
    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.change(record.organization_id, record.id, active=active)

    word = "Enabled" if active else "Disabled"
    _print_live_change(word, with_key(settings, key_id, organization, run), as_json)


def _print_live_change(word: str, changed: Changed, as_json: bool) -> None:
    if changed.record.deleted_at is not None:
        output.fail("the key is revoked", "create a new key", output.REFUSED)
    _print_change(word, changed, as_json)


def _print_change(word: str, changed: Changed, as_json: bool) -> None:
    receipt = revocation(changed.receipt).model_dump(by_alias=True)
    if as_json:
        output.print_json(output.as_json(changed.record) | {"revocation": receipt})
        return
    output.print_record(changed.record)
    output.stderr.print(f"{word} {changed.record.id}: {output.propagation(changed.receipt)}.")
