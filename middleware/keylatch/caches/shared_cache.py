"""L2: what the processes of a deployment save each other through Redis: argon2. Never the truth.

    keylatch:{epoch}:{key id}            ->  32 bytes MAC, then 32 bytes: a preimage, encrypted
    keylatch:{epoch}:{key id}:previous   ->  the same for the secret before the last rotation

What a key may do, and whether it lives, a process reads in the store and nowhere else. The store
holds the digest of what argon2id made of the token (see `argon2id`). Redis holds that *preimage*,
encrypted with a key that takes the whole token: HMAC-SHA256(HMAC-SHA256(pepper, token), hash). So a
value says nothing by itself. It proves that this very token is that of this very row, or nothing,
whatever wrote it: even with the store, its pepper and all of Redis at hand no value can be made
for another token, because that takes the preimage. Values that are old, of another key, or of a
copy of the store are therefore misses as well.

Redis holds no token, and who reads it can try none without the store. The MAC (key derived from the
pepper, RFC 2104) covers the name and the value: it tells noise and forgeries, which are counted,
from what keylatch wrote. `epoch` says which database it is (see `Store`).
"""

import asyncio
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from keylatch.caches.redis_client import CircuitBreaker
from keylatch.core import argon2id
from keylatch.core.tokens import Token
from keylatch.telemetry.repeated_warning import RepeatedWarning

TTL_SECONDS: Final = 300
_MAC_BYTES: Final = 32
_BYTES: Final = _MAC_BYTES + argon2id.PREIMAGE_BYTES

_MAX_BATCH: Final = 256
"""Keys in one question at most: Redis answers nobody else meanwhile."""

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class _PendingGet:
    """A name that somebody wants the value of, and waits."""

    name: str
    future: "asyncio.Future[object]"

    def set_result(self, value: object) -> None:
        if not self.future.done():  # he may have left
            self.future.set_result(value)


class SharedCache:
    """L2.

    Args:
        client: an asyncio Redis client; see `breaker.connect`.
        peppers: the store's peppers: the first one writes, all of them read.
        breaker: every failure is a miss.
    """

    def __init__(
        self,
        client: Any,
        peppers: Sequence[bytes],
        breaker: CircuitBreaker,
    ) -> None:
        self._client = client
        self.set_peppers(peppers)
        self.breaker = self._breaker = breaker
        self._forgeries = RepeatedWarning(
            log,
            "a value in Redis has no valid MAC of this store: do all"
            " processes have the same KEYLATCH_PEPPER_FILE?",
        )
        self.forged = self._forgeries.count
        """Values that were not written with one of the peppers."""
        self._is_fetching = False
        self._pending: list[_PendingGet] = []
        self._batch: asyncio.Task[None] | None = None

    def set_peppers(self, peppers: Sequence[bytes]) -> None:
        """Use these from now on: they were rotated."""
        self._peppers = tuple(peppers)
        self._mac_keys = tuple(
            hmac.digest(pepper, b"keylatch: MAC of shared cache values", "sha256")
            for pepper in peppers
        )

    async def proves(self, token: Token, secret_id: str, hashed: str, epoch: str) -> bool:
        """Whether Redis holds what proves that a token is that of a stored hash.

        Args:
            token: as it was presented.
            secret_id: of which secret: the key's id, or that with `PREVIOUS_SUFFIX` behind it.
            hashed: what the store holds of that secret.
            epoch: of the store.
        """
        name = _name(epoch, secret_id)
        raw = await self._get(name)
        return isinstance(raw, bytes) and self._verify(name, raw, token, hashed)

    async def put(
        self, token: Token, secret_id: str, hashed: str, preimage: bytes, epoch: str
    ) -> None:
        """Save the others argon2 for a token that was verified; the arguments as in `proves`."""
        pad = _pad(self._peppers[0], token, hashed)
        await self._set(_name(epoch, secret_id), _xor(preimage, pad))

    async def invalidate(self, key_id: str, epoch: str) -> None:
        """Overwrite what is of no use any more, because the key changed."""
        await self._set(_name(epoch, key_id), bytes(argon2id.PREIMAGE_BYTES))

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.aclose()

    async def _get(self, name: str) -> object:
        """What Redis holds under a name; whatever is no bytes is a miss.

        One who comes alone asks at once. Those who come meanwhile are asked for together when that
        is answered: a herd of cold keys is two questions, and not as many connections as there are.
        """
        if self._is_fetching:
            request = _PendingGet(name, asyncio.get_running_loop().create_future())
            self._pending.append(request)
            return await request.future
        self._is_fetching = True
        try:
            return await self._breaker.attempt(lambda: self._client.get(name))
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
                values = await self._breaker.attempt(partial(self._client.mget, names))
                for question, value in zip(batch, values or [None] * len(batch), strict=True):
                    question.set_result(value)
        finally:
            self._is_fetching = False
            for question in [*batch, *self._pending]:  # whatever went wrong, nobody is left to wait
                question.set_result(None)
            self._pending = []

    async def _set(self, name: str, body: bytes) -> None:
        signed = _mac(self._mac_keys[0], name, body) + body
        await self._breaker.attempt(lambda: self._client.set(name, signed, ex=TTL_SECONDS))

    def _verify(self, name: str, raw: bytes, token: Token, hashed: str) -> bool:
        mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        for pepper, mac_key in zip(self._peppers, self._mac_keys, strict=True):
            if len(raw) == _BYTES and hmac.compare_digest(mac, _mac(mac_key, name, body)):
                return argon2id.verify_preimage(hashed, _xor(body, _pad(pepper, token, hashed)))
        self._forgeries.add()
        return False


def _name(epoch: str, secret_id: str) -> str:
    return f"keylatch:{epoch}:{secret_id}"


def _tag(pepper: bytes, token: Token) -> str:
    return hmac.digest(pepper, token.reveal().encode(), "sha256").hex()


def _pad(pepper: bytes, token: Token, hashed: str) -> bytes:
    # For one token and one hash, which has a salt of its own: no two preimages share it.
    return hmac.digest(_tag(pepper, token).encode(), hashed.encode(), "sha256")


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(argon2id.PREIMAGE_BYTES)


def _mac(key: bytes, name: str, body: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + body, "sha256")
