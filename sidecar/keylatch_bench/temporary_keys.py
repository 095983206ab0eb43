"""The keys of a run: created for it, named after it, and all revoked at its end.

A key is registered before it is used, and its creation cannot be cancelled, so an interrupted run
leaves no key behind. If the result of a creation is unknown, keys with the name of this run are
looked up and revoked. If that fails too, the keys expire.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeVar

from keylatch.core.tokens import Token
from keylatch.errors import KeylatchError
from keylatch_bench.errors import BenchError
from keylatch_bench.load_generator import Credential

T = TypeVar("T")
R = TypeVar("R")

Scheme = Literal["argon2id", "cheap", "sha256"]
"""The hash function of a key; `cheap` is argon2id with minimal cost, for keys to put into Redis."""

_AT_A_TIME: Final = 4
_BATCH: Final = 20
FAILURES: Final = (KeylatchError, BenchError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of this run."""

    id: str
    organization_id: str
    token: Token = field(repr=False)

    @property
    def credential(self) -> Credential:
        """What a client with this key sends."""
        return Credential(b"Bearer " + self.token.reveal().encode(), 200)


class KeyFactory(Protocol):
    """Creates and revokes keys."""

    async def create(self, name: str, scheme: Scheme, expires_at: float) -> Key:
        """Create a FULL key that expires at `expires_at` (seconds since the epoch). The scheme is a
        preference."""

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        """Revoke a key; `wait`: return when no process accepts it any more."""

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        """Ids and organisations of the live keys with this name."""


class TemporaryKeys:
    """Creates keys and revokes them all.

    Args:
        factory: creates and revokes them.
        max_keys: maximum number of keys.
        expires_at: when they expire, in seconds since the epoch. A key cannot create keys that
            expire after itself.
    """

    def __init__(self, factory: KeyFactory, max_keys: int, expires_at: float) -> None:
        self._factory = factory
        self._max_keys = max_keys
        self._expires_at = expires_at
        self._active: dict[str, Key] = {}
        self._creating: set[asyncio.Task[Key]] = set()
        self._has_unknown_outcome = False
        self.name = f"keylatch bench {secrets.token_hex(4)}"
        self.created = 0

    @property
    def active(self) -> list[str]:
        """Ids of the keys that are not revoked yet."""
        return list(self._active)

    async def create(
        self,
        count: int,
        scheme: Scheme = "argon2id",
        on_created: Callable[[int], None] = lambda _: None,
    ) -> list[Key]:
        """Create keys; `on_created` gets the number of keys in each batch.

        Raises:
            BenchError, KeylatchError: not all were created; `revoke_all` revokes the others.
        """
        keys: list[Key] = []
        while len(keys) < count:
            batch = min(_BATCH, count - len(keys))
            keys += await _each([None] * batch, lambda _: self._create(scheme))
            on_created(batch)
        return keys

    async def _create(self, scheme: Scheme) -> Key:
        if self.created >= self._max_keys:
            raise AssertionError("a run creates no more keys than its plan says")
        self.created += 1
        task = asyncio.create_task(self._factory.create(self.name, scheme, self._expires_at))
        self._creating.add(task)
        task.add_done_callback(self._on_created)
        return await asyncio.shield(task)

    def _on_created(self, task: "asyncio.Task[Key]") -> None:
        self._creating.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._has_unknown_outcome = True  # it may exist, if the response was lost
        else:
            self._active[task.result().id] = task.result()

    async def revoke(self, key: Key) -> None:
        """Revoke a key and wait until no process accepts it.

        Raises:
            BenchError, KeylatchError: it may still be active; `revoke_all` tries again.
        """
        await self._factory.revoke(key.id, key.organization_id, wait=True)
        self._active.pop(key.id, None)

    async def revoke_all(self) -> None:
        """Revoke all remaining keys; `active` has those for which that failed."""
        if self._creating:
            await asyncio.wait(self._creating)
        keys = list(self._active.values())
        await _each(keys, self._try_to_revoke)
        if self._has_unknown_outcome or self._active:
            await self._revoke_by_name()

    async def _try_to_revoke(self, key: Key) -> None:
        with contextlib.suppress(*FAILURES):
            await self._factory.revoke(key.id, key.organization_id, wait=False)
            del self._active[key.id]

    async def _revoke_by_name(self) -> None:
        """Try again, including keys whose creation had no response."""
        with contextlib.suppress(*FAILURES):
            for key_id, organization_id in await self._factory.find_by_name(self.name):
                await self._factory.revoke(key_id, organization_id, wait=False)
                self._active.pop(key_id, None)


async def _each(items: Sequence[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """Do the work for each item, a few concurrently; all have ended when this returns or raises."""
    semaphore = asyncio.Semaphore(_AT_A_TIME)

    async def one(item: T) -> R:
        async with semaphore:
            return await work(item)

    results = await asyncio.gather(*map(one, items), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
