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

from keylatch.errors import KeylatchError
from keylatch.tokens import Token
from keylatch_sidecar.bench.connection import Unusable
from keylatch_sidecar.bench.load import Credential

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


class Maker(Protocol):
    """Makes and revokes keys somewhere."""

    async def make(self, name: str, scheme: Scheme, ends_at: float) -> Key:
        """A FULL key that expires then (seconds since the epoch); the scheme is a wish."""

    async def revoke(self, key_id: str, organization_id: str, *, wait: bool) -> None:
        """Revoke a key; `wait`: until no process accepts it any more."""

    async def named(self, name: str) -> list[tuple[str, str]]:
        """Ids and organisations of the living keys of this name."""


class Supply:
    """The books.

    Args:
        maker: makes the keys.
        most: how many may be made.
        ends_at: when they expire if they are not taken back, in seconds since the epoch. Keys that
            create others must not expire sooner than these.
    """

    def __init__(self, maker: Maker, most: int, ends_at: float) -> None:
        self._maker = maker
        self._most = most
        self._ends_at = ends_at
        self._living: dict[str, Key] = {}
        self._making: set[asyncio.Task[Key]] = set()
        self._has_lost = False
        self.name = f"keylatch bench {secrets.token_hex(4)}"
        self.made = 0

    @property
    def living(self) -> list[str]:
        """Ids of the keys that were not taken back yet."""
        return list(self._living)

    async def make(
        self, count: int, scheme: Scheme = "argon2id", made: Callable[[int], None] = lambda _: None
    ) -> list[Key]:
        """New keys; `made` is told how many after every few.

        Raises:
            Unusable, KeylatchError: not all could be made; those that were will be taken back.
        """
        keys: list[Key] = []
        while len(keys) < count:
            batch = min(_BATCH, count - len(keys))
            keys += await _each([None] * batch, lambda _: self._make(scheme))
            made(batch)
        return keys

    async def _make(self, scheme: Scheme) -> Key:
        if self.made >= self._most:
            raise AssertionError("a plan makes no more keys than it said")
        self.made += 1
        task = asyncio.create_task(self._maker.make(self.name, scheme, self._ends_at))
        self._making.add(task)
        task.add_done_callback(self._enter)
        return await asyncio.shield(task)

    def _enter(self, task: "asyncio.Task[Key]") -> None:
        self._making.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._has_lost = True  # it may have been made, and the answer lost
        else:
            self._living[task.result().id] = task.result()

    async def revoke(self, key: Key) -> None:
        """Revoke a key and wait until it is so everywhere.

        Raises:
            Unusable, KeylatchError: it may not have been revoked; it will be taken back.
        """
        await self._maker.revoke(key.id, key.organization_id, wait=True)
        self._living.pop(key.id, None)

    async def take_back(self) -> None:
        """Revoke all that are left; whatever lives then could not be revoked."""
        if self._making:
            await asyncio.wait(self._making)
        keys = list(self._living.values())
        await _each(keys, self._try_to_revoke)
        if self._has_lost or self._living:
            await self._sweep()

    async def _try_to_revoke(self, key: Key) -> None:
        with contextlib.suppress(*FAILURES):
            await self._maker.revoke(key.id, key.organization_id, wait=False)
            del self._living[key.id]

    async def _sweep(self) -> None:
        """Once more, and those whose making was not answered."""
        with contextlib.suppress(*FAILURES):
            for key_id, organization_id in await self._maker.named(self.name):
                await self._maker.revoke(key_id, organization_id, wait=False)
                self._living.pop(key_id, None)


async def _each(items: Sequence[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """The work on each of them, a few at a time; all have ended when this returns or raises."""
    places = asyncio.Semaphore(_AT_A_TIME)

    async def one(item: T) -> R:
        async with places:
            return await work(item)

    results = await asyncio.gather(*map(one, items), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
