"""Where the keys of a run are made: at the sidecar, with a FULL key, or in the store itself.

In the store the hash can be chosen, so that a first sight costs argon2 or does not; and what
Redis knows can be prepared from outside, with what every process of keylatch would write there.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.caches.redis_client import CircuitBreaker, connect
from keylatch.caches.shared_cache import SharedCache
from keylatch.core.decisions import KeyRecord
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.management.keyring import Keyring
from keylatch.revocation.invalidations import MAX_SEQ, Receipt
from keylatch.settings import Settings
from keylatch.storage.store import Found, Secrets, Store
from keylatch_bench.connection import Address, Connection, Unusable
from keylatch_bench.load import Credential
from keylatch_bench.supply import Key, Scheme
from keylatch_sidecar.api.schemas import iso

ORGANIZATION: Final = "keylatch-bench"
_KEYS: Final = "/v1/api-keys"
_CONNECTIONS: Final = 4
_POLLS: Final = 20
_POLL_SECONDS: Final = 0.05
_ALREADY_GONE: Final = 404
_ASYNC: Final = "Prefer: respond-async\r\n"

REFUSALS: Final = {
    400: ("the key is not of the form of a key", "one line, nothing else, in KEYLATCH_BENCH_KEY"),
    401: ("the sidecar refuses the key", "is KEYLATCH_BENCH_KEY a key of this sidecar, unexpired?"),
    403: (
        "the key may not manage keys",
        "a FULL key is needed that does not expire before the bench ends: keylatch keys create",
    ),
    404: ("keys are not managed there", "name the listener of --admin-port, or add --store"),
    405: ("keys are not managed there", "name the listener of --admin-port, or add --store"),
    429: ("the organisation's limits are reached", "wait, or --store, or KEYLATCH_MAX_CHANGES=0"),
    503: ("the sidecar's store does not answer", "look at its log and at /readyz"),
}


class SidecarKeyFactory:
    """See `keylatch_bench.supply.KeyFactory`; hashes are what the sidecar makes.

    Args:
        address: where it manages keys.
        admin_key: a FULL key of it.
    """

    def __init__(self, address: Address, admin_key: Credential) -> None:
        self._address = address
        self._admin_key = admin_key
        self._idle: asyncio.Queue[Connection] = asyncio.Queue()
        for _ in range(_CONNECTIONS):
            self._idle.put_nowait(Connection(address))

    async def create(self, name: str, scheme: Scheme, expires_at: float) -> Key:
        content = {"name": name, "expiresAt": iso(int(expires_at * 1000))}
        made = await self._call("POST", _KEYS, content)
        return Key(made["id"], made["organizationId"], Token(made["token"]))

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        await self._call("DELETE", f"{_KEYS}/{key_id}", fields="" if wait else _ASYNC)

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        keys = await self._call("GET", _KEYS)
        return [(key["id"], key["organizationId"]) for key in keys if key["name"] == name]

    async def check(self) -> None:
        """Return if keys can be managed here.

        Raises:
            Unusable: why not.
        """
        await self._call("GET", _KEYS)

    def close(self) -> None:
        """Hang up."""
        while not self._idle.empty():
            self._idle.get_nowait().cancel()

    async def _call(self, method: str, path: str, content: Any = None, fields: str = "") -> Any:
        connection = await self._idle.get()
        try:
            status, body = await connection.call(
                method, path, self._admin_key.value, content, fields
            )
        finally:
            self._idle.put_nowait(connection)
        if method == "DELETE" and status == _ALREADY_GONE and path != _KEYS:
            return None
        if status not in (200, 202):
            unknown = (f"it answers {method} {_KEYS} with {status}", "is that a keylatch sidecar?")
            wrong, hint = REFUSALS.get(status, unknown)
            raise Unusable(f"{self._address}: {wrong}", hint)
        try:
            return json.loads(body)
        except ValueError:
            wrong = f"{self._address}: the answer is no JSON"
            raise Unusable(wrong, "is that a keylatch sidecar?") from None


class StoreKeyFactory:
    """See `keylatch_bench.supply.KeyFactory`.

    Where processes hold leases, an engine is a member whom every DELETE waits for. So it lives only
    while it is needed, unless it is the engine under test itself.

    Args:
        settings: store and Redis.
        engine: the engine under test, if it is in this process.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self._settings = settings
        self._engine_under_test = engine
        self._engine: Engine | None = None
        self._opening = asyncio.Lock()
        self._hashers: dict[Scheme, Hasher] = {
            "argon2id": Hasher("argon2id"),
            "cheap": Hasher("argon2id", CHEAPEST),
            "sha256": Hasher("sha256"),
        }

    async def create(self, name: str, scheme: Scheme, expires_at: float) -> Key:
        engine, secrets = await self._open()
        hasher, check_keys = self._hashers[scheme], MacKeys(secrets.mac_keys)
        keyring = Keyring(
            engine.store, hasher, check_keys, self._settings, _now_ms, _no_propagation
        )
        created = await keyring.create(ORGANIZATION, name, expires_at=int(expires_at * 1000))
        return Key(created.record.id, ORGANIZATION, created.token)

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        engine, _ = await self._open()
        await (await engine.keyring()).delete(organization_id, key_id, wait=wait)

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        engine, _ = await self._open()
        records = await (await engine.keyring()).list(ORGANIZATION)
        return [(record.id, record.organization_id) for record in records if record.name == name]

    async def write_to_redis(self, keys: Sequence[Key]) -> bool:
        """Put keys into Redis as a process does that has just verified them; False: it cannot."""
        engine, secrets = await self._open()
        async with self._shared_cache(secrets) as shared:
            epoch = (await engine.store.invalidations.since(MAX_SEQ)).epoch
            for key in keys:
                found = await engine.store.keys.find(key.id)
                if isinstance(found, Found):
                    fit = await self._hashers["cheap"].verify(found.hash, key.token)
                    if isinstance(fit, bytes):
                        await shared.put(key.token, key.id, found.hash, fit, epoch)
            return not keys or await _is_in_redis(engine.store, shared, keys[-1], epoch)

    async def is_in_redis(self, key: Key) -> bool:
        """Whether a key that was just checked comes to be in Redis; somebody puts it there after
        his answer."""
        engine, secrets = await self._open()
        async with self._shared_cache(secrets) as shared:
            epoch = (await engine.store.invalidations.since(MAX_SEQ)).epoch
            for _ in range(_POLLS):
                if await _is_in_redis(engine.store, shared, key, epoch):
                    return True
                await asyncio.sleep(_POLL_SECONDS)
        return False

    async def stop_engine(self) -> None:
        """Be no member of anything while others are measured."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()

    async def close(self) -> None:
        """Let everything go."""
        await self.stop_engine()
        for hasher in self._hashers.values():
            hasher.close()

    @contextlib.asynccontextmanager
    async def _shared_cache(self, secrets: Secrets) -> AsyncIterator[SharedCache]:
        shared = SharedCache(connect(self._settings.redis), secrets.peppers, CircuitBreaker())
        try:
            yield shared
        finally:
            await shared.close()

    async def _open(self) -> tuple[Engine, Secrets]:
        """An engine that works, and the store's secrets.

        Raises:
            KeylatchError: why there is none.
        """
        async with self._opening:
            engine = self._engine_under_test or self._engine or Engine(self._settings)
            secrets = await engine.store.open(int(time.time() * 1000))
            await engine.start()
            if self._engine_under_test is None:
                self._engine = engine
            return engine, secrets


async def _is_in_redis(store: Store, shared: SharedCache, key: Key, epoch: str) -> bool:
    """Whether Redis saves the hash of a key."""
    found = await store.keys.find(key.id)
    if not isinstance(found, Found):
        return False
    return await shared.proves(key.token, key.id, found.hash, epoch)


async def _no_propagation(record: KeyRecord | None, seq: int, wait: bool) -> Receipt:
    raise AssertionError("this keyring only makes keys")


def _now_ms() -> int:
    return int(time.time() * 1000)
