"""Hashes of tokens: argon2id or SHA-256, self-describing, computed on threads, never on a loop.

A minted token holds 160 random bits, so against cracking argon2 adds nothing to SHA-256; it
insures against weak keys that were imported from elsewhere (RFC 9106; OWASP's minimum profile).
The pool is bounded and so is its queue: who comes when it is full is told so at once, because a
queue of 25 ms hashes would otherwise turn a flood into seconds of waiting for everybody.

Tokens that were made elsewhere lack the keyed check, so a stranger who knows the public part of one
can make a process hash. They have a lane of their own, and keylatch's tokens wait for none of them.

Management hashes as well: new tokens, one at a time or a thousand, and better hashes of old ones.
Both have lanes of their own with fewer threads, so a tenant that creates keys without pause takes
no place in the queue from another tenant's check, and less processor time than the checks.
"""

import asyncio
import hmac
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, TypeVar

import argon2
from argon2.exceptions import (
    HashingError,
    InvalidHashError,
    VerificationError,
    VerifyMismatchError,
)

from keylatch import argon2id, foreign
from keylatch.argon2id import Cost
from keylatch.errors import HashingBusy, HashingFailed
from keylatch.telemetry.condition import Condition
from keylatch.telemetry.meter import Count
from keylatch.tokens import Token, is_native

T = TypeVar("T")

Scheme = Literal["argon2id", "sha256"]
_SHA256: Final = "$sha256$"
_CALM_SECONDS: Final = 5.0

POOLS: Final = ("checks", "imported", "management", "upgrades")
"""What threads hash for: checks of keylatch's own tokens and of those that were made elsewhere, new
tokens, and better hashes of old ones."""


__all__ = ["CHEAPEST", "OWASP_MINIMUM", "Cost", "Fit", "Hasher"]

OWASP_MINIMUM: Final = Cost()
CHEAPEST: Final = Cost(memory_kib=8, passes=1)
"""For tests only."""

Fit = bool | bytes
"""Whether a hash is that of a token; where it has a preimage (see `argon2id`), that says yes."""


class Hasher:
    """Makes hashes of one scheme and verifies those of every scheme it knows.

    Args:
        scheme: how new hashes are made.
        cost: of argon2id.
        workers: threads that hash at the same time for checks; one for each processor by default.
        queue: how many more may wait, in each lane, before `HashingBusy` is raised.
        management_workers: threads that hash new tokens; half of `workers` by default.
    """

    def __init__(
        self,
        scheme: Scheme = "argon2id",
        cost: Cost = OWASP_MINIMUM,
        *,
        workers: int | None = None,
        queue: int = 64,
        management_workers: int | None = None,
    ) -> None:
        self._scheme = scheme
        self._cost = cost
        workers = workers or os.cpu_count() or 1
        half = max(1, workers // 2)
        self.condition = Condition(
            "keys that nobody remembers are refused with 503",
            "all keys are hashed again",
            calm_seconds=_CALM_SECONDS,
            passes=True,
        )
        self._lane = _Lane("keylatch-hash", workers, queue, self.condition)
        # Whether others fill these says nothing of the checks of keylatch's own keys.
        self._foreign_lane = _Lane("keylatch-foreign-hash", half, queue)
        self._management_lane = _Lane("keylatch-hash-new", management_workers or half, queue)
        self._upgrade_lane = _Lane("keylatch-hash-upgrade", 1, queue)

    @property
    def _lanes(self) -> tuple["_Lane", ...]:
        return self._lane, self._foreign_lane, self._management_lane, self._upgrade_lane

    @property
    def waiting(self) -> int:
        """Hashes in the queues."""
        return sum(lane.waiting for lane in self._lanes)

    @property
    def under_way(self) -> int:
        """Hashes that are being computed, or wait for it."""
        return sum(lane.under_way for lane in self._lanes)

    def pools(self) -> Mapping[str, int]:
        """The same by what they are for: see `POOLS`."""
        return {name: lane.under_way for name, lane in zip(POOLS, self._lanes, strict=True)}

    async def hash(self, token: Token) -> str:
        """A self-describing hash of a new token.

        Raises:
            HashingBusy: the queue for new tokens is full; that for checks may be empty.
        """
        return await self._hash(token, self._management_lane)

    async def hash_all(self, tokens: Sequence[Token]) -> list[str]:
        """A hash of each new token: as many at a time as there are threads for them, so that who
        comes meanwhile finds places in the queue."""
        if self._scheme == "sha256":
            return [_sha256(token) for token in tokens]
        hashes: list[str] = []
        at_once = self._management_lane.workers
        for start in range(0, len(tokens), at_once):
            some = tokens[start : start + at_once]
            hashes += await asyncio.gather(*(self.hash(token) for token in some))
        return hashes

    async def hash_anew(self, token: Token) -> str:
        """A better hash of a token whose stored one `is_outdated`. Many keys may be used for the
        first time at once: that fills neither the queue of checks nor that of new tokens.

        Raises:
            HashingBusy: the queue is full; nothing is lost, because the old hash stays good.
        """
        return await self._hash(token, self._upgrade_lane)

    async def _hash(self, token: Token, lane: "_Lane") -> str:
        if self._scheme == "sha256":  # half a microsecond: a thread hop would cost more
            return _sha256(token)
        return await lane.run(lambda: self._hash_now(token))

    def _hash_now(self, token: Token) -> str:
        return argon2id.hashed(token.reveal(), self._cost)

    async def verify(self, stored: str, token: Token) -> Fit:
        """Whether the stored hash is that of the token.

        Raises:
            HashingBusy: the queue is full.
            HashingFailed: the stored hash cannot be read, or there is no memory to compute one.
        """
        if stored.startswith(_SHA256):
            return hmac.compare_digest(stored, _sha256(token))
        if foreign.is_quick(stored):
            return _fit(stored, token)
        lane = self._lane if is_native(token) else self._foreign_lane
        return await lane.run(lambda: _fit(stored, token))

    def is_outdated(self, stored: str) -> bool:
        """Whether a hash should be made anew at its next use: weaker scheme or other cost.

        A change from argon2id to sha256 leaves old hashes alone: that would weaken them. Another
        system's are always made anew: its tokens are random and long, and its hashes are slow. So
        is argon2's own output, which has no preimage.
        """
        if foreign.is_foreign(stored):
            return True
        if self._scheme != "argon2id":
            return False
        return stored.startswith(_SHA256) or argon2id.is_outdated(stored, self._cost)

    def close(self) -> None:
        """Let the threads go; those that still hash finish on their own."""
        for lane in self._lanes:
            lane.close()

    def forget(self) -> None:
        """After a fork: the parent's threads are not here, so start over without touching them."""
        for lane in self._lanes:
            lane.forget()
        self.condition.forget()


class _Lane:
    """Threads, and a queue before them that is full at some point."""

    def __init__(
        self, name: str, workers: int, queue: int, condition: Condition | None = None
    ) -> None:
        self._name = name
        self.workers = workers
        self._capacity = workers + queue
        self._condition = condition
        self.forget()

    def forget(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._places = threading.BoundedSemaphore(self._capacity)
        self._begun, self._done = Count(), Count()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None

    @property
    def waiting(self) -> int:
        return max(0, self.under_way - self.workers)

    @property
    def under_way(self) -> int:
        ended = self._done.value  # before what has begun: never fewer than none
        return self._begun.value - ended

    async def run(self, work: Callable[[], T]) -> T:
        places = self._places
        if not places.acquire(blocking=False):
            busy = HashingBusy(
                f"{self._capacity} hashes are under way or waiting",
                "more processors raise the limit, and so does KEYLATCH_HASHER=sha256 for new keys",
            )
            if self._condition is not None:
                self._condition.failed(busy.message, busy.hint)
            raise busy
        if self._condition is not None:
            self._condition.succeeded()
        done = self._done

        def end() -> None:
            done.add()
            places.release()

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix=self._name)
        self._begun.add()
        future = self._pool.submit(work)
        # Released when the thread is done, not when its waiter is: a cancelled request's hash
        # still occupies the pool.
        future.add_done_callback(lambda _: end())
        return await asyncio.wrap_future(future)


def _sha256(token: Token) -> str:
    return _SHA256 + token.digest.hex()


def _fit(stored: str, token: Token) -> Fit:
    scheme = "argon2"
    try:
        if foreign.is_foreign(stored):
            scheme = "another system's scheme"
            return foreign.fits(stored, token)
        if argon2id.is_digested(stored):
            preimage = argon2id.preimage(stored, token.reveal())
            return preimage if argon2id.fits(stored, preimage) else False
        return argon2.PasswordHasher().verify(stored, token.reveal())
    except VerifyMismatchError:
        return False
    except (InvalidHashError, HashingError, VerificationError, ValueError, MemoryError) as error:
        raise HashingFailed(
            f"{scheme} could not verify a stored hash: {type(error).__name__}",
            "the row was damaged or the machine is out of memory; no key was refused for it",
        ) from None
