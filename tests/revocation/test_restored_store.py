"""A restore from a backup assigns sequence numbers again: no check may use what it read before."""

import asyncio
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, update

from keylatch.authentication.authenticator import Authenticator, CacheMiss
from keylatch.authentication.keyset import Keyset, ReadAt
from keylatch.authentication.lookup import Lookup
from keylatch.caches.local_cache import Entry, NegativeEntry
from keylatch.core.decisions import Allow, Decision, Deny, Reason
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.storage.invalidation_log import advance
from keylatch.storage.schema import STORE_SECRETS_ID, invalidations, keys, meta, secrets
from keylatch.storage.secrets import Secrets
from tests.support.engines import MakeEngine

pytestmark = pytest.mark.anyio

Change = Callable[[Connection], object]


class IgnoresHistory(Authenticator):
    """The broken twin: compares sequence numbers from before a restore with those after it."""

    def _accepts(self, cached: Entry | NegativeEntry) -> bool:
        return self._invalidations.accepts(cached.key_id, cached.organization_id, cached.as_of)


class Restored:
    """A store that is restored from a backup, with the state and number of then, and then changed.

    Args:
        engine: has read the store in its state before the restore.
        key: whose state the backup has.
    """

    def __init__(self, engine: Engine, key: Created) -> None:
        self._engine = engine
        self._key_id = key.record.id

    async def restore(self, seq: int, *, active: bool, changed: bool) -> None:
        """Back to `seq`, where the key was active or not; `changed`: by a change since."""

        def work(connection: Connection) -> None:
            connection.execute(invalidations.delete().where(invalidations.c.seq > seq))
            connection.execute(update(meta).values(seq=seq))
            connection.execute(update(keys).values(active=active))
            if changed:
                advance(connection, 0, self._key_id)

        await self._engine.store._database.write(work)


async def backed_up(make_engine: MakeEngine, kind: type[Authenticator]) -> tuple[Engine, Created]:
    engine = make_engine()
    engine.authenticator.__class__ = kind
    key = await (await engine.keyring()).create("acme", "ci")
    return engine, key


async def make_changes(engine: Engine, key: Created, **change: bool) -> int:
    """Several changes after the backup; returns the number of the backup."""
    seq = (await engine.store.invalidations.since(0)).seq
    keyring = await engine.keyring()
    for name in ("a", "b", "c", "d"):
        await keyring.change("acme", key.record.id, name=name, active=True)
    if change:
        await keyring.change("acme", key.record.id, active=change["active"])
    return seq


def entry_of_miss(engine: Engine, key: Created) -> CacheMiss:
    """The miss of a thread whose process was not fresh."""
    miss = CacheMiss(key.token, cached=engine.authenticator._cached(key.token))
    assert miss.cached is not None
    return miss


KINDS = pytest.mark.parametrize("kind", [Authenticator, IgnoresHistory])


@KINDS
async def test_a_miss_from_before_a_restore_allows_no_revoked_key(
    make_engine: MakeEngine, kind: type[Authenticator]
) -> None:
    """The check holds an entry with a higher number than the revocation in the restored store."""
    engine, key = await backed_up(make_engine, kind)
    seq = await make_changes(engine, key)
    assert isinstance(await engine.authenticator.check_token(key.token), Allow)
    miss = entry_of_miss(engine, key)
    await Restored(engine, key).restore(seq, active=False, changed=True)
    decision = await engine.authenticator.check(miss)
    assert isinstance(decision, Allow) == (kind is IgnoresHistory)
    await engine.stop()


@KINDS
async def test_a_miss_from_before_a_restore_refuses_no_valid_key(
    make_engine: MakeEngine, kind: type[Authenticator]
) -> None:
    """The key was disabled after the backup, so it is active again."""
    engine, key = await backed_up(make_engine, kind)
    seq = await make_changes(engine, key, active=False)
    assert await engine.authenticator.check_token(key.token) == Deny(Reason.DISABLED)
    miss = entry_of_miss(engine, key)
    engine._invalidations._revocations.clear()  # else it would disable the key again
    await Restored(engine, key).restore(seq, active=True, changed=False)
    decision = await engine.authenticator.check(miss)
    assert (decision == Deny(Reason.DISABLED)) == (kind is IgnoresHistory)
    await engine.stop()


class RestoredMeanwhile(Lookup):
    """The store is restored after the look-up has read it."""

    begun: asyncio.Event
    restored: asyncio.Event

    async def fetch(self, token: Token) -> tuple[Entry | NegativeEntry, str]:
        found = await super().fetch(token)
        self.begun.set()
        await self.restored.wait()
        return found


@KINDS
async def test_a_look_up_from_before_a_restore_fills_no_cache(
    make_engine: MakeEngine, kind: type[Authenticator]
) -> None:
    """The process notices the restore while the look-up is under way, and clears its cache before
    the look-up adds its entry."""
    engine, key = await backed_up(make_engine, kind)
    seq = await make_changes(engine, key)
    lookup = await engine._started()
    lookup.__class__ = RestoredMeanwhile
    assert isinstance(lookup, RestoredMeanwhile)
    lookup.begun, lookup.restored = asyncio.Event(), asyncio.Event()
    checking: asyncio.Task[Decision] = asyncio.create_task(
        engine.authenticator.check_token(key.token)
    )
    await lookup.begun.wait()
    await Restored(engine, key).restore(seq, active=False, changed=True)
    assert engine._freshness.is_fresh()  # notices it
    lookup.restored.set()
    assert isinstance(await checking, Allow) == (kind is IgnoresHistory)
    await engine.stop()


class KnowsNoHistory(Keyset):
    """The broken twin: compares only sequence numbers."""

    def _is_valid(self, as_of: ReadAt) -> bool:
        return self._invalidations.accepts(STORE_SECRETS_ID, STORE_SECRETS_ID, as_of.seq)


@pytest.mark.parametrize("kind", [Keyset, KnowsNoHistory])
async def test_secrets_from_before_a_restore_call_no_token_forged(
    make_engine: MakeEngine, kind: type[Keyset]
) -> None:
    """The restored store has another MAC key, which was made with a lower number."""
    engine, key = await backed_up(make_engine, Authenticator)
    engine._keyset.__class__ = kind
    seq = await make_changes(engine, key)
    assert engine._freshness.is_fresh()  # knows all changes
    engine._keyset.as_of = engine._keyset.as_of._replace(seq=engine._invalidations.seq)
    await Restored(engine, key).restore(seq, active=True, changed=False)
    mac_key = b"k" * 32

    def replace_key(connection: Connection) -> None:
        connection.execute(update(secrets).where(secrets.c.kind == "mac").values(value=mac_key))
        advance(connection, 0, organization_id=STORE_SECRETS_ID)

    await engine.store._database.write(replace_key)
    token = MacKeys([mac_key]).mint("kl", "live")
    outcome = engine.authenticator.check_token_cached(token)
    assert (outcome == Deny(Reason.FORGED)) == (kind is KnowsNoHistory)
    await engine.stop()


class StopsMeanwhile(Keyset):
    """The engine stops and starts again, on another thread, while this one verifies a MAC."""

    secrets: Secrets

    def verify_mac(self, token: Token) -> bool:
        mac_keys, self.mac_keys = self.mac_keys, None
        verified = super().verify_mac(token)
        assert mac_keys is not None
        self._invalidations.history = object()
        self.clear()
        self.begin(self.secrets, mac_keys, ())
        return verified


class StopsUnnoticed(KnowsNoHistory, StopsMeanwhile):
    """The broken twin: the secrets of the next start count as those that did not make the MAC."""


@pytest.mark.parametrize("kind", [StopsMeanwhile, StopsUnnoticed])
async def test_a_stop_and_a_start_meanwhile_call_no_token_forged(
    make_engine: MakeEngine, kind: type[StopsMeanwhile]
) -> None:
    """A thread that found no secrets to verify a MAC with knows nothing about it."""
    engine, key = await backed_up(make_engine, Authenticator)
    assert engine._freshness.is_fresh()
    await engine._keyset.refresh()
    engine._keyset.__class__ = kind
    assert isinstance(engine._keyset, StopsMeanwhile)
    engine._keyset.secrets = await engine.store.secrets.load()
    outcome = engine.authenticator.check_token_cached(key.token)
    assert (outcome == Deny(Reason.FORGED)) == (kind is StopsUnnoticed)
    await engine.stop()


async def test_a_restore_to_a_known_number_invalidates_all_entries(
    make_engine: MakeEngine,
) -> None:
    """A notice announced a change that the restored store lacks: the number stays as it was."""
    engine, key = await backed_up(make_engine, Authenticator)
    await engine.authenticator.check_token(key.token)
    version, history = engine._invalidations.version, engine._invalidations.history
    batch = await engine.store.invalidations.since(engine._invalidations.seq)
    engine._invalidations.apply(batch, min_seq=batch.seq + 1)
    assert engine._invalidations.history is not history
    assert engine._invalidations.version is not version
    await engine.stop()
