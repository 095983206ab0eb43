"""Redis, which nothing needs to be right, and which is of use only if it answers within 50 ms."""

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from redis.exceptions import AuthenticationError, ResponseError

from keylatch.caches.breaker import BUDGET_SECONDS, FAILURES, connect
from keylatch_sidecar.doctor.finding import Finding, failure, ok, warning

_SECONDS: Final = 2.0
_QUESTIONS: Final = 20
_SLOW_SECONDS: Final = 0.005
_NEARLY_FULL: Final = 0.9


async def examine(url: str) -> list[Finding]:
    """What there is to say of it."""
    client = connect(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS)
    try:
        async with asyncio.timeout(_SECONDS * 2):
            await client.ping()
            took = [await _one(client) for _ in range(_QUESTIONS)]
            try:
                told: Mapping[str, Any] = await client.info()
            except ResponseError:  # not for this user
                told = {}
    except AuthenticationError:
        wrong = "it does not take this user and password"
        return [failure("Redis", wrong, "is the password in KEYLATCH_REDIS right, and encoded?")]
    except FAILURES as error:
        wrong = f"does not answer ({type(error).__name__}): everything works without it, slower"
        return [failure("Redis", wrong, "is it up, and KEYLATCH_REDIS right?")]
    finally:
        await client.aclose()
    return [*_of_latency(took), *_of_server(told)]


async def _one(client: Any) -> float:
    asked_at = time.perf_counter()
    await client.get("keylatch:doctor")
    return time.perf_counter() - asked_at


def _of_latency(took: list[float]) -> Iterator[Finding]:
    typical, longest = statistics.median(took), max(took)
    says = f"{typical * 1000:.2f} ms for a question, {longest * 1000:.2f} at most"
    if longest > BUDGET_SECONDS:
        hint = "an attempt is given up after 50 ms, and then nobody tries for a second"
        yield warning("Redis latency", says, hint)
    elif typical > _SLOW_SECONDS:
        yield warning("Redis latency", says, "one that is closer; the store may be quicker")
    else:
        yield ok("Redis latency", says)


def _of_server(told: Mapping[str, Any]) -> Iterator[Finding]:
    if not told:
        hint = "allow this user INFO to have it examined"
        yield warning("Redis", "it answers, and tells nothing of itself", hint)
        return
    yield ok("Redis", f"version {told.get('redis_version', 'unknown')}")
    if told.get("role") == "slave":
        wrong = "this is a replica: nothing can be told to it, and no bell be rung"
        yield failure("Redis role", wrong, "set KEYLATCH_REDIS to the primary")
    if told.get("cluster_enabled"):
        wrong = "it is a cluster: questions for several keys at once fail"
        yield warning("Redis role", wrong, "one server without cluster mode")
    yield from _of_memory(told)


def _of_memory(told: Mapping[str, Any]) -> Iterator[Finding]:
    limit, used = int(told.get("maxmemory", 0)), int(told.get("used_memory", 0))
    policy = str(told.get("maxmemory_policy", "unknown"))
    says = f"{used / (1 << 20):,.0f} MiB used, " + (
        f"{limit / (1 << 20):,.0f} at most, then {policy}" if limit else "no limit"
    )
    if policy == "noeviction" and limit:
        yield warning(
            "Redis memory",
            says,
            "maxmemory-policy volatile-lru or allkeys-lru: a full Redis takes nothing new",
        )
    elif not limit:
        hint = "set maxmemory, with volatile-lru or allkeys-lru; keylatch's values live 300 s"
        yield warning("Redis memory", says, hint)
    elif policy.startswith("volatile") and used > limit * _NEARLY_FULL:
        hint = "keylatch's values are among the few that may go; a Redis of its own, or allkeys-lru"
        yield warning("Redis memory", says, hint)
    else:
        yield ok("Redis memory", says)
