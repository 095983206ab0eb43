"""The one gate to Redis: one attempt within 50 ms, then nobody tries for a second.

Redis down must never be auth down, so every failure here is a plain None. (redis-py's own
defaults retry for 57 s on a paused server.)
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
    # A herd of cold keys waits for a connection instead of being refused one.
    pool = BlockingConnectionPool.from_url(
        url, max_connections=8, timeout=TIMEOUT_SECONDS, **{**defaults, **options}
    )
    return Redis.from_pool(pool)


class CircuitBreaker:
    """After a failure, nobody tries for a second; then one does, and the others go without.

    Args:
        timer: seconds that never go back.
        clock: seconds since the Unix epoch.
        timeout_seconds: what one attempt may take.
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
        """What the call returns, or None: it failed, took too long, or was not tried.

        A call that takes too long is cancelled, and redis-py (6.2 and later) then drops the
        connection, so nobody finds an answer on it that was meant for another. No task is made for
        it: that would cost three turns of the event loop, as much as the question itself.
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
        """Whether the caller may try now."""
        if not self._open_until:
            return True
        if self._timer() < self._open_until:
            return False
        self._open_until = self._timer() + _OPEN_SECONDS  # this caller tries, others go without
        return True

    def record_failure(self) -> None:
        """Note a failure."""
        self._open_until = self._timer() + _OPEN_SECONDS

    def record_success(self) -> None:
        """Note a success."""
        self._open_until = 0.0
        self.health.record_success()

    @property
    def is_open(self) -> bool:
        """Whether nobody tries, or one does on probation."""
        return bool(self._open_until)


def _is_response(error: Exception) -> bool:
    """Whether Redis has answered: the key holds a value of another type."""
    from redis.exceptions import ResponseError

    return isinstance(error, ResponseError)
