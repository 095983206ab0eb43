"""Calls to Redis: one attempt of at most 50 ms; after a failure no call for one second.

An outage of Redis must not become an outage of authentication, so every failure is None. (With its
own defaults redis-py retries for 57 s if the server is paused.)
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from keylatch.telemetry.health import Health

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")

TIMEOUT_SECONDS: Final = 0.05
_OPEN_SECONDS: Final = 1.0
_RECOVERY_SECONDS: Final = 5.0


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a Redis that does not answer; imports redis-py only when one is caught."""
    from redis.exceptions import RedisError

    return RedisError, OSError, TimeoutError


def connect(url: str, **options: Any) -> "Redis":
    """A client that gives up instead of retrying.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        options: of a redis-py connection; they override the defaults.
    """
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    defaults = {
        "socket_timeout": TIMEOUT_SECONDS,
        "socket_connect_timeout": TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }
    # Many cold keys at once wait for a connection; an ordinary pool would raise an error.
    pool = BlockingConnectionPool.from_url(
        url, max_connections=8, timeout=TIMEOUT_SECONDS, **{**defaults, **options}
    )
    return Redis.from_pool(pool)


class CircuitBreaker:
    """After a failure it is open: no call for one second, then one caller tries (half-open).

    Args:
        timer: seconds, monotonic.
        clock: seconds since the Unix epoch.
        timeout_seconds: the limit of one attempt.
    """

    def __init__(
        self,
        timer: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._timer = timer
        self._timeout_seconds = timeout_seconds
        self.health = Health(
            "Redis does not answer (continuing without it)",
            "Redis answers again",
            recovery_seconds=_RECOVERY_SECONDS,
            clock=clock,
        )
        self._open_until = 0.0

    async def attempt(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """The result of a call, or None: it failed, timed out, or the breaker is open.

        A call that times out is cancelled, and redis-py (6.2 and later) then closes the connection,
        so a late reply is never read as the reply to another command. The call runs in the caller's
        task: a new task would take three turns of the event loop, as long as the command itself.
        """
        if not self.try_acquire():
            return None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                result = await call()
        except failures() as error:
            if _is_response(error):
                self.record_success()
                return None
            self.record_failure()
            self.health.record_failure(type(error).__name__, "is KEYLATCH_REDIS right?")
            return None
        self.record_success()
        return result

    def try_acquire(self) -> bool:
        """Whether the caller may call Redis now."""
        if not self._open_until:
            return True
        if self._timer() < self._open_until:
            return False
        self._open_until = self._timer() + _OPEN_SECONDS  # this caller tries, the others do not
        return True

    def record_failure(self) -> None:
        self._open_until = self._timer() + _OPEN_SECONDS

    def record_success(self) -> None:
        self._open_until = 0.0
        self.health.record_success()

    @property
    def is_open(self) -> bool:
        """Whether calls are suspended, or one caller tries (half-open)."""
        return bool(self._open_until)


def _is_response(error: Exception) -> bool:
    """Whether Redis has answered: the key holds a value of another type."""
    from redis.exceptions import ResponseError

    return isinstance(error, ResponseError)
