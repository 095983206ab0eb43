"""Create and revoke the keys of a run: at the sidecar, with a FULL key, or directly in the store.

In the store the hash function can be chosen, so that the first check of a key costs argon2 or not,
and entries in Redis can be prepared, as any keylatch process would write them.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.caches.redis_client import CircuitBreaker, connect
from keylatch.caches.shared_cache import SharedCache
from keylatch.core.decisions import KeyRecord
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.management.keyring import Keyring
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.revocation.propagation import Propagation, Receipt
from keylatch.settings import Settings
from keylatch.storage.store import Found, Secrets, Store
from keylatch_bench.connection import Address, Connection
from keylatch_bench.errors import BenchError
from keylatch_bench.load_generator import Credential
from keylatch_bench.temporary_keys import Key, Scheme

ORGANIZATION: Final = "keylatch-bench"
_KEYS: Final = "/v1/api-keys"
_CONNECTIONS: Final = 4
_POLLS: Final = 20
_POLL_SECONDS: Final = 0.05
_ALREADY_GONE: Final = 404
_ASYNC: Final = "Prefer: respond-async\r\n"

REFUSALS: Final = {
    400: ("the key is malformed", "KEYLATCH_BENCH_KEY must be one line with nothing else"),
    401: ("the sidecar refuses the key", "is KEYLATCH_BENCH_KEY a key of this sidecar, unexpired?"),
    403: (
        "the key may not manage keys",
        "use a FULL key that does not expire before the end of the run: keylatch keys create",
    ),
    404: ("keys are not managed there", "name the listener of --admin-port, or add --store"),
    405: ("keys are not managed there", "name the listener of --admin-port, or add --store"),
    429: ("the organisation's limits are reached", "wait, or --store, or KEYLATCH_MAX_CHANGES=0"),
    503: ("the sidecar's store does not answer", "look at its log and at /readyz"),
}


class SidecarKeyFactory:
    """See `keylatch_bench.temporary_keys.KeyFactory`; the sidecar decides the hash function.

    Args:
        address: of its management API.
        admin_key: one of its FULL keys.
    """

    def __init__(self, address: Address, admin_key: Credential) -> None:
        self._address = address
        self._admin_key = admin_key
        self._idle: asyncio.Queue[Connection] = asyncio.Queue()
        for _ in range(_CONNECTIONS):
            self._idle.put_nowait(Connection(address))

    async def create(self, name: str, scheme: Scheme, expires_at: float) -> Key:
        content = {"name": name, "expiresAt": datetime.fromtimestamp(expires_at, UTC).isoformat()}
        created = await self._call("POST", _KEYS, content)
        return Key(created["id"], created["organizationId"], Token(created["token"]))

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        await self._call("DELETE", f"{_KEYS}/{key_id}", fields="" if wait else _ASYNC)

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        keys = await self._call("GET", _KEYS)
        return [(key["id"], key["organizationId"]) for key in keys if key["name"] == name]

    async def check(self) -> None:
        """Return if the sidecar manages keys at this address with this key.

        Raises:
            BenchError: it does not.
        """
        await self._call("GET", _KEYS)

    def close(self) -> None:
        """Close the connections."""
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
            raise BenchError(f"{self._address}: {wrong}", hint)
        try:
            return json.loads(body)
        except ValueError:
            wrong = f"{self._address}: the response is not JSON"
            raise BenchError(wrong, "is that a keylatch sidecar?") from None


class StoreKeyFactory:
    """See `keylatch_bench.temporary_keys.KeyFactory`.

    With leases an engine is a member, and every DELETE waits for its acknowledgement. So it is
    stopped when it is not needed, unless it is the engine under test itself.

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
        hasher, mac_keys = self._hashers[scheme], MacKeys(secrets.mac_keys)
        keyring = Keyring(engine.store, hasher, mac_keys, self._settings, _now_ms, _NoPropagation())
        created = await keyring.create(
            ORGANIZATION, name, expires_at=datetime.fromtimestamp(expires_at, UTC)
        )
        return Key(created.record.id, ORGANIZATION, created.token)

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        engine, _ = await self._open()
        await (await engine.keyring()).delete(organization_id, key_id, wait=wait)

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        engine, _ = await self._open()
        keys = await (await engine.keyring()).list(ORGANIZATION)
        return [(key.id, key.organization_id) for key in keys if key.name == name]

    async def write_to_redis(self, keys: Sequence[Key]) -> bool:
        """Write entries to Redis as a process does after verifying a key; False: Redis failed."""
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
        """Whether Redis gets an entry for a key that was just checked. The process that checked it
        writes the entry after its response."""
        engine, secrets = await self._open()
        async with self._shared_cache(secrets) as shared:
            epoch = (await engine.store.invalidations.since(MAX_SEQ)).epoch
            for _ in range(_POLLS):
                if await _is_in_redis(engine.store, shared, key, epoch):
                    return True
                await asyncio.sleep(_POLL_SECONDS)
        return False

    async def stop_engine(self) -> None:
        """Stop the engine, so that it is not a member while the target is measured."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()

    async def close(self) -> None:
        """Stop the engine and the hashers."""
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
        """A started engine, and the store's secrets.

        Raises:
            KeylatchError: the store cannot be opened.
        """
        async with self._opening:
            engine = self._engine_under_test or self._engine or Engine(self._settings)
            secrets = await engine.store.open(int(time.time() * 1000))
            await engine.start()
            if self._engine_under_test is None:
                self._engine = engine
            return engine, secrets


async def _is_in_redis(store: Store, shared: SharedCache, key: Key, epoch: str) -> bool:
    """Whether Redis has an entry that verifies this key."""
    found = await store.keys.find(key.id)
    if not isinstance(found, Found):
        return False
    return await shared.proves(key.token, key.id, found.hash, epoch)


class _NoPropagation(Propagation):
    """For a keyring that only creates keys: a new key invalidates nothing."""

    def __init__(self) -> None:
        pass

    async def publish(
        self, seq: int, record: KeyRecord | None = None, wait: bool = True
    ) -> Receipt:
        raise AssertionError("this keyring only creates keys")


def _now_ms() -> int:
    return int(time.time() * 1000)
