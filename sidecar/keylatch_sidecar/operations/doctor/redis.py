"""Checks of Redis. No decision depends on it, and it is of use only if it answers within 50 ms."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from redis.exceptions import AuthenticationError, ResponseError

from keylatch.caches.redis_client import TIMEOUT_SECONDS, connect, failures
from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_SECONDS: Final = 2.0
_QUERIES: Final = 20
_SLOW_SECONDS: Final = 0.005
_NEARLY_FULL: Final = 0.9


async def examine(url: str) -> list[Finding]:
    """The findings for this Redis."""
    client = connect(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS)
    try:
        async with asyncio.timeout(_SECONDS * 2):
            await client.ping()
            seconds = [await _time_one_query(client) for _ in range(_QUERIES)]
            try:
                info: Mapping[str, Any] = await client.info()
            except ResponseError:  # this user may not
                info = {}
    except AuthenticationError:
        message = "it rejects this user and password"
        return [failure("Redis", message, "is the password in KEYLATCH_REDIS right, and encoded?")]
    except failures() as error:
        message = f"does not answer ({type(error).__name__}): everything works without it, slower"
        return [failure("Redis", message, "is it up, and KEYLATCH_REDIS right?")]
    finally:
        await client.aclose()
    return [*_check_latency(seconds), *_check_server(info)]


async def _time_one_query(client: Any) -> float:
    asked_at = time.perf_counter()
    await client.get("keylatch:doctor")
    return time.perf_counter() - asked_at


def _check_latency(seconds: list[float]) -> Iterator[Finding]:
    median, maximum = statistics.median(seconds), max(seconds)
    message = f"{median * 1000:.2f} ms for a query, {maximum * 1000:.2f} at most"
    if maximum > TIMEOUT_SECONDS:
        hint = "a call is abandoned after 50 ms, and then Redis is not called for a second"
        yield warning("Redis latency", message, hint)
    elif median > _SLOW_SECONDS:
        yield warning("Redis latency", message, "use one that is closer; the store may be faster")
    else:
        yield ok("Redis latency", message)


def _check_server(info: Mapping[str, Any]) -> Iterator[Finding]:
    if not info:
        hint = "allow this user INFO, so that doctor can check more"
        yield warning("Redis", "it answers, but refuses INFO", hint)
        return
    yield ok("Redis", f"version {info.get('redis_version', 'unknown')}")
    if info.get("role") == "slave":
        message = "this is a replica: nothing can be cached in it or published to it"
        yield failure("Redis role", message, "set KEYLATCH_REDIS to the primary")
    if info.get("cluster_enabled"):
        message = "this is a cluster: commands with several keys fail"
        yield warning("Redis role", message, "one server without cluster mode")
    yield from _check_memory(info)


def _check_memory(info: Mapping[str, Any]) -> Iterator[Finding]:
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    policy = str(info.get("maxmemory_policy", "unknown"))
    message = f"{used / (1 << 20):,.0f} MiB used, " + (
        f"{limit / (1 << 20):,.0f} at most, then {policy}" if limit else "no limit"
    )
    if policy == "noeviction" and limit:
        yield warning(
            "Redis memory",
            message,
            "maxmemory-policy volatile-lru or allkeys-lru: a full Redis stores nothing new",
        )
    elif not limit:
        hint = "set maxmemory, with volatile-lru or allkeys-lru; keylatch's values live 300 s"
        yield warning("Redis memory", message, hint)
    elif policy.startswith("volatile") and used > limit * _NEARLY_FULL:
        hint = "keylatch's values are the first to be evicted; a Redis of its own, or allkeys-lru"
        yield warning("Redis memory", message, hint)
    else:
        yield ok("Redis memory", message)
