"""Runs all checks concurrently, each with a time limit."""

import asyncio
from collections.abc import Awaitable
from typing import Final

from keylatch.errors import ConfigurationError
from keylatch.settings import Settings
from keylatch.storage.sqlite import SQLite
from keylatch.storage.store import database_of, file_of
from keylatch_sidecar.operations.doctor import host, listeners, postgresql, redis, sqlite
from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok

_SECONDS: Final = 10.0


async def examine(settings: Settings) -> list[Finding]:
    """All findings, in the order of the table: settings, host, store, Redis, listeners."""
    checks = [
        _with_timeout("hashing", host.check_hashing(settings), _SECONDS),
        _with_timeout("store", _check_store(settings), _SECONDS + 2 * settings.lease),
    ]
    if settings.redis:
        checks.append(_with_timeout("Redis", redis.examine(settings.redis), _SECONDS))
    found = await asyncio.gather(*checks)
    return [
        ok("settings", "all are valid"),
        *host.check_pepper_file(settings),
        *(each for findings in found for each in findings),
        *await asyncio.to_thread(lambda: list(listeners.examine(settings.store))),
    ]


async def _check_store(settings: Settings) -> list[Finding]:
    try:
        database = database_of(settings.store, direct_url=settings.store_direct)
    except ConfigurationError as error:
        return [failure("store", message, hint) for message, hint in error.mistakes]
    try:
        path = file_of(settings.store)
        if path is not None and isinstance(database, SQLite):
            return await asyncio.to_thread(sqlite.examine, database, path)
        return await postgresql.examine(
            settings.store,
            settings.lease,
            direct_url=settings.store_direct,
            read_url=settings.store_read,
            must_replicate=settings.durable == "replicated",
        )
    finally:
        await database.close()


async def _with_timeout(
    check: str, findings: Awaitable[list[Finding]], seconds: float
) -> list[Finding]:
    try:
        async with asyncio.timeout(seconds):
            return await findings
    except TimeoutError:
        return [failure(check, f"no answer within {seconds:g} s", "is the machine overloaded?")]
