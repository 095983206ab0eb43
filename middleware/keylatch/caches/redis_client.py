"""Calls to Redis: one attempt of at most 50 ms; after a failure no call for one second.

An outage of Redis must not become an outage of authentication, so every failure is None. (With its
own defaults redis-py retries for 57 s if the server is paused.) Connections are opened outside of
the 50 ms: see `redis_connections`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from keylatch.telemetry.counters import Counter
from keylatch.telemetry.health import ComponentHealth, Health

T = TypeVar("T")

TIMEOUT_SECONDS: Final = 0.05
_OPEN_SECONDS: Final = 1.0
_RECOVERY_SECONDS: Final = 5.0

_CONNECT: Final = "a connection"
_OTHER: Final = "other"
_HINTS: Final = {
    "NOPERM": "give this user the commands, the names and the channel that docs/redis.md lists",
    "NOAUTH": "KEYLATCH_REDIS needs a user and a password",
    "WRONGPASS": "are the user and the password in KEYLATCH_REDIS right, and encoded?",
    "OOM": "it is full: set maxmemory-policy to volatile-lru or allkeys-lru",
    "READONLY": "it is a replica: name the primary, or use redis+sentinel://",
    "MOVED": "it is a Cluster: use redis+cluster://",
    "CROSSSLOT": "it is a Cluster: use redis+cluster://",
    "CLUSTERDOWN": "a part of the Cluster has no primary",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "MISCONF": "it cannot write its snapshot to disk: see its log",
    "LOADING": "it reads its data after a start",
    "BUSY": "it runs a script",
    "ERR": "see its log and `keylatch doctor`",
    _OTHER: "see `keylatch doctor`",
}
"""What to do, by the first word of an error reply; the keys are the labels of a metric."""


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a Redis that does not answer; imports redis-py only when one is caught."""
    from keylatch.caches.redis_errors import FAILURES

    return FAILURES


_CONNECT_HINT: Final = (
    "is the server up, and are scheme (rediss:// with TLS), host and port of KEYLATCH_REDIS right?"
)


def explain(error: BaseException) -> tuple[str, str]:
    """What a failure means, and a hint; neither holds a secret or an argument of a command."""
    from keylatch.caches.redis_errors import reason, refusal

    word = refusal(error)
    if word is None:
        return reason(error), _CONNECT_HINT
    label = _label(word)
    return (word if label != _OTHER else "an error reply"), _HINTS[label]


def check_url(url: str) -> str:
    """The URL without blanks around it.

    Raises:
        ValueError: it is no URL of a Redis, or has an unknown option; the message does not repeat
            it.
    """
    from keylatch.caches import redis_connections, redis_url

    url = url.strip()
    parsed = redis_url.parse(url)
    try:
        redis_connections.check(parsed)
    except Exception:  # noqa: BLE001 - RedisClusterException, TypeError, …: all quote the URL
        raise ValueError("not a Redis URL") from None
    return url


def name_in_redis(epoch: str, name: str) -> str:
    """A key or a channel of a store. The braces put all keys of a store into one slot of a Redis
    Cluster, so that MGET may name several."""
    return f"keylatch:{{{epoch}}}:{name}"


def connect(url: str, breaker: "CircuitBreaker | None" = None, **options: Any) -> Any:
    """An asyncio client that gives up instead of retrying.

    Args:
        url: see `redis_url`.
        breaker: learns of connections that could not be opened, and a call waits 25 ms for one at
            most; None: it waits until the connection is open, and fails otherwise.
        options: of a redis-py connection; those of the URL override them.
    """
    from keylatch.caches import redis_connections, redis_url

    return redis_connections.client(redis_url.parse(url), TIMEOUT_SECONDS, breaker, options)


def connect_subscriber(url: str, commands: Any) -> Any:
    """A client whose `pubsub` waits for messages without a limit.

    Args:
        url: see `redis_url`.
        commands: the client for commands, from `connect`.
    """
    from keylatch.caches import redis_connections, redis_url

    return redis_connections.subscriber(redis_url.parse(url), commands, {})


class Refusals:
    """Commands that Redis answers with an error, by the first word of the reply.

    A word is logged once, and again after a recovery: when each command that got this reply has
    succeeded, at least five seconds later.

    Args:
        clock: seconds since the Unix epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts = {word: Counter() for word in _HINTS}
        self._refused: dict[str, str] = {}  # the last reply, by command
        self._health: dict[str, Health] = {}  # by word

    @property
    def since(self) -> float | None:
        """When the oldest refusal that still lasts began; None: no command is refused."""
        return min((self._health[word].since for word in self._refused.values()), default=None)

    def counts(self) -> dict[str, int]:
        """How many commands were refused, by the first word of the reply."""
        return {word: counter.value for word, counter in self._counts.items()}

    def add(self, command: str, word: str) -> None:
        label = _label(word)
        self._counts[label].add()
        if label not in self._health:
            self._health[label] = Health(
                f"Redis answers with an error (continuing without it): {label}",
                f"Redis answers without {label} again",
                recovery_seconds=_RECOVERY_SECONDS,
                clock=self._clock,
            )
        self._refused[command] = label
        self._health[label].record_failure(f"it refuses {command}", _HINTS[label])

    def record_success(self, command: str) -> None:
        if not self._refused:
            return
        for each in (command, _CONNECT):  # it went through a connection
            label = self._refused.get(each)
            if label is None or not self._health[label].is_over():
                continue
            del self._refused[each]
            if label not in self._refused.values():
                self._health[label].record_success()


def _label(word: str) -> str:
    return word if word in _HINTS else _OTHER


class CircuitBreaker:
    """After a failure it is open: no call for one second, or until there is another primary; then
    one caller tries (half-open).

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
        self.refusals = Refusals(clock)
        self.on_failure: Callable[[], None] | None = None
        """Called after each failure; the client looks for another primary meanwhile."""
        self.on_new_primary: Callable[[], None] | None = None
        """Called when there is another primary; subscriptions move to it."""
        self._open_until = 0.0

    async def attempt(self, command: str, call: Callable[[], Awaitable[T]]) -> T | None:
        """The result of a call, or None: it failed, timed out, or the breaker is open.

        A call that times out is cancelled, and redis-py (6.2 and later) then closes the connection,
        so a late reply is never read as the reply to another command. The call runs in the caller's
        task: a new task would take three turns of the event loop, as long as the command itself.

        Args:
            command: of Redis, as refusals name it.
            call: sends it.
        """
        if not self.try_acquire():
            return None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                result = await call()
        except Exception as error:  # noqa: BLE001 - redis-py raises others while a Cluster changes
            self._record_error(command, error)
            return None
        self.record_success()
        self.refusals.record_success(command)
        return result

    def connection_failed(self, error: BaseException) -> None:
        """A connection could not be opened."""
        self._record_error(_CONNECT, error)
        self.record_failure()

    def connection_opened(self) -> None:
        """A connection is open, so the next caller may try at once."""
        if self._open_until:
            self._open_until = self._timer()

    def primary_changed(self) -> None:
        """Sentinel or the Cluster has another primary, so the next caller may try at once."""
        self.connection_opened()
        if self.on_new_primary is not None:
            self.on_new_primary()

    def _record_error(self, command: str, error: BaseException) -> None:
        from keylatch.caches.redis_errors import WRONG_TYPE, is_not_connected, is_reply, refusal

        if is_not_connected(error):
            return  # `connection_failed` records why, if it fails
        word = refusal(error)
        if word is None:
            self.health.record_failure(*explain(error))
        elif word != WRONG_TYPE:  # any writer of Redis can cause that one
            self.refusals.add(command, word)
        if is_reply(error):
            self.record_success()
        else:
            self.record_failure()

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
        if self.on_failure is not None:
            self.on_failure()

    def record_success(self) -> None:
        self._open_until = 0.0
        self.health.record_success()

    @property
    def is_open(self) -> bool:
        """Whether calls are suspended, or one caller tries (half-open)."""
        return bool(self._open_until)

    def component_health(self) -> ComponentHealth:
        """Degraded while Redis does not answer, or answers some command with an error."""
        refused_since = self.refusals.since
        if self.health.is_healthy and refused_since is not None:
            return ComponentHealth("redis", "degraded", refused_since, "Redis refuses commands")
        return self.health.component_health("redis", "degraded", "Redis does not answer")
