"""Engines for tests: cheap hashes, time as a test sets it."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from keylatch.caches.redis_client import CircuitBreaker
from keylatch.engine import Engine

MakeEngine = Callable[..., Engine]


Times = Callable[[int, int], int]


def extend_redis_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as a busy machine takes: the 50 ms of an attempt are other tests' affair."""
    monkeypatch.setattr("keylatch.caches.redis_client.TIMEOUT_SECONDS", 60)
    monkeypatch.setattr(
        "keylatch.engine.CircuitBreaker", partial(CircuitBreaker, timeout_seconds=60)
    )


async def wait_until(condition: Callable[[], Awaitable[object]]) -> None:
    """Return once something is so that a background task of this loop brings about."""
    while not await condition():  # noqa: ASYNC110 - it has no event that a test could wait for
        await asyncio.sleep(0)
