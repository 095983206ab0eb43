"""The one gate to Redis: one attempt within 50 ms, then nobody tries for a second.

Redis down must never be auth down, so every failure here is a plain None. (redis-py's own
defaults retry for 57 s on a paused server.)
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from keylatch.telemetry.condition import Condition

T = TypeVar("T")

BUDGET_SECONDS: Final = 0.05
_BREAK_SECONDS: Final = 1.0
_CALM_SECONDS: Final = 5.0
FAILURES: Final = (RedisError, OSError, TimeoutError)
"""What a broken Redis raises."""


def connect(url: str, **options: Any) -> "Redis":
    """A client that gives up instead of retrying.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        options: of a redis-py connection, over ours.
    """
    ours = {
        "socket_timeout": BUDGET_SECONDS,
        "socket_connect_timeout": BUDGET_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }
    # A herd of cold keys waits for a connection instead of being refused one.
    pool = BlockingConnectionPool.from_url(
        url, max_connections=8, timeout=BUDGET_SECONDS, **{**ours, **options}
    )
    return Redis.from_pool(pool)


class Breaker:
    """After a failure, nobody tries for a second; then one does, and the others go without.

    Args:
        timer: seconds that never go back.
        clock: seconds since the Unix epoch.
        budget_seconds: what one attempt may take.
    """

    def __init__(
        self,
        timer: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
        budget_seconds: float = BUDGET_SECONDS,
    ) -> None:
        self._timer = timer
        self._budget_seconds = budget_seconds
        self.condition = Condition(
            "Redis does not answer, so we work without it",
            "Redis answers again",
            calm_seconds=_CALM_SECONDS,
            clock=clock,
        )
        self._closed_until = 0.0

    async def attempt(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """What the call returns, or None: it failed, took too long, or was not tried.

        A call that takes too long is cancelled, and redis-py (6.2 and later) then drops the
        connection, so nobody finds an answer on it that was meant for another. No task is made for
        it: that would cost three turns of the event loop, as much as the question itself.
        """
        if not self.lets_pass():
            return None
        try:
            async with asyncio.timeout(self._budget_seconds):
                result = await call()
        except ResponseError:  # it answers; somebody put a value of another type there
            self.succeeded()
            return None
        except FAILURES as error:
            self.failed()
            self.condition.failed(type(error).__name__, "is KEYLATCH_REDIS right?")
            return None
        self.succeeded()
        return result

    def lets_pass(self) -> bool:
        """Whether the caller may try now."""
        if not self._closed_until:
            return True
        if self._timer() < self._closed_until:
            return False
        self._closed_until = self._timer() + _BREAK_SECONDS  # this caller tries, others go without
        return True

    def failed(self) -> None:
        """Note a failure."""
        self._closed_until = self._timer() + _BREAK_SECONDS

    def succeeded(self) -> None:
        """Note a success."""
        self._closed_until = 0.0
        self.condition.succeeded()

    @property
    def is_open(self) -> bool:
        """Whether nobody tries, or one does on probation."""
        return bool(self._closed_until)
