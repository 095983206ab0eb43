"""The keys of a run: made for it, named after it, and every one of them taken back.

A key is in the books before anybody can use it, and its making cannot be interrupted, so Ctrl-C in
the middle leaves none behind; then whatever still bears the name of this run is looked for and
revoked as well. Keys expire by themselves if even that fails.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeVar

from keylatch.core.tokens import Token
from keylatch.errors import KeylatchError
from keylatch_bench.connection import Unusable
from keylatch_bench.load_generator import Credential

T = TypeVar("T")
R = TypeVar("R")

Scheme = Literal["argon2id", "cheap", "sha256"]
"""How a key is hashed; `cheap` is argon2id at hardly any price, for keys that Redis shall know."""

_AT_A_TIME: Final = 4
_BATCH: Final = 20
FAILURES: Final = (KeylatchError, Unusable, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of this run."""

    id: str
    organization_id: str
    token: Token = field(repr=False)

    @property
    def credential(self) -> Credential:
        """What its holder sends."""
        return Credential(b"Bearer " + self.token.reveal().encode(), 200)


class KeyFactory(Protocol):
    """Makes and revokes keys somewhere."""

    async def create(self, name: str, scheme: Scheme, expires_at: float) -> Key:
        """A FULL key that expires then (seconds since the epoch); the scheme is a wish."""

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        """Revoke a key; `wait`: until no process accepts it any more."""

    async def find_by_name(self, name: str) -> list[tuple[str, str]]:
        """Ids and organisations of the living keys of this name."""


class TemporaryKeys:
    """The books.

    Args:
        factory: creates the keys.
        max_keys: how many may be made.
        expires_at: when they expire if not revoked before, in seconds since the epoch. Keys that
            create others must not expire sooner than these.
    """

    def __init__(self, factory: KeyFactory, max_keys: int, expires_at: float) -> None:
        self._factory = factory
        self._most = max_keys
        self._expires_at = expires_at
        self._active: dict[str, Key] = {}
        self._creating: set[asyncio.Task[Key]] = set()
        self._has_unknown_outcome = False
        self.name = f"keylatch bench {secrets.token_hex(4)}"
        self.created = 0

    @property
    def active(self) -> list[str]:
        """Ids of the keys that were not taken back yet."""
        return list(self._active)

    async def create(
        self,
        count: int,
        scheme: Scheme = "argon2id",
        on_created: Callable[[int], None] = lambda _: None,
    ) -> list[Key]:
        """New keys; `on_created` is called with how many after every few.

        Raises:
            Unusable, KeylatchError: not all could be made; those that were will be taken back.
        """
        keys: list[Key] = []
        while len(keys) < count:
            batch = min(_BATCH, count - len(keys))
            keys += await _each([None] * batch, lambda _: self._create(scheme))
            on_created(batch)
        return keys

    async def _create(self, scheme: Scheme) -> Key:
        if self.created >= self._most:
            raise AssertionError("a plan makes no more keys than it said")
        self.created += 1
        task = asyncio.create_task(self._factory.create(self.name, scheme, self._expires_at))
        self._creating.add(task)
        task.add_done_callback(self._on_created)
        return await asyncio.shield(task)

    def _on_created(self, task: "asyncio.Task[Key]") -> None:
        self._creating.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._has_unknown_outcome = True  # it may have been made, and the answer lost
        else:
            self._active[task.result().id] = task.result()

    async def revoke(self, key: Key) -> None:
        """Revoke a key and wait until it is so everywhere.

        Raises:
            Unusable, KeylatchError: it may not have been revoked; it will be taken back.
        """
        await self._factory.revoke(key.id, key.organization_id, wait=True)
        self._active.pop(key.id, None)

    async def revoke_all(self) -> None:
        """Revoke all that are left; whatever lives then could not be revoked."""
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
        """Once more, and those whose making was not answered."""
        with contextlib.suppress(*FAILURES):
            for key_id, organization_id in await self._factory.find_by_name(self.name):
                await self._factory.revoke(key_id, organization_id, wait=False)
                self._active.pop(key_id, None)


async def _each(items: Sequence[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """The work on each of them, a few at a time; all have ended when this returns or raises."""
    semaphore = asyncio.Semaphore(_AT_A_TIME)

    async def one(item: T) -> R:
        async with semaphore:
            return await work(item)

    results = await asyncio.gather(*map(one, items), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
