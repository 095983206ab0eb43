"""The operations of management on keys, for every caller."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylatch.core.decisions import Allow, Deny, KeyRecord, Principal, Reason, principal_of
from keylatch.core.timestamps import datetime_of, milliseconds_of
from keylatch.core.validation import NewKey
from keylatch.engine import Engine
from keylatch.errors import InvalidValue, NotPermitted
from keylatch.management.keyring import UNSET, Keyring
from keylatch.revocation.propagation import Propagation, Receipt
from tests.support.clock import Clock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def keyring(engine: Engine) -> Keyring:
    return await engine.keyring()


async def holder(engine: Engine, permission: str, environment: str = "live") -> Principal:
    """A key that calls, with any word for a permission."""
    keyring = await engine.keyring()
    made = await keyring.create("acme", "caller", permission="SENDING", environment=environment)
    change = {"permission": permission}
    changed = await engine.store.keys.change("acme", made.record.id, 0, change)
    assert changed is not None
    return principal_of(changed[0])


async def test_a_created_key_has_the_requested_fields(keyring: Keyring, clock: Clock) -> None:
    """Everything given is kept, and the token's parts say the same as the record."""
    expires_at = int(clock() * 1000) + 1
    created = await keyring.create(
        "acme",
        "  ci  ",
        permission="SENDING",
        environment="test",
        expires_at=datetime_of(expires_at),
    )
    record = created.record
    assert record.name == "ci"
    assert record.expires_at == expires_at
    assert record.created_at == record.updated_at == int(clock() * 1000)
    assert created.token.reveal().startswith(f"kl_test_{record.id.removeprefix('key_')}_")
    assert record.partial_token == created.token.partial
    assert await keyring.get("acme", record.id) == created.key
    assert created.token.reveal() not in repr(created)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": " \t\n"}, "name"),
        ({"name": "\u3000\u2003"}, "name"),
        ({"name": "n" * 101}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "a\x1bb"}, "name"),
        ({"name": "a\u202eb"}, "name"),
        ({"name": "a\u2028b"}, "name"),
        ({"name": "a\ud800b"}, "name"),
        ({"permission": "full"}, "permission"),
        ({"permission": "ADMIN"}, "permission"),
        ({"environment": "Live"}, "environment"),
        ({"environment": "l_ve"}, "environment"),
        ({"organization_id": ""}, "organization"),
        ({"organization_id": "a/b"}, "organization"),
        ({"expires_at": datetime_of(1_800_000_000_000)}, "expiresAt"),
    ],
)
async def test_values_that_no_key_may_have(
    keyring: Keyring, values: dict[str, str], field: str
) -> None:
    """The argument at fault is named, and nothing is made."""
    given = {"organization_id": "acme", "name": "ci", **values}
    with pytest.raises(InvalidValue) as caught:
        await keyring.create(**given)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert await keyring.list("acme") == []


@pytest.mark.parametrize("name", ["n" * 100, "Ключ 🔑", "👩‍💻 laptop", "a'b\"c<d>"])
async def test_names_in_any_script(keyring: Keyring, name: str) -> None:
    """A hundred characters of whatever people write."""
    created = await keyring.create("acme", name)
    found = await keyring.get("acme", created.record.id)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("caller", "permission", "environment"),
    [
        (("SENDING", "live"), "FULL", "live"),
        (("READING", "live"), "SENDING", "live"),
        (("FULL", "test"), "SENDING", "live"),
    ],
)
async def test_a_key_grants_no_more_than_it_has(
    engine: Engine, keyring: Keyring, caller: tuple[str, str], permission: str, environment: str
) -> None:
    """Not another permission, and not a way from test into live."""
    by = await holder(engine, *caller)
    with pytest.raises(NotPermitted):
        await keyring.create("acme", "ci", permission=permission, environment=environment, by=by)
    assert [record.id for record in await keyring.list("acme")] == [by.key_id]


async def test_a_change_cannot_give_more_than_the_caller_has(
    engine: Engine, keyring: Keyring
) -> None:
    """The other way to more rights is closed as well."""
    created = await keyring.create("acme", "ci", permission="SENDING")
    caller = await holder(engine, "SENDING")
    with pytest.raises(NotPermitted):
        await keyring.change("acme", created.record.id, by=caller, permission="FULL")
    assert await keyring.get("acme", created.record.id) == created.key


async def test_deleting_is_final(keyring: Keyring, clock: Clock) -> None:
    """It leaves the list, stays readable, and neither time nor changes bring it back."""
    created = await keyring.create("acme", "ci")
    clock.tick(1)
    changed = await keyring.delete("acme", created.record.id)
    assert changed is not None
    deleted = changed.record
    assert not deleted.active
    assert deleted.updated_at == int(clock() * 1000)
    clock.tick(1)
    for again in (
        await keyring.delete("acme", created.record.id),
        await keyring.change("acme", created.record.id, active=True),
    ):
        assert again is not None
        assert again.record == deleted
    assert await keyring.get("acme", created.record.id) == changed.key
    assert await keyring.list("acme") == []
    assert await keyring.list("acme", deleted=True) == [changed.key]


async def test_a_test_key_does_not_touch_live_keys(keyring: Keyring) -> None:
    """A key that could enable, widen or delete a live key would have more rights than its own: it
    finds none."""
    live = (await keyring.create("acme", "ci", permission="SENDING")).key
    test = (await keyring.create("acme", "ci", environment="test")).record
    caller = principal_of((await keyring.create("acme", "laptop", environment="test")).record)
    for change in ({"active": False}, {"permission": "FULL"}, {"name": "mine"}):
        assert await keyring.change("acme", live.id, by=caller, **change) is None
    assert await keyring.delete("acme", live.id, by=caller) is None
    assert await keyring.get("acme", live.id, by=caller) is None
    assert await keyring.get("acme", live.id) == live
    assert await keyring.delete("acme", test.id, by=caller)
    assert await keyring.delete("rival", live.id, by=caller) is None


async def test_an_organisation_is_disabled_and_enabled(keyring: Keyring, engine: Engine) -> None:
    """All of its keys go with it and come back with it; an unknown one is not made."""
    created = await keyring.create("acme", "ci")
    check = engine.authenticator.check_token
    assert isinstance(await check(created.token), Allow)
    assert await keyring.set_organization_active("acme", False)
    assert await check(created.token) == Deny(Reason.ORGANIZATION_DISABLED)
    assert await keyring.set_organization_active("acme", True)
    assert isinstance(await check(created.token), Allow)
    assert await keyring.set_organization_active("unknown", False) is None


async def test_every_change_is_propagated_after_its_commit(engine: Engine) -> None:
    """Every change is propagated: delete, disable, rename, permission, and the repeated
    delete, whose first propagation may have failed."""
    calls: list[tuple[str, bool]] = []

    class Recording(Propagation):
        def __init__(self) -> None:
            pass

        async def publish(
            self, seq: int, record: KeyRecord | None = None, wait: bool = True
        ) -> Receipt:
            assert record is not None
            stored = await engine.store.keys.get("acme", record.id)
            calls.append((record.name, stored == record))
            return Receipt(seq, 0, 0, 0.0)

    plain = await engine.keyring()
    created = await plain.create("acme", "ci")
    keyring = Keyring(
        engine.store, engine.hasher, plain._mac_keys, engine.settings, engine.now_ms, Recording()
    )
    await keyring.change("acme", created.record.id, name="renamed")
    await keyring.change("acme", created.record.id, active=False)
    await keyring.change("acme", created.record.id, permission="SENDING")
    await keyring.delete("acme", created.record.id)
    await keyring.delete("acme", created.record.id)
    assert calls == [("renamed", True)] * 5


async def test_a_principal_shows_what_apps_need(keyring: Keyring) -> None:
    """The promised attributes, by their promised names."""
    created = await keyring.create("acme", "ci", permission="SENDING")
    principal = principal_of(created.record)
    assert principal.is_authenticated
    assert principal.display_name == principal.key_name == "ci"
    assert principal.identity == principal.key_id == created.record.id
    assert (principal.organization_id, principal.permission) == ("acme", "SENDING")
    assert principal.environment == "live"
    assert principal == principal_of(created.record)
    assert len({principal, principal_of(created.record)}) == 1


async def test_a_token_is_no_name(keyring: Keyring) -> None:
    """Names are stored and shown, so a token that is pasted there is rejected."""
    created = await keyring.create("acme", "ci")
    for name in (created.token.reveal(), f"old {created.token.reveal()}"):
        with pytest.raises(InvalidValue, match="token") as caught:
            await keyring.create("acme", name)
        assert created.token.reveal() not in str(caught.value)


async def test_times_without_a_zone_are_refused(keyring: Keyring) -> None:
    """They do not say which instant they mean; the error says what is missing."""
    naive = datetime(2100, 1, 1)
    created = await keyring.create("acme", "ci")
    for call in (
        keyring.create("acme", "ci", expires_at=naive),
        keyring.change("acme", created.key.id, expires_at=naive),
        keyring.create_many([NewKey("acme", "ci", expires_at=naive)]),
    ):
        with pytest.raises(InvalidValue, match="time zone") as caught:
            await call
        assert caught.value.field == "expiresAt"
    assert await keyring.list("acme") == [created.key]


async def test_a_key_shows_times_in_utc(keyring: Keyring, clock: Clock) -> None:
    """Whatever zone they were given in, to the millisecond."""
    zone = timezone(timedelta(hours=-7))
    expires_at = datetime(2100, 1, 1, 12, 0, 0, 123_999, tzinfo=zone)
    key = (await keyring.create("acme", "ci", expires_at=expires_at)).key
    assert key.expires_at == datetime(2100, 1, 1, 19, 0, 0, 123_000, tzinfo=UTC)
    assert key.created_at == key.updated_at == datetime.fromtimestamp(clock(), UTC)
    assert (key.last_used, key.deleted_at, key.rotated_at, key.previous) == (None,) * 4


@given(st.integers(0, 253_402_300_799_999))
def test_times_are_converted_exactly(milliseconds: int) -> None:
    """Up to the year 9999, to the millisecond, in both directions."""
    assert milliseconds_of(datetime_of(milliseconds), "x") == milliseconds


async def test_what_is_not_given_stays(keyring: Keyring) -> None:
    """`UNSET` keeps a field; None removes an expiry or the metadata."""
    end = datetime(2100, 1, 1, tzinfo=UTC)
    key = (await keyring.create("acme", "ci", expires_at=end, metadata={"team": "a"})).key
    changed = await keyring.change("acme", key.id, name=UNSET, active=False)
    assert changed is not None
    assert (changed.key.name, changed.key.expires_at, changed.key.active) == ("ci", end, False)
    assert dict(changed.key.metadata) == {"team": "a"}
    changed = await keyring.change("acme", key.id, expires_at=None, metadata=None)
    assert changed is not None
    assert (changed.key.expires_at, dict(changed.key.metadata)) == (None, {})
    with pytest.raises(TypeError):
        changed.key.metadata["team"] = "b"  # type: ignore[index]


async def test_only_idle_keys_are_listed(keyring: Keyring, clock: Clock) -> None:
    """`idle` is a duration."""
    old = (await keyring.create("acme", "old")).key
    clock.tick(3_600)
    await keyring.create("acme", "new")
    page = await keyring.page("acme", 9, idle=timedelta(minutes=30))
    assert page.keys == [old]


async def test_a_new_secret_is_shown_on_demand_only(engine: Engine, keyring: Keyring) -> None:
    """`secret` is the whole key. No other way to write a result down shows it, and what is shown
    instead cannot be taken for a key."""
    created = await keyring.create("acme", "ci")
    rotated = await keyring.rotate("acme", created.key.id)
    assert rotated is not None
    for result in (created, rotated):
        assert result.secret == result.token.reveal()
        assert result.secret not in f"{result} {result!r} {result.token} {result.key!r}"
        assert str(result.token) == f"kl_live_****{result.secret[-4:]}"
    assert await engine.authenticate([f"Bearer {created.token}".encode()]) == Deny(Reason.MALFORMED)
    assert isinstance(await engine.authenticate([f"Bearer {rotated.secret}".encode()]), Allow)
