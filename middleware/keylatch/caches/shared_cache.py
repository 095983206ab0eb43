"""L2: what the processes of a deployment tell each other through Redis. Never the truth.

    keylatch:{epoch}:{key id}            ->  32 bytes MAC, then JSON {as_of, tag, record}
    keylatch:{epoch}:{key id}:previous   ->  the same, while two secrets of a key are good

`tag` is HMAC-SHA256(pepper, token), so Redis never holds a token, and whoever reads it can try
none. The MAC (key derived from the pepper) covers the key id and the whole value, so whoever can
write Redis cannot make an "active" (RFC 2104). Keyed by the public id, so the revoker can
overwrite an entry without knowing the token. `as_of` lets the reader refuse what is stale.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

from keylatch.caches.breaker import Breaker
from keylatch.caches.cache import Absence
from keylatch.model import PREVIOUS, KeyRecord, Reason
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch.tokens import Token

TTL_SECONDS: Final = 300
_MAC_BYTES: Final = 32

_TOGETHER: Final = 256
"""Keys in one question at most: Redis answers nobody else meanwhile."""

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class Told:
    """A key whose secret is right, as it was at that sequence number.

    Args:
        record: the key.
        as_of: the sequence number.
        is_previous: the secret is the one before the last rotation.
    """

    record: KeyRecord
    as_of: int
    is_previous: bool = False


@dataclass(frozen=True, slots=True)
class _Question:
    """A name that somebody wants the value of, and waits."""

    name: str
    answer: "asyncio.Future[object]"

    def settle(self, value: object) -> None:
        if not self.answer.done():  # he may have left
            self.answer.set_result(value)


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
        breaker: Breaker,
    ) -> None:
        self._client = client
        self.learn(peppers)
        self.breaker = self._breaker = breaker
        self._forgeries = RepeatedWarning(
            log, "a value in Redis was not written by keylatch with this store's pepper"
        )
        self.forged = self._forgeries.count
        """Values that were not written with one of the peppers."""
        self._is_asking = False
        self._waiting: list[_Question] = []
        self._batch: asyncio.Task[None] | None = None

    def learn(self, peppers: Sequence[bytes]) -> None:
        """Use these from now on: they were rotated."""
        self._peppers = tuple(peppers)
        self._mac_keys = tuple(
            hmac.digest(pepper, b"keylatch: MAC of shared cache values", "sha256")
            for pepper in peppers
        )

    async def get(self, token: Token, epoch: str) -> Told | Absence | None:
        """What is known of a token: it is this key, it is not that key's, or nothing (None)."""
        told = await self._told(_name(epoch, token.key_id), token)
        if not isinstance(told, KeyRecord):
            return told
        told = await self._told(_name(epoch, told.id + PREVIOUS), token)
        return replace(told, is_previous=True) if isinstance(told, Told) else None

    async def put(
        self, token: Token, record: KeyRecord, as_of: int, epoch: str, is_previous: bool = False
    ) -> None:
        """Tell the others about a key whose secret was proven."""
        tag = _tag(self._peppers[0], token)
        # Whatever else is kept with a key is of no use to a check.
        value = {"as_of": as_of, "tag": tag, "record": asdict(replace(record, metadata=None))}
        if is_previous:
            await self._set(epoch, record.id + PREVIOUS, value)
            # It is looked for only where the key is known to be between two secrets.
            await self._set(epoch, record.id, value | {"tag": ""}, only_new=True)
        else:
            await self._set(epoch, record.id, value)

    async def bury(self, record: KeyRecord, as_of: int, epoch: str) -> None:
        """Overwrite what was told about a key that changed."""
        await self._set(epoch, record.id, {"as_of": as_of, "tag": "", "record": None})

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.aclose()

    async def _told(self, name: str, token: Token) -> Told | Absence | KeyRecord | None:
        raw = await self._value(name)
        return self._opened(name, raw, token) if isinstance(raw, bytes) else None

    async def _value(self, name: str) -> object:
        """What Redis holds under a name; whatever is no bytes is a miss.

        One who comes alone asks at once. Those who come meanwhile are asked for together when that
        is answered: a herd of cold keys is two questions, and not as many connections as there are.
        """
        if self._is_asking:
            question = _Question(name, asyncio.get_running_loop().create_future())
            self._waiting.append(question)
            return await question.answer
        self._is_asking = True
        try:
            return await self._breaker.attempt(lambda: self._client.get(name))
        finally:
            if self._waiting:
                self._batch = asyncio.create_task(self._ask_for_all(), name="keylatch-batch")
            else:
                self._is_asking = False

    async def _ask_for_all(self) -> None:
        asked: list[_Question] = []
        try:
            while self._waiting:
                asked, self._waiting = self._waiting[:_TOGETHER], self._waiting[_TOGETHER:]
                names = [question.name for question in asked]
                values = await self._breaker.attempt(partial(self._client.mget, names))
                for question, value in zip(asked, values or [None] * len(asked), strict=True):
                    question.settle(value)
        finally:
            self._is_asking = False
            for question in [*asked, *self._waiting]:  # whatever went wrong, nobody is left to wait
                question.settle(None)
            self._waiting = []

    async def _set(
        self, epoch: str, secret: str, value: dict[str, Any], only_new: bool = False
    ) -> None:
        name = _name(epoch, secret)
        body = json.dumps(value, separators=(",", ":")).encode()
        sealed = _mac(self._mac_keys[0], name, body) + body
        await self._breaker.attempt(
            lambda: self._client.set(name, sealed, ex=TTL_SECONDS, nx=only_new)
        )

    def _opened(self, name: str, raw: bytes, token: Token) -> Told | Absence | KeyRecord | None:
        """The record alone where the token is another one and the key may have two."""
        mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
        for pepper, mac_key in zip(self._peppers, self._mac_keys, strict=True):
            if hmac.compare_digest(mac, _mac(mac_key, name, body)):
                value = json.loads(body)
                if value["record"] is None:
                    return None
                record, as_of = KeyRecord(**value["record"]), value["as_of"]
                if hmac.compare_digest(value["tag"], _tag(pepper, token)):
                    return Told(record, as_of)
                if record.previous_expires_at is not None:
                    return record
                return Absence(Reason.WRONG_SECRET, record.id, record.organization_id, as_of)
        self._forgeries.add()
        return None


def _name(epoch: str, key_id: str) -> str:
    return f"keylatch:{epoch}:{key_id}"


def _tag(pepper: bytes, token: Token) -> str:
    return hmac.digest(pepper, token.reveal().encode(), "sha256").hex()


def _mac(key: bytes, name: str, body: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + body, "sha256")
