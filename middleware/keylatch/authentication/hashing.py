"""Hashes of tokens: argon2id or SHA-256, self-describing, computed on threads, never on the event
loop.

A minted token holds 160 random bits, so against cracking argon2 adds nothing to SHA-256; it
protects weak imported keys (RFC 9106; OWASP's minimum profile). The pool and its queue are bounded:
a request that finds the queue full is refused at once, because a queue of 25 ms hashes would turn a
flood into seconds of waiting for every request.

Imported tokens have no MAC, so a client that knows the public part of one can make a process hash.
They have a pool of their own, and no token of keylatch waits for them.

Management hashes as well: new tokens, one at a time or a thousand, and better hashes of old ones.
Both have pools of their own with fewer threads, so an organisation that creates keys without pause
takes no place in the queue of checks, and less processor time than the checks.
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

from keylatch.core import argon2id, imported_tokens
from keylatch.core.argon2id import Cost
from keylatch.core.tokens import Token, is_native
from keylatch.errors import HashingBusy, HashingFailed
from keylatch.telemetry.counters import Counter
from keylatch.telemetry.health import Health

T = TypeVar("T")

Scheme = Literal["argon2id", "sha256"]
_SHA256: Final = "$sha256$"
_RECOVERY_SECONDS: Final = 5.0

POOLS: Final = ("checks", "imported", "management", "upgrades")
"""What is hashed: keylatch's own tokens and imported ones in checks, new tokens, and better hashes
of old ones."""

__all__ = ["CHEAPEST", "OWASP_MINIMUM", "Cost", "Hasher", "VerifyResult"]

OWASP_MINIMUM: Final = Cost()
CHEAPEST: Final = Cost(memory_kib=8, passes=1)
"""For tests only."""

VerifyResult = bool | bytes
"""Whether a hash is that of a token; True is given as the preimage where the hash has one (see
`argon2id`)."""


class Hasher:
    """Makes hashes of one scheme and verifies those of every scheme it knows.

    Args:
        scheme: of new hashes.
        cost: of argon2id.
        workers: threads that hash for checks; one for each processor by default.
        queue: how many hashes may wait in each pool before `HashingBusy` is raised.
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
        self.health = Health(
            "hash queue full: uncached keys get 503",
            "hash queue has room: uncached keys are checked again",
            recovery_seconds=_RECOVERY_SECONDS,
            recovers_by_time=True,
        )
        self._check_pool = _HashPool("keylatch-hash", workers, queue, self.health)
        # Full queues of these pools do not concern the checks of keylatch's own keys.
        self._imported_pool = _HashPool("keylatch-hash-imported", half, queue)
        self._management_pool = _HashPool("keylatch-hash-new", management_workers or half, queue)
        self._upgrade_pool = _HashPool("keylatch-hash-upgrade", 1, queue)

    @property
    def _pools(self) -> tuple["_HashPool", ...]:
        return self._check_pool, self._imported_pool, self._management_pool, self._upgrade_pool

    @property
    def waiting(self) -> int:
        """Hashes that wait for a thread."""
        return sum(pool.waiting for pool in self._pools)

    def in_progress(self) -> Mapping[str, int]:
        """Hashes that are computed or queued, by pool: see `POOLS`."""
        return {name: pool.in_progress for name, pool in zip(POOLS, self._pools, strict=True)}

    async def hash(self, token: Token) -> str:
        """A self-describing hash of a new token.

        Raises:
            HashingBusy: the queue for new tokens is full; the queue of checks may be empty.
        """
        return await self._hash(token, self._management_pool)

    async def hash_all(self, tokens: Sequence[Token]) -> list[str]:
        """A hash of each new token: as many at a time as the pool has threads, so that the queue
        keeps room for other new tokens."""
        if self._scheme == "sha256":
            return [_sha256(token) for token in tokens]
        hashes: list[str] = []
        batch_size = self._management_pool.workers
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            hashes += await asyncio.gather(*(self.hash(token) for token in batch))
        return hashes

    async def rehash(self, token: Token) -> str:
        """A better hash of a token whose stored one `needs_rehash`. Many keys may be used for the
        first time at once: that fills neither the queue of checks nor that of new tokens.

        Raises:
            HashingBusy: the queue is full; nothing is lost, because the old hash is kept.
        """
        return await self._hash(token, self._upgrade_pool)

    async def _hash(self, token: Token, pool: "_HashPool") -> str:
        if self._scheme == "sha256":  # half a microsecond: a thread hop would cost more
            return _sha256(token)
        return await pool.run(lambda: self._hash_sync(token))

    def _hash_sync(self, token: Token) -> str:
        return argon2id.hash_secret(token.reveal(), self._cost)

    async def verify(self, stored: str, token: Token) -> VerifyResult:
        """Whether the stored hash is that of the token.

        Raises:
            HashingBusy: the queue is full.
            HashingFailed: the stored hash cannot be read, or there is no memory to compute one.
        """
        if stored.startswith(_SHA256):
            return hmac.compare_digest(stored, _sha256(token))
        if imported_tokens.is_fast(stored):
            return _verify(stored, token)
        pool = self._check_pool if is_native(token) else self._imported_pool
        return await pool.run(lambda: _verify(stored, token))

    def needs_rehash(self, stored: str) -> bool:
        """Whether a hash should be replaced at its next use: weaker scheme or other cost.

        A change from argon2id to sha256 keeps old hashes: replacing would weaken them. Hashes of
        other systems are always replaced: their tokens are random and long, and their hashes slow.
        So is argon2's own output, which has no preimage.
        """
        if imported_tokens.is_imported_hash(stored):
            return True
        if self._scheme != "argon2id":
            return False
        return stored.startswith(_SHA256) or argon2id.needs_rehash(stored, self._cost)

    def close(self) -> None:
        """End the threads; those that still hash finish by themselves."""
        for pool in self._pools:
            pool.close()

    def after_fork_in_child(self) -> None:
        """After a fork: the parent's threads do not exist here; start over without them."""
        for pool in self._pools:
            pool.reset()
        self.health.clear()


class _HashPool:
    """A bulkhead: threads and a bounded queue."""

    def __init__(self, name: str, workers: int, queue: int, health: Health | None = None) -> None:
        self._name = name
        self.workers = workers
        self._capacity = workers + queue
        self._health = health
        self.reset()

    def reset(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._slots = threading.BoundedSemaphore(self._capacity)
        self._submitted, self._completed = Counter(), Counter()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None

    @property
    def waiting(self) -> int:
        return max(0, self.in_progress - self.workers)

    @property
    def in_progress(self) -> int:
        completed = self._completed.value  # read first, so the difference is never negative
        return self._submitted.value - completed

    async def run(self, work: Callable[[], T]) -> T:
        slots = self._slots
        if not slots.acquire(blocking=False):
            busy = HashingBusy(
                f"{self._capacity} hashes are running or queued",
                "more processors raise the limit, and so does KEYLATCH_HASHER=sha256 for new keys",
            )
            if self._health is not None:
                self._health.record_failure(busy.message, busy.hint)
            raise busy
        if self._health is not None:
            self._health.record_success()
        completed = self._completed

        def release() -> None:
            completed.add()
            slots.release()

        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix=self._name)
        self._submitted.add()
        future = self._executor.submit(work)
        # Released when the thread is done, not when its caller is: the hash of a cancelled request
        # still occupies the pool.
        future.add_done_callback(lambda _: release())
        return await asyncio.wrap_future(future)


def _sha256(token: Token) -> str:
    return _SHA256 + token.digest.hex()


def _verify(stored: str, token: Token) -> VerifyResult:
    scheme = "argon2"
    try:
        if imported_tokens.is_imported_hash(stored):
            scheme = "an imported scheme"
            return imported_tokens.verify(stored, token)
        if argon2id.has_digest_format(stored):
            preimage = argon2id.compute_preimage(stored, token.reveal())
            return preimage if argon2id.verify_preimage(stored, preimage) else False
        return argon2.PasswordHasher().verify(stored, token.reveal())
    except VerifyMismatchError:
        return False
    except (InvalidHashError, HashingError, VerificationError, ValueError, MemoryError) as error:
        raise HashingFailed(
            f"{scheme} could not verify a stored hash: {type(error).__name__}",
            "the row was damaged or the machine is out of memory; no key was refused for it",
        ) from None
