"""Checks of Redis. No decision depends on it, and it is of use only if it answers within 50 ms."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Final

from redis.asyncio.cluster import RedisCluster
from redis.exceptions import AuthenticationError, ResponseError

from keylatch.caches.redis_client import (
    TIMEOUT_SECONDS,
    connect,
    connect_subscriber,
    explain,
    failures,
    name_in_redis,
)
from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_SECONDS: Final = 2.0
_QUERIES: Final = 20
_SLOW_SECONDS: Final = 0.005
_NEARLY_FULL: Final = 0.9
_NAMES: Final = (name_in_redis("doctor", "1"), name_in_redis("doctor", "2"))


async def examine(url: str) -> list[Finding]:
    """The findings for this Redis."""
    client = connect(url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS)
    subscriber = connect_subscriber(url, client)
    try:
        async with asyncio.timeout(_SECONDS * 3):
            seconds = [await _time_one_query(client) for _ in range(_QUERIES)]
            refused = await _refused_commands(client, subscriber)
            servers = await _describe(client)
    except AuthenticationError:
        message = "it rejects this user and password"
        return [failure("Redis", message, "is the password in KEYLATCH_REDIS right, and encoded?")]
    except failures() as error:
        why, hint = explain(error)
        message = f"does not answer ({why}): everything works without it, slower"
        return [failure("Redis", message, hint)]
    finally:
        await subscriber.aclose()
        await client.aclose()
    findings = [*_check_latency(seconds), *_check_commands(refused)]
    for name, info in servers.items():
        findings += _check_server(f"Redis {name}".strip(), info, isinstance(client, RedisCluster))
    return findings


async def _describe(client: Any) -> dict[str, Mapping[str, Any]]:
    """INFO, by the name of the node in a Cluster; empty if this user may not."""
    try:
        if isinstance(client, RedisCluster):
            return dict(await client.info(target_nodes=RedisCluster.PRIMARIES))
        return {"": await client.info()}
    except ResponseError:
        return {"": {}}


async def _refused_commands(client: Any, subscriber: Any) -> dict[str, tuple[str, str]]:
    """The commands of keylatch that Redis answers with an error, with the reason and a hint.

    They are tried on names of the doctor's own, which expire after a second.
    """

    async def subscribe() -> None:
        async with subscriber.pubsub() as subscription:
            await subscription.subscribe(_NAMES[0])
            await subscription.get_message(timeout=_SECONDS)

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "SET": lambda: client.set(_NAMES[0], b"", ex=1),
        "GET": lambda: client.get(_NAMES[0]),
        "MGET": lambda: client.mget(_NAMES),
        "PUBLISH": lambda: client.publish(_NAMES[0], b""),
        "SUBSCRIBE": subscribe,
    }
    refused = {}
    for command, call in calls.items():
        try:
            await call()
        except ResponseError as error:
            refused[command] = explain(error)
    return refused


def _check_commands(refused: Mapping[str, tuple[str, str]]) -> Iterator[Finding]:
    for command, (word, hint) in refused.items():
        yield failure("Redis commands", f"it refuses {command}: {word}", hint)
    if not refused:
        yield ok("Redis commands", "it accepts what keylatch sends")


async def _time_one_query(client: Any) -> float:
    asked_at = time.perf_counter()
    with contextlib.suppress(ResponseError):  # it has answered
        await client.get(_NAMES[0])
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


def _check_server(name: str, info: Mapping[str, Any], is_cluster: bool) -> Iterator[Finding]:
    if not info:
        hint = "allow this user INFO, so that doctor can check more"
        yield warning(name, "it answers, but refuses INFO", hint)
        return
    yield ok(name, f"version {info.get('redis_version', 'unknown')}")
    if info.get("role") == "slave":
        message = "this is a replica: nothing can be cached in it or published to it"
        hint = "set KEYLATCH_REDIS to the primary, or use redis+sentinel://"
        yield failure(f"{name} role", message, hint)
    if info.get("cluster_enabled") and not is_cluster:
        message = "this is a node of a Cluster: it refuses what other nodes hold"
        yield failure(f"{name} role", message, "use redis+cluster://")
    yield from _check_memory(f"{name} memory", info)


def _check_memory(name: str, info: Mapping[str, Any]) -> Iterator[Finding]:
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    policy = str(info.get("maxmemory_policy", "unknown"))
    message = f"{used / (1 << 20):,.0f} MiB used, " + (
        f"{limit / (1 << 20):,.0f} at most, then {policy}" if limit else "no limit"
    )
    if policy == "noeviction" and limit:
        yield warning(
            name,
            message,
            "maxmemory-policy volatile-lru or allkeys-lru: a full Redis stores nothing new",
        )
    elif not limit:
        hint = "set maxmemory, with volatile-lru or allkeys-lru; keylatch's values live 300 s"
        yield warning(name, message, hint)
    elif policy.startswith("volatile") and used > limit * _NEARLY_FULL:
        hint = "keylatch's values are the first to be evicted; a Redis of its own, or allkeys-lru"
        yield warning(name, message, hint)
    else:
        yield ok(name, message)
