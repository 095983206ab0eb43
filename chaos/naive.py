"""The twin that must be caught: API keys cached as they are cached everywhere.

    python naive.py check|revoke STORE REDIS SOCKET NAME [SEED]

A dictionary in the process and Redis behind it, 60 seconds each. A DELETE commits, deletes the
value in Redis and publishes; every process that receives it drops its entry. No lease, no sequence
numbers.
Whatever Redis or the store does, a key that is cached is served: "availability first".
"""

import asyncio
import contextlib
import os
import random
import secrets
import socket
import sys
import time
from typing import Any, Final

import psycopg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from channel import Channel
from checker import ACCEPTED, REFUSED, UNDECIDED, Checker
from revoker import Refused, Revoked, revoke_until_ended

_AT_A_TIME: Final = 2
_TTL_SECONDS: Final = 60
_PATIENCE_SECONDS: Final = 1.0
_CHANNEL: Final = "naive:revoked"
TABLE: Final = "CREATE TABLE naive_keys (id text PRIMARY KEY, active boolean NOT NULL)"


class Table:
    """The table of keys, over one connection that is made anew when it broke."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turn = asyncio.Lock()
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def fetch(self, sql: str, key: str) -> list[tuple[Any, ...]]:
        """Run a statement and commit it.

        Raises:
            psycopg.OperationalError: it failed, or took too long.
        """
        async with self._turn:
            task = asyncio.create_task(self._fetch(sql, key))
            done, _ = await asyncio.wait({task}, timeout=_PATIENCE_SECONDS)
            if done and task.exception() is None:
                return task.result()
            self._cut()
            task.add_done_callback(lambda left: left.cancelled() or left.exception())
        raise psycopg.OperationalError

    def _cut(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Not finish(): it frees what the task that was left behind goes on to use.
            with contextlib.suppress(psycopg.Error, OSError):
                line = socket.socket(fileno=os.dup(connection.fileno()))
                line.shutdown(socket.SHUT_RDWR)
                line.close()

    async def _fetch(self, sql: str, key: str) -> list[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = await psycopg.AsyncConnection.connect(
                self._url, autocommit=True, connect_timeout=2
            )
        cursor = await self._connection.execute(sql.encode(), (key,))
        return await cursor.fetchall() if cursor.description else []


class NaiveKeys:
    """See `checker.Subject` and `revoker.Revoking`. The token is the key's id."""

    def __init__(self, store: str, redis: str) -> None:
        self._urls = store, redis
        self._local: dict[str, tuple[bool, float]] = {}

    async def start(self) -> None:
        store, redis = self._urls
        self._table = Table(store)
        self._redis = Redis.from_url(redis, socket_timeout=_PATIENCE_SECONDS)
        self._ears = Redis.from_url(redis)
        self._listening = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        self._listening.cancel()

    def after_fork_in_child(self) -> None:
        return None  # `start` opens connections of its own; the dictionary is inherited

    async def _listen(self) -> None:
        while True:
            try:
                async with self._ears.pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(_CHANNEL)
                    async for message in subscription.listen():
                        self._local.pop(message["data"].decode(), None)
            except (RedisError, OSError):
                await asyncio.sleep(0.1)

    # Checking

    def check_cached(self, token: str) -> int | None:
        active, until = self._local.get(token, (False, 0.0))
        if until < time.monotonic():
            return None
        return ACCEPTED if active else REFUSED

    async def check(self, token: str) -> int:
        try:
            active = await self._fetch(token)
        except psycopg.OperationalError:
            stale = self._local.get(token)
            if stale is None:
                return UNDECIDED
            active, _ = stale
        self._local[token] = active, time.monotonic() + _TTL_SECONDS
        return ACCEPTED if active else REFUSED

    async def _fetch(self, token: str) -> bool:
        try:
            cached = await self._redis.get(f"naive:{token}")
            if cached is not None:
                return bool(cached == b"1")
        except (RedisError, OSError):
            pass  # the store knows
        rows = await self._table.fetch("SELECT active FROM naive_keys WHERE id = %s", token)
        active = bool(rows and rows[0][0])
        with contextlib.suppress(RedisError, OSError):  # it is only a cache
            await self._redis.set(f"naive:{token}", int(active), ex=_TTL_SECONDS)
        return active

    # Managing

    async def create(self) -> tuple[str, str]:
        key = secrets.token_hex(8)
        try:
            await self._table.fetch("INSERT INTO naive_keys VALUES (%s, true)", key)
        except psycopg.OperationalError:
            raise Refused from None
        return key, key

    async def revoke(self, key: str, wait: bool) -> Revoked:
        try:
            await self._table.fetch("UPDATE naive_keys SET active = false WHERE id = %s", key)
        except psycopg.OperationalError:
            raise Refused from None
        committed = time.monotonic_ns()
        try:
            await self._redis.delete(f"naive:{key}")
            await self._redis.publish(_CHANNEL, key)
        except (RedisError, OSError):
            pass  # it is only a cache
        return Revoked(committed, time.monotonic_ns(), 0)


async def revoke(keys: NaiveKeys, path: str, name: str, seed: int) -> None:
    """Revoke until the end message."""
    channel = await Channel.connect(path, role="revoker", side="naive", name=name)
    await keys.start()
    await revoke_until_ended(keys, channel, random.Random(seed), _AT_A_TIME)
    await keys.stop()
    await channel.close()


if __name__ == "__main__":
    role, store, redis, path, name, *seed = sys.argv[1:]
    keys = NaiveKeys(store, redis)
    if role == "check":
        Checker(keys, path, "naive", name).run()
    else:
        asyncio.run(revoke(keys, path, name, int(seed[0])))
