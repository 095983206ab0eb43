"""L2: results of argon2 that the processes of a deployment share through Redis.

    keylatch:{EPOCH}:KEY_ID            ->  32 bytes MAC, then 32 bytes: a preimage, encrypted
    keylatch:{EPOCH}:KEY_ID:previous   ->  the same for the secret before the last rotation

The law of this file: Redis spares a hash and decides nothing. A process reads the permissions and
the state of a key in the store alone.

The store holds a digest of the output of argon2id (see `argon2id`). Redis holds that output, the
*preimage*, encrypted under a key that needs the whole token: HMAC-SHA256(HMAC-SHA256(pepper,
token), hash). So a value alone reveals nothing, and it proves only that this token belongs to this
row of the store, whatever program wrote it. Even an attacker with the store, its pepper and write
access to Redis cannot make a value for another token, because that needs the preimage. Values that
are outdated, of another key, or of a copy of the store are misses for the same reason.

Redis holds no token, and a reader of Redis cannot test guessed tokens without the store. The MAC
(key derived from the pepper, RFC 2104) covers name and value: it distinguishes values of keylatch
from others, which are counted. The epoch identifies the database (see `Store`); the braces around
it are Redis's: all names of a store are in one slot of a Cluster.
"""

import asyncio
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from keylatch.caches.redis_client import CircuitBreaker, name_in_redis
from keylatch.core import argon2id
from keylatch.core.tokens import Token
from keylatch.telemetry.repeated_warning import RepeatedWarning

TTL_SECONDS: Final = 300
_MAC_BYTES: Final = 32
_BYTES: Final = _MAC_BYTES + argon2id.PREIMAGE_BYTES

_MAX_BATCH: Final = 256
"""Names in one MGET at most: Redis runs no other command meanwhile."""

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class _PendingGet:
    """A name whose value a check waits for."""

    name: str
    future: "asyncio.Future[object]"

    def set_result(self, value: object) -> None:
        if not self.future.done():  # the waiter may be cancelled
            self.future.set_result(value)


class SharedCache:
    """L2.

    Args:
        client: an asyncio Redis client; see `redis_client.connect`.
        peppers: the store's peppers: the first one signs, all of them verify.
        breaker: turns every failure into a miss.
    """

    def __init__(self, client: Any, peppers: Sequence[bytes], breaker: CircuitBreaker) -> None:
        self._client = client
        self.set_peppers(peppers)
        self.breaker = breaker
        self._forgeries = RepeatedWarning(
            log,
            "a value in Redis has no valid MAC of this store: do all"
            " processes have the same KEYLATCH_PEPPER_FILE?",
        )
        self.forged = self._forgeries.count
        """Values without a valid MAC."""
        self._is_fetching = False
        self._pending: list[_PendingGet] = []
        self._batch: asyncio.Task[None] | None = None

    def set_peppers(self, peppers: Sequence[bytes]) -> None:
        """Use these peppers from now on, after a rotation."""
        self._peppers = tuple(peppers)
        self._mac_keys = tuple(
            hmac.digest(pepper, b"keylatch: MAC of shared cache values", "sha256")
            for pepper in peppers
        )

    async def proves(self, token: Token, secret_id: str, hashed: str, epoch: str) -> bool:
        """Whether Redis holds a proof that a token matches a stored hash.

        Args:
            token: from the request.
            secret_id: of the secret: the key's id, with `PREVIOUS_SUFFIX` for the previous one.
            hashed: the hash of that secret in the store.
            epoch: of the store.
        """
        name = name_in_redis(epoch, secret_id)
        raw = await self._get(name)
        return isinstance(raw, bytes) and self._verify(name, raw, token, hashed)

    async def put(
        self, token: Token, secret_id: str, hashed: str, preimage: bytes, epoch: str
    ) -> None:
        """Store the preimage of a verified token for other processes; arguments as in `proves`."""
        pad = _pad(self._peppers[0], token, hashed)
        await self._set(name_in_redis(epoch, secret_id), _xor(preimage, pad))

    async def invalidate(self, key_id: str, epoch: str) -> None:
        """Overwrite the value of a key that has changed."""
        await self._set(name_in_redis(epoch, key_id), bytes(argon2id.PREIMAGE_BYTES))

    async def close(self) -> None:
        await self._client.aclose()

    async def _get(self, name: str) -> object:
        """The value of a name in Redis; anything but bytes is a miss.

        The first call sends a GET at once. Calls that arrive before its reply share one MGET after
        it: many cold keys at once take two commands, instead of one connection each.
        """
        if self._is_fetching:
            request = _PendingGet(name, asyncio.get_running_loop().create_future())
            self._pending.append(request)
            return await request.future
        self._is_fetching = True
        try:
            return await self.breaker.attempt("GET", lambda: self._client.get(name))
        finally:
            if self._pending:
                self._batch = asyncio.create_task(self._fetch_pending(), name="keylatch-batch")
            else:
                self._is_fetching = False

    async def _fetch_pending(self) -> None:
        batch: list[_PendingGet] = []
        try:
            while self._pending:
                batch, self._pending = self._pending[:_MAX_BATCH], self._pending[_MAX_BATCH:]
                names = [request.name for request in batch]
                values = await self.breaker.attempt("MGET", partial(self._client.mget, names))
                for request, value in zip(batch, values or [None] * len(batch), strict=True):
                    request.set_result(value)
        finally:
            self._is_fetching = False
            for request in [*batch, *self._pending]:  # after an error or a cancellation
                request.set_result(None)
            self._pending = []

    async def _set(self, name: str, body: bytes) -> None:
        signed = _mac(self._mac_keys[0], name, body) + body
        await self.breaker.attempt("SET", lambda: self._client.set(name, signed, ex=TTL_SECONDS))

    def _verify(self, name: str, raw: bytes, token: Token, hashed: str) -> bool:
        mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        for pepper, mac_key in zip(self._peppers, self._mac_keys, strict=True):
            if len(raw) == _BYTES and hmac.compare_digest(mac, _mac(mac_key, name, body)):
                return argon2id.verify_preimage(hashed, _xor(body, _pad(pepper, token, hashed)))
        self._forgeries.add()
        return False


def _tag(pepper: bytes, token: Token) -> str:
    return hmac.digest(pepper, token.reveal().encode(), "sha256").hex()


def _pad(pepper: bytes, token: Token, hashed: str) -> bytes:
    # Each hash has its own salt, so no two preimages share a pad.
    return hmac.digest(_tag(pepper, token).encode(), hashed.encode(), "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(argon2id.PREIMAGE_BYTES)


def _mac(key: bytes, name: str, body: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + body, "sha256")
