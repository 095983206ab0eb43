"""An attacker who has read the whole store once, and may read and write all of Redis.

No value that can be written there allows a token that the store would refuse. Each attack is tried
on a broken twin as well, which trusts what Redis has of a key: there it works.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from keylatch.authentication.hashing import CHEAPEST, Hasher, VerifyResult
from keylatch.authentication.lookup import Lookup
from keylatch.caches import shared_cache
from keylatch.caches.local_cache import Entry, NegativeEntry, entry_of
from keylatch.caches.redis_client import name_in_redis
from keylatch.core import argon2id
from keylatch.core.decisions import PREVIOUS_SUFFIX, Allow, Deny, KeyRecord, Reason
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.storage.store import Found, Secrets, Store
from keylatch.telemetry.counters import L2
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio

MAC_OF_VALUES = b"keylatch: MAC of shared cache values"


def bearer(token: Token) -> list[bytes]:
    return [b"Bearer " + token.reveal().encode()]


class CountingHasher(Hasher):
    """A hasher that counts what it verifies."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST)
        self.verified = 0

    async def verify(self, stored: str, token: Token) -> VerifyResult:
        self.verified += 1
        return await super().verify(stored, token)


class Trusting(Lookup):
    """A broken twin: what Redis says of a key is true if the pepper has signed it."""

    async def fetch(self, token: Token) -> tuple[Entry | NegativeEntry, str]:
        assert self._shared_cache is not None
        name = f"twin:{token.key_id}"
        raw = await self._shared_cache._get(name)
        if not isinstance(raw, bytes):
            return await super().fetch(token)
        mac, body = raw[:32], raw[32:]
        assert hmac.compare_digest(
            mac, shared_cache._mac(self._shared_cache._mac_keys[0], name, body)
        )
        value = json.loads(body)
        assert value["tag"] == shared_cache._tag(self._shared_cache._peppers[0], token)
        record = KeyRecord(**value["record"])
        return entry_of(token.fingerprint, record, value["as_of"], value["is_previous"]), L2


class Credulous(shared_cache.SharedCache):
    """Another: a preimage need not fit the row, if the pepper has signed it."""

    def _verify(self, name: str, raw: bytes, token: Token, hashed: str) -> bool:
        mac, body = raw[:32], raw[32:]
        return hmac.compare_digest(mac, shared_cache._mac(self._mac_keys[0], name, body))


@dataclass
class Attacker:
    """Knows the store as it was, and writes Redis."""

    redis: Any
    secrets: Secrets
    epoch: str
    rows: dict[str, Found] = field(default_factory=dict)

    @classmethod
    async def who_has_read(cls, store: Store, redis: Any, *keys: Created) -> "Attacker":
        secrets, changes = await store.secrets.load(), await store.invalidations.since(MAX_SEQ)
        attacker = cls(redis, secrets, changes.epoch)
        for key in keys:
            found = await store.keys.find(key.record.id)
            assert isinstance(found, Found)
            attacker.rows[key.record.id] = found
        return attacker

    def minted(self, key_id: str | None = None) -> Token:
        """A token with a valid MAC, for a new id or one that is there."""
        return MacKeys(self.secrets.mac_keys).mint("kl", "live", key_id)

    async def write(self, token: Token, record: KeyRecord, *, is_previous: bool = False) -> None:
        """For the twins what they accept, and for the others the best guess at a preimage."""
        as_of = MAX_SEQ - 1
        pepper = self.secrets.peppers[0]
        value = {"as_of": as_of, "tag": shared_cache._tag(pepper, token), "record": asdict(record)}
        await self._set(f"twin:{record.id}", json.dumps(value | {"is_previous": is_previous}))
        for hashed in self._hashes(record.id):
            for guess in self._guesses(token, hashed):
                await self.sign(token, record.id, hashed, guess)
                await self.sign(token, record.id + PREVIOUS_SUFFIX, hashed, guess)

    async def sign(self, token: Token, secret: str, hashed: str, guess: bytes) -> None:
        """A value as keylatch writes it."""
        body = shared_cache._xor(guess, shared_cache._pad(self.secrets.peppers[0], token, hashed))
        await self._set(name_in_redis(self.epoch, secret), body)

    async def _set(self, name: str, body: str | bytes) -> None:
        body = body.encode() if isinstance(body, str) else body
        mac_key = hmac.digest(self.secrets.peppers[0], MAC_OF_VALUES, "sha256")
        await self.redis.set(name, shared_cache._mac(mac_key, name, body) + body)

    def _hashes(self, key_id: str) -> list[str]:
        found = self.rows.get(key_id)
        if found is None:
            return [argon2id.hash_secret("never stored", CHEAPEST)]
        return [each for each in (found.hash, found.previous_hash) if each is not None]

    def _guesses(self, token: Token, hashed: str) -> list[bytes]:
        """What could be the preimage; the last one stays in Redis, so the best comes last."""
        stored = argon2id._FORMAT.fullmatch(hashed)
        assert stored is not None
        digest = base64.b64decode(stored[5] + "=")
        own = argon2id.compute_preimage(hashed, token.reveal())
        return [bytes(32), hashlib.sha256(digest).digest(), digest, own]


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    if request.param == "sqlite":
        return store_url
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def engine(make_engine: MakeEngine, server: FakeServer) -> AsyncIterator[Engine]:
    """The process that makes and ends keys."""
    engine = make_engine(redis=FakeAsyncRedis(server=server))
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def newcomers(make_engine: MakeEngine, server: FakeServer) -> AsyncIterator[list[Engine]]:
    """A process with an empty cache, and its twin that trusts Redis."""
    engines = [make_engine(redis=FakeAsyncRedis(server=server)) for _ in range(2)]
    for engine in engines:
        await engine.start()
    twin = engines[1]
    assert twin._opened is not None
    twin._opened.lookup.__class__ = Trusting
    yield engines
    for engine in engines:
        await engine.stop()


async def create(engine: Engine, **values: Any) -> Created:
    return await (await engine.keyring()).create("acme", "ci", **values)


async def test_a_key_that_no_store_has_is_unknown(
    engine: Engine, newcomers: list[Engine], server: FakeServer
) -> None:
    """One SET in Redis makes no key."""
    sound, twin = newcomers
    existing = await create(engine)
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), existing)
    token = attacker.minted()
    forged = replace(existing.record, id=token.key_id, partial_token=token.partial)
    await attacker.write(token, forged)
    assert await sound.authenticate(bearer(token)) == Deny(Reason.UNKNOWN)
    assert isinstance(await twin.authenticate(bearer(token)), Allow)


async def test_another_token_of_a_real_key_is_wrong(
    engine: Engine, newcomers: list[Engine], server: FakeServer
) -> None:
    """The id, the row and its hash are known, and every guess at the preimage is wrong; the holder
    of the key is accepted all the while."""
    sound, twin = newcomers
    victim = await create(engine)
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), victim)
    token = attacker.minted(victim.record.id)
    await attacker.write(token, victim.record)
    for guess in attacker._guesses(token, attacker.rows[victim.record.id].hash):
        sound._l1.clear()
        await attacker.sign(token, victim.record.id, attacker.rows[victim.record.id].hash, guess)
        assert await sound.authenticate(bearer(token)) == Deny(Reason.WRONG_SECRET)
    assert isinstance(await twin.authenticate(bearer(token)), Allow)
    assert isinstance(await sound.authenticate(bearer(victim.token)), Allow)


async def test_what_the_pepper_has_signed_must_fit_the_row(
    engine: Engine, newcomers: list[Engine], server: FakeServer
) -> None:
    """The twin that does not compare lets another token of a real key in."""
    sound, twin = newcomers
    victim = await create(engine)
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), victim)
    token = attacker.minted(victim.record.id)
    await attacker.write(token, victim.record)
    await attacker.redis.delete(f"twin:{victim.record.id}")
    assert twin._opened is not None
    assert twin._opened.shared_cache is not None
    twin._opened.shared_cache.__class__ = Credulous
    assert await sound.authenticate(bearer(token)) == Deny(Reason.WRONG_SECRET)
    assert isinstance(await twin.authenticate(bearer(token)), Allow)


End = Callable[[Engine, Created], Any]


async def revoke(engine: Engine, key: Created) -> None:
    await (await engine.keyring()).delete("acme", key.record.id)


async def revoke_all(engine: Engine, key: Created) -> None:
    await (await engine.keyring()).revoke_all("acme")


async def disable(engine: Engine, key: Created) -> None:
    await (await engine.keyring()).change("acme", key.record.id, active=False)


async def disable_organization(engine: Engine, key: Created) -> None:
    await (await engine.keyring()).set_organization_active("acme", False)


async def let_expire(engine: Engine, key: Created) -> None:
    assert await engine.store.keys.change("acme", key.record.id, 0, {"expires_at": 1})


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (revoke, Reason.REVOKED),
        (revoke_all, Reason.REVOKED),
        (disable, Reason.DISABLED),
        (disable_organization, Reason.ORGANIZATION_DISABLED),
        (let_expire, Reason.EXPIRED),
    ],
)
async def test_a_key_that_was_ended_stays_ended(
    engine: Engine,
    newcomers: list[Engine],
    server: FakeServer,
    make_engine: MakeEngine,
    end: End,
    reason: Reason,
) -> None:
    """Its holder puts back what Redis held before, and signs that it lives."""
    sound, twin = newcomers
    key = await create(engine)
    first = make_engine(redis=FakeAsyncRedis(server=server))
    assert isinstance(await first.authenticate(bearer(key.token)), Allow)
    await first.stop()
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), key)
    names = await attacker.redis.keys()
    before = dict(zip(names, await attacker.redis.mget(names), strict=True))
    await end(engine, key)
    await attacker.write(key.token, key.record)
    await attacker.redis.mset(before)
    assert await sound.authenticate(bearer(key.token)) == Deny(reason)
    assert isinstance(await twin.authenticate(bearer(key.token)), Allow)


async def test_rights_and_organisation_come_from_the_store(
    engine: Engine, newcomers: list[Engine], server: FakeServer
) -> None:
    """A key for SENDING stays one, and its owner's, whatever Redis says of it."""
    sound, twin = newcomers
    key = await create(engine, permission="SENDING")
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), key)
    await attacker.write(
        key.token, replace(key.record, permission="FULL", organization_id="rival", name="admin_key")
    )
    found = []
    for process in (sound, twin):
        decision = await process.authenticate(bearer(key.token))
        assert isinstance(decision, Allow)
        principal = decision.principal
        found.append((principal.permission, principal.organization_id, principal.key_name))
    assert found == [("SENDING", "acme", "ci"), ("FULL", "rival", "admin_key")]


async def test_a_secret_that_was_rotated_away_stays_away(
    engine: Engine, newcomers: list[Engine], server: FakeServer, make_engine: MakeEngine
) -> None:
    """Its holder puts every value back under every name, and signs that the grace still runs."""
    sound, twin = newcomers
    key = await create(engine)
    first = make_engine(redis=FakeAsyncRedis(server=server))
    assert isinstance(await first.authenticate(bearer(key.token)), Allow)
    await first.stop()
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), key)
    name = name_in_redis(attacker.epoch, key.record.id)
    proof = await attacker.redis.get(name)
    assert proof is not None
    new = await (await engine.keyring()).rotate("acme", key.record.id, grace=timedelta(seconds=0))
    in_grace = replace(key.record, rotated_at=1, previous_expires_at=MAX_SEQ)
    await attacker.write(key.token, in_grace, is_previous=True)
    hashed = attacker.rows[key.record.id].hash
    preimage = argon2id.compute_preimage(hashed, key.token.reveal())
    await attacker.sign(key.token, key.record.id, hashed, preimage)
    await attacker.sign(key.token, key.record.id + PREVIOUS_SUFFIX, hashed, preimage)
    assert await sound.authenticate(bearer(key.token)) == Deny(Reason.WRONG_SECRET)
    assert isinstance(await twin.authenticate(bearer(key.token)), Allow)
    assert new is not None
    assert isinstance(await sound.authenticate(bearer(new.token)), Allow)


async def test_both_secrets_of_a_rotation_are_saved_and_the_old_one_ends(
    engine: Engine, server: FakeServer, make_engine: MakeEngine
) -> None:
    """While the grace runs no process hashes what another has; afterwards the old secret is wrong,
    whatever Redis holds of it."""
    key = await create(engine)
    keyring = await engine.keyring()
    new = await keyring.rotate("acme", key.record.id, grace=timedelta(seconds=60))
    assert new is not None
    first = make_engine(redis=FakeAsyncRedis(server=server))
    hasher = CountingHasher()
    late = make_engine(redis=FakeAsyncRedis(server=server), hasher=hasher)
    for token in (key.token, new.token):
        assert isinstance(await first.authenticate(bearer(token)), Allow)
    await first.stop()
    for token in (key.token, new.token):
        assert isinstance(await late.authenticate(bearer(token)), Allow)
    assert hasher.verified == 0
    await late.stop()
    ended = await keyring.finish_rotation("acme", key.record.id)
    assert ended is not None
    assert await late.authenticate(bearer(key.token)) == Deny(Reason.WRONG_SECRET)
    assert isinstance(await late.authenticate(bearer(new.token)), Allow)
    await late.stop()


async def test_redis_refuses_no_key(
    engine: Engine, newcomers: list[Engine], server: FakeServer
) -> None:
    """A signed value that fits nothing costs one hash, and is overwritten by what fits."""
    sound, _ = newcomers
    key = await create(engine)
    attacker = await Attacker.who_has_read(engine.store, FakeAsyncRedis(server=server), key)
    hashed = attacker.rows[key.record.id].hash
    await attacker.sign(attacker.minted(key.record.id), key.record.id, hashed, b"x" * 32)
    assert isinstance(await sound.authenticate(bearer(key.token)), Allow)
    await sound.stop()
    assert sound._opened is None
    hasher = CountingHasher()
    after = Engine(sound.settings, hasher=hasher, redis=FakeAsyncRedis(server=server))
    assert isinstance(await after.authenticate(bearer(key.token)), Allow)
    assert hasher.verified == 0
    await after.stop()


async def test_a_preimage_is_in_the_clear_nowhere(
    engine: Engine, server: FakeServer, make_engine: MakeEngine
) -> None:
    """Neither Redis nor the store holds it: an attacker who reads both needs the token, or has to
    run argon2id for each guess."""
    key = await create(engine)
    first = make_engine(redis=FakeAsyncRedis(server=server))
    assert isinstance(await first.authenticate(bearer(key.token)), Allow)
    await first.stop()
    found = await engine.store.keys.find(key.record.id)
    assert isinstance(found, Found)
    preimage = argon2id.compute_preimage(found.hash, key.token.reveal())
    client = FakeAsyncRedis(server=server)
    value = await client.get(name_in_redis(engine._invalidations.epoch, key.record.id))
    assert isinstance(value, bytes)
    assert preimage not in value
    assert argon2id._base64(preimage) not in found.hash
