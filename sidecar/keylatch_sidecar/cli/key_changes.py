"""`keylatch keys rotate`, `change`, `disable`, `revoke`: what may happen to a key that was made."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError

from keylatch.core.decisions import KeyRecord
from keylatch.core.keys import Scalar
from keylatch.core.timestamps import datetime_of
from keylatch.core.validation import expiry_after, grace_of, parse_duration_ms
from keylatch.errors import InvalidValue
from keylatch.management.keyring import Changed, Keyring, Rotated
from keylatch.settings import Settings
from keylatch_sidecar.api.receipts import revocation
from keylatch_sidecar.api.schemas import Instant
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import (
    HasherOption,
    JSONOption,
    KeyId,
    OrganizationArgument,
    OwnerOption,
    PrefixOption,
    RedisOption,
    StoreOption,
)
from keylatch_sidecar.cli.session import with_key, with_keyring

ExpiresInOption = Annotated[
    str | None, typer.Option("--expires-in", help="Such as 90d, 12h or 30m from now.")
]
ExpiresAtOption = Annotated[
    str | None, typer.Option("--expires-at", help="ISO 8601, such as 2030-01-01T00:00:00Z.")
]
MetadataOption = Annotated[
    list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Repeatable.")
]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Why; kept with the key.")]
_INSTANT: TypeAdapter[datetime] = TypeAdapter(Instant)


def register(keys: typer.Typer, organizations: typer.Typer) -> None:
    """Add the commands to those that manage keys and organisations."""
    keys.command()(rotate)
    keys.command("cancel-rotation")(cancel_rotation)
    keys.command("finish-rotation")(finish_rotation)
    keys.command()(change)
    keys.command()(disable)
    keys.command()(enable)
    keys.command()(revoke)
    organizations.command("revoke")(revoke_all)


def expiry_of(now_ms: int, expires_in: str | None, expires_at: str | None) -> datetime | None:
    """When a key shall expire.

    Raises:
        InvalidValue: both are given, or one is none.
    """
    if expires_in is not None:
        if expires_at is not None:
            raise InvalidValue("--expires-in", "is instead of --expires-at, not beside it")
        return datetime_of(expiry_after(expires_in, now_ms, "--expires-in"))
    if expires_at is None:
        return None
    try:
        return _INSTANT.validate_python(expires_at)
    except ValidationError:
        raise InvalidValue("--expires-at", "must be an ISO 8601 time with an offset") from None


def metadata_of(pairs: Sequence[str] | None) -> dict[str, Scalar] | None:
    """What `--metadata NAME=VALUE` says; None where it is not given.

    Raises:
        InvalidValue: there is no `=`.
    """
    if not pairs:
        return None
    if not all("=" in pair for pair in pairs):
        raise InvalidValue("--metadata", "must be NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def rotate(
    key_id: KeyId,
    grace: Annotated[
        str, typer.Option(help="How long the present secret stays good: 24h, 30m, 0.")
    ] = "1d",
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    prefix: PrefixOption = None,
    hasher: HasherOption = None,
) -> None:
    """Give a key a new secret; its token alone goes to standard output, this once."""
    settings = Settings.load(store=store, redis=redis, prefix=prefix, hasher=hasher)

    async def run(keyring: Keyring, record: KeyRecord) -> Rotated | None:
        seconds = 0 if grace == "0" else parse_duration_ms(grace, "--grace") // 1000
        return await keyring.rotate(record.organization_id, record.id, grace=grace_of(seconds))

    rotated = with_key(settings, key_id, organization, run)
    key = output.as_json(rotated.record)
    if as_json:
        output.print_json(key | {"token": rotated.secret})
        return
    output.print_token(rotated.token)
    ends = key["previous"]["expiresAt"] if key["previous"] else None
    until = "has ended" if ends is None else f"is good until {ends}"
    output.stderr.print(
        f"Rotated {rotated.record.id}: {output.propagation(rotated.receipt)}. "
        f"The token above is shown this once; the one before {until}."
    )


def cancel_rotation(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """While two secrets of a key are good: keep the old one, and end the new one."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.cancel_rotation(record.organization_id, record.id)

    settings = Settings.load(store=store, redis=redis)
    _print_change(
        "Went back to the old secret of", with_key(settings, key_id, organization, run), as_json
    )


def finish_rotation(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """While two secrets of a key are good: end the old one now."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.finish_rotation(record.organization_id, record.id)

    settings = Settings.load(store=store, redis=redis)
    _print_change("Ended the old secret of", with_key(settings, key_id, organization, run), as_json)


def change(
    key_id: KeyId,
    name: Annotated[str | None, typer.Option(help="What the key is for.")] = None,
    permission: Annotated[str | None, typer.Option(help="FULL or SENDING.")] = None,
    expires_in: ExpiresInOption = None,
    expires_at: ExpiresAtOption = None,
    never_expires: Annotated[bool, typer.Option("--never-expires", help="No end.")] = False,
    metadata: MetadataOption = None,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Change a key's name, permission, expiry or metadata."""

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

    settings = Settings.load(store=store, redis=redis)
    _print_live_change("Changed", with_key(settings, key_id, organization, run), as_json)


def disable(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Refuse a key, at once, until it is enabled again."""
    _set_active(key_id, False, organization, as_json, Settings.load(store=store, redis=redis))


def enable(
    key_id: KeyId,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Let a key in again."""
    _set_active(key_id, True, organization, as_json, Settings.load(store=store, redis=redis))


def revoke(
    key_id: KeyId,
    reason: ReasonOption = None,
    descendants: Annotated[
        bool, typer.Option("--descendants", help="Revoke what the key created as well.")
    ] = False,
    organization: OwnerOption = None,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Revoke a key, at once and finally."""

    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.delete(
            record.organization_id, record.id, reason=reason, descendants=descendants
        )

    changed = with_key(Settings.load(store=store, redis=redis), key_id, organization, run)
    _print_change("Revoked", changed, as_json)
    if descendants and not as_json:
        output.stderr.print(f"{changed.count:,} keys were revoked in this change.")


def revoke_all(
    organization: OrganizationArgument,
    yes: Annotated[bool, typer.Option("--yes", help="There is no way back.")] = False,
    reason: ReasonOption = None,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Revoke every key of an organisation, at once and finally."""
    if not yes:
        message = "this ends every key of the organisation, for good"
        output.fail(message, "--yes; or keylatch organizations disable", output.ERROR)
    done = with_keyring(
        Settings.load(store=store, redis=redis),
        lambda keyring: keyring.revoke_all(organization, reason=reason),
    )
    output.stderr.print(f"Revoked {done.count:,} keys: {output.propagation(done.receipt)}.")


def _set_active(
    key_id: str, active: bool, organization: str | None, as_json: bool, settings: Settings
) -> None:
    async def run(keyring: Keyring, record: KeyRecord) -> Changed | None:
        return await keyring.change(record.organization_id, record.id, active=active)

    word = "Enabled" if active else "Disabled"
    _print_live_change(word, with_key(settings, key_id, organization, run), as_json)


def _print_live_change(word: str, changed: Changed, as_json: bool) -> None:
    if changed.record.deleted_at is not None:
        output.fail("the key was deleted; that is final", "make another one", output.REFUSED)
    _print_change(word, changed, as_json)


def _print_change(word: str, changed: Changed, as_json: bool) -> None:
    receipt = revocation(changed.receipt).model_dump(by_alias=True)
    if as_json:
        output.print_json(output.as_json(changed.record) | {"revocation": receipt})
        return
    output.print_record(changed.record)
    output.stderr.print(f"{word} {changed.record.id}: {output.propagation(changed.receipt)}.")
