"""What a check costs where this process does not know the key, and what others notice of it.

    python benchmarks/miss_paths.py [--only l2|cold|herd|flood|pool|warm] [--rounds 7]
        [--json out.json]

In process, with a real Redis and a real PostgreSQL that are started here. Variants take turns.

l2     a check that Redis saves the hash ÷ one look-up in the store and one GET, on both stores
cold   a check that the store and argon2 answer ÷ a bare argon2 verify, on both stores
herd   how late the event loop is while 100 cold keys arrive at once, on both stores, with Redis
flood  a hit, counted from when it was due, while 10,000 made-up tokens a second arrive ÷ without;
       Redis, store and argon2 may not be called for them: if they are, this fails
pool   the threads that hash: verifies a second, and how late the loop is meanwhile
warm   a process restarts while Redis knows all keys: how many argon2 verifies, and how long
"""

import argparse
import asyncio
import contextlib
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from counted import counted
from keylatch.authentication.hashing import Hasher
from keylatch.caches.redis_client import connect, failures
from keylatch.core import argon2id
from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.core.tokens import MacKeys
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch.storage.store import Found, Store
from open_loop import percentiles_us
from stores import KINDS, RedisServer, create_store, filled
from targets import Row, Spread, report
from ticker import Ticker

HERD: Final = 100
UNKNOWN_TOKENS_PER_SECOND: Final = 10_000
HITS_PER_SECOND: Final = 500
L2_KEYS: Final = 60
WARM_KEYS: Final = 40
POOLS: Final = ((1, 0), (2, 0), (4, 0), (1, 19), (2, 19))
"""Threads, and how nice each of them is to all others (Linux)."""
BACKGROUND: Final = ("record_last_used", "run_maintenance", "poll", "position_nowait")
"""What an engine asks its store with and without forged tokens: lastUsed of the hits, housekeeping,
and, in place, the sequence number after each of these commits."""

Done = Callable[[], None]


def value_of(key: Created) -> bytes:
    """The value of an `Authorization` field."""
    return b"Bearer " + key.token.reveal().encode()


@contextlib.asynccontextmanager
async def started(url: str, redis: Any = "", **given: Any) -> AsyncIterator[Engine]:
    """An engine until the end of the block.

    Args:
        url: of the store.
        redis: a URL; or a client, if it is not used afterwards.
        given: more of `Engine`'s arguments.
    """
    place, client = (redis, None) if isinstance(redis, str) else ("", redis)
    engine = Engine(Settings.load(store=url, redis=place), redis=client, **given)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def allowed(engine: Engine, values: Sequence[bytes]) -> None:
    """Check one after the other; all must be allowed."""
    for value in values:
        decision = await engine.authenticate([value])
        if not isinstance(decision, Allow):
            raise SystemExit(f"error: a good key was refused: {decision}")


async def fill_redis(url: str, redis: RedisServer, keys: Sequence[Created]) -> None:
    """Let Redis know all of them.

    Telling it has a budget of 50 ms, so on a busy machine some of it takes another try.
    """
    values = [value_of(key) for key in keys]
    with redis.client() as client:
        while len(list(client.scan_iter("keylatch:*"))) < len(keys):
            async with started(url, redis.url) as engine:
                await allowed(engine, values)


def clear_caches(engine: Engine) -> None:
    """Clear the caches of this process."""
    engine._l1.clear()


# Redis


@dataclass(frozen=True)
class Spent:
    """Microseconds for one of several calls: of time, and of this process's processor time."""

    time_us: float
    processor_us: float


async def l2(rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """A check that Redis saves the hash ÷ its requests: one look-up and one GET."""
    return [row for kind in KINDS for row in await l2_on(kind, rounds, redis, done)]


async def l2_on(kind: str, rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """The same on one store."""
    spent: dict[str, list[Spent]] = {"check": [], "get": [], "find": []}
    calls = Counter[str]()
    redis.flush()
    with create_store(kind) as url:
        keys = await filled(url, L2_KEYS)
        await fill_redis(url, redis, keys)
        values = [value_of(key) for key in keys]
        client = connect(redis.url)
        async with started(url, client, hasher=counted(Hasher(), calls)) as engine:
            names = [name async for name in client.scan_iter("keylatch:*")]
            turn = {
                "get": lambda: each(client.get, names),
                "find": lambda: each(engine.store.keys.find, [key.record.id for key in keys]),
                "check": lambda: checked(engine, values),
            }
            given_up = 0
            while len(spent["get"]) <= rounds:
                calls.clear()
                order = sorted(turn, reverse=len(spent["get"]) % 2 == 0)
                try:
                    took = {name: await turn[name]() for name in order}
                except failures():
                    took = {}
                # The machine was so busy that Redis was late by its budget.
                if not took or calls["verify"]:
                    given_up += 1
                    await asyncio.sleep(1.1)  # it is tried again after a second
                    if given_up > rounds:
                        raise SystemExit("error: Redis was late in most rounds")
                    continue
                for name, one in took.items():
                    spent[name].append(one)
                done()
    pairs = list(zip(spent["get"], spent["find"], strict=True))[1:]  # the first one warms up
    checks = spent["check"][1:]
    times = [one.time_us for one in checks], [a.time_us + b.time_us for a, b in pairs]
    costs = (
        [one.processor_us for one in checks],
        [a.processor_us + b.processor_us for a, b in pairs],
    )
    return [
        Row(f"L2, {kind}: bare GET", Spread.of([get.time_us for get, _ in pairs]), "us"),
        Row(f"L2, {kind}: bare look-up", Spread.of([find.time_us for _, find in pairs]), "us"),
        Row(f"L2, {kind}: check", Spread.of(times[0]), "us"),
        Row(f"L2, {kind}: check ÷ both", Spread.ratio(*times), "", "<=", 2.0),
        Row(f"L2, {kind}: the same by processor time", Spread.ratio(*costs)),
    ]


async def each(call: Callable[[Any], Awaitable[Any]], given: Sequence[Any]) -> Spent:
    """Several calls, one after the other."""
    began, cost = time.perf_counter(), time.process_time()
    for one in given:
        await call(one)
    took, cost = time.perf_counter() - began, time.process_time() - cost
    return Spent(took / len(given) * 1e6, cost / len(given) * 1e6)


async def checked(engine: Engine, values: Sequence[bytes]) -> Spent:
    """The same for checks that this process cannot answer by itself."""
    clear_caches(engine)
    return await each(lambda value: allowed(engine, [value]), values)


# Store and argon2


async def cold(rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """A check that no process has cached ÷ a bare argon2 verify; no Redis."""
    rows = []
    for kind in KINDS:
        checks, verifies = [], []
        with create_store(kind) as url:
            keys = await filled(url, 8)
            async with started(url) as engine:
                hashes = {key: await hash_of(engine, key) for key in keys}
                await engine.authenticate([value_of(keys[0])])  # starts threads and connections
                for number in range(rounds):
                    clear_caches(engine)
                    ours: list[float] = []
                    theirs: list[float] = []
                    for key in keys:
                        if (number + len(ours)) % 2:
                            theirs.append(verified_ms(hashes[key], key))
                            ours.append(await checked_ms(engine, key))
                        else:
                            ours.append(await checked_ms(engine, key))
                            theirs.append(verified_ms(hashes[key], key))
                    checks.append(Spread.of(ours).median)
                    verifies.append(Spread.of(theirs).median)
                    done()
        rows += [
            Row(f"cold, {kind}: bare argon2 verify", Spread.of(verifies), "ms"),
            Row(f"cold, {kind}: check", Spread.of(checks), "ms"),
            Row(f"cold, {kind}: check ÷ bare", Spread.ratio(checks, verifies), "", "<=", 1.15),
        ]
    return rows


async def hash_of(engine: Engine, key: Created) -> str:
    """What the store holds of a key."""
    found = await engine.store.keys.find(key.record.id)
    assert isinstance(found, Found)
    return found.hash


def verified_ms(stored: str, key: Created) -> float:
    """Milliseconds of argon2 itself, called here."""
    began = time.perf_counter()
    argon2id.compute_preimage(stored, key.token.reveal())
    return (time.perf_counter() - began) * 1e3


async def checked_ms(engine: Engine, key: Created) -> float:
    """Milliseconds of a check."""
    value = value_of(key)
    began = time.perf_counter()
    await allowed(engine, [value])
    return (time.perf_counter() - began) * 1e3


async def herd(rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """How late the loop is while cold keys arrive at once."""
    rows = []
    for kind in KINDS:
        p99s, longest, worked, busy, idle = [], [], [], [], []
        with create_store(kind) as url:
            keys = await filled(url, HERD)
            values = [value_of(key) for key in keys]
            async with started(url, redis.url) as engine:
                await allowed(engine, values[:1])  # starts threads and connections
                for _ in range(rounds):
                    await asyncio.sleep(0.2)  # the last round's writes to Redis
                    redis.flush()
                    clear_caches(engine)
                    async with Ticker() as alone:
                        await asyncio.sleep(0.3)
                    async with Ticker() as ticker:
                        decisions = await asyncio.gather(
                            *(engine.authenticate([v]) for v in values)
                        )
                    idle.append(percentiles_us(alone.lateness)["p99"] / 1e3)
                    p99s.append(percentiles_us(ticker.lateness)["p99"] / 1e3)
                    longest.append(percentiles_us(ticker.lateness)["max"] / 1e3)
                    worked.append(max(ticker.worked) * 1e3)
                    busy.append(sum(decision == Deny(Reason.BUSY) for decision in decisions))
                    done()
        rows += [
            Row(f"herd, {kind}: loop late, p99", Spread.of(p99s), "ms", "<", 5),
            Row(f"herd, {kind}: loop late, at most", Spread.of(longest), "ms"),
            Row(f"herd, {kind}: the loop's own longest piece of work", Spread.of(worked), "ms"),
            Row(f"herd, {kind}: loop late, p99 while idle", Spread.of(idle), "ms"),
            Row(f"herd, {kind}: refused with 503, of {HERD}", Spread.of(busy)),
        ]
    return rows


async def pool(rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """How many threads shall hash, and how nice shall they be; no Redis, SQLite."""
    figures: dict[tuple[int, int], tuple[list[float], list[float], list[float]]] = {}
    with create_store("sqlite") as url:
        keys = await filled(url, 40)
        values = [value_of(key) for key in keys]
        for number in range(rounds):
            for kind in POOLS if number % 2 else reversed(POOLS):
                speeds, p99s, longest = figures.setdefault(kind, ([], [], []))
                async with started(url, hasher=hasher_of(*kind)) as engine:
                    await allowed(engine, values[:1])
                    clear_caches(engine)
                    began = time.perf_counter()
                    async with Ticker() as ticker:
                        await asyncio.gather(*(allowed(engine, [value]) for value in values))
                    speeds.append(len(values) / (time.perf_counter() - began))
                    late = percentiles_us(ticker.lateness)
                    p99s.append(late["p99"] / 1e3)
                    longest.append(late["max"] / 1e3)
                done()
    rows = []
    for (workers, niceness), (speeds, p99s, longest) in sorted(figures.items()):
        name = f"pool of {workers}, nice {niceness}"
        rows += [
            Row(f"{name}: verifies", Spread.of(speeds), "a second"),
            Row(f"{name}: loop late, p99", Spread.of(p99s), "ms"),
            Row(f"{name}: loop late, at most", Spread.of(longest), "ms"),
        ]
    return rows


def hasher_of(workers: int, niceness: int) -> Hasher:
    """One whose threads let others go first."""
    hasher = Hasher(workers=workers)
    if niceness:
        hasher._check_pool._executor = ThreadPoolExecutor(
            workers,
            initializer=lambda: os.setpriority(
                os.PRIO_PROCESS, threading.get_native_id(), niceness
            ),
        )
    return hasher


async def warm(rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """A process restarts: with Redis, and without."""
    figures: dict[str, tuple[list[float], list[float]]] = {
        "with Redis": ([], []),
        "without": ([], []),
    }
    redis.flush()
    with create_store("sqlite") as url:
        keys = await filled(url, WARM_KEYS)
        await fill_redis(url, redis, keys)
        values = [value_of(key) for key in keys]
        for number in range(rounds):
            for name in figures if number % 2 else reversed(figures):
                calls = Counter[str]()
                place = redis.url if name == "with Redis" else ""
                hasher = counted(Hasher(), calls)
                async with started(url, place, hasher=hasher) as engine:
                    began = time.perf_counter()
                    await asyncio.gather(*(allowed(engine, [value]) for value in values))
                    figures[name][0].append((time.perf_counter() - began) * 1e3)
                    figures[name][1].append(calls["verify"])
                done()
    known, unknown = figures.values()
    title = f"warm start, {WARM_KEYS} keys at once"
    return [
        Row(f"{title}: argon2 verifies", Spread.of(known[1]), "", "=", 0),
        Row(f"{title}: until all are in L1", Spread.of(known[0]), "ms"),
        Row(f"{title}, without Redis: argon2 verifies", Spread.of(unknown[1])),
        Row(f"{title}, without Redis: until all are in L1", Spread.of(unknown[0]), "ms"),
    ]


# Forged tokens


async def flood(rounds: int, redis: RedisServer, done: Done) -> list[Row]:
    """Hits, while made-up tokens arrive and while they do not."""
    calls = {"store": Counter[str](), "Redis": Counter[str](), "argon2": Counter[str]()}
    alone: list[float] = []
    flooded: list[float] = []
    with create_store("sqlite") as url:
        (key,) = await filled(url, 1, "sha256")
        async with started(
            url,
            counted(connect(redis.url), calls["Redis"]),
            store=counted(Store(url), calls["store"]),
            hasher=counted(Hasher(), calls["argon2"]),
        ) as engine:
            await allowed(engine, [value_of(key)])
            await asyncio.sleep(0.1)  # Redis has been written
            made_up = unknown_tokens(key, 2_000)
            for number in range(-1, rounds):
                for each in calls.values():
                    each.clear()
                for is_flooded in (True, False) if number % 2 else (False, True):
                    hits = await hits_seconds(engine, value_of(key), made_up if is_flooded else [])
                    if number >= 0:
                        (flooded if is_flooded else alone).append(percentiles_us(hits)["p99"])
                requested = {
                    f"{who}.{name}": count
                    for who, each in calls.items()
                    for name, count in each.items()
                    if name not in BACKGROUND
                }
                if requested:
                    raise SystemExit(f"error: made-up tokens caused requests: {requested}")
                done()
    return [
        Row("flood: p99 of a hit, idle", Spread.of(alone), "us"),
        Row("flood: p99 of a hit, flooded", Spread.of(flooded), "us"),
        Row("flood: flooded ÷ idle", Spread.ratio(flooded, alone), "", "<=", 2.0),
        Row("flood: calls to Redis, store and argon2", Spread.of([0]), "", "=", 0),
    ]


def unknown_tokens(key: Created, count: int) -> list[bytes]:
    """Made-up tokens: noise, another deployment's, and a good key's id with other secrets."""
    others = MacKeys([b"another deployment's key"])
    start, _, _ = key.token.reveal().rpartition("_")
    kinds = [
        lambda: "nobody_" + random.randbytes(24).hex(),
        lambda: others.mint("kl", "live").reveal(),
        lambda: f"{start}_{others.mint('kl', 'live').reveal().rpartition('_')[2]}",
    ]
    return [b"Bearer " + kinds[number % 3]().encode() for number in range(count)]


async def hits_seconds(
    engine: Engine, good: bytes, made_up: Sequence[bytes], seconds: float = 1.0
) -> list[float]:
    """Latencies of hits, from when each was due; made-up tokens are due in between.

    It spins, because timers of event loops have milliseconds, and lets the loop have a turn
    after every hit.
    """
    noise = random.Random(1)
    begin = time.perf_counter()
    due = [
        (begin + (number + noise.random()) / HITS_PER_SECOND, good)
        for number in range(int(HITS_PER_SECOND * seconds))
    ]
    if made_up:
        due += [
            (begin + number / UNKNOWN_TOKENS_PER_SECOND, made_up[number % len(made_up)])
            for number in range(int(UNKNOWN_TOKENS_PER_SECOND * seconds))
        ]
    latencies = []
    for due_at, value in sorted(due):
        while time.perf_counter() < due_at:
            pass
        decision = await engine.authenticate([value])
        if value is good:
            latencies.append(time.perf_counter() - due_at)
            await asyncio.sleep(0)
        if isinstance(decision, Allow) is not (value is good):
            raise SystemExit(f"error: the wrong key was allowed or refused: {decision}")
    return latencies


PARTS: Final = {"l2": l2, "cold": cold, "herd": herd, "flood": flood, "pool": pool, "warm": warm}


async def measure(only: Sequence[str], rounds: int, progress: Progress) -> list[Row]:
    """One part after the other."""
    rows: list[Row] = []
    task = progress.add_task("", total=None)
    with tempfile.TemporaryDirectory(prefix="keylatch-bench-") as folder:
        redis = RedisServer(Path(folder))
        try:
            for name in only:
                progress.update(task, description=name, completed=0)
                rows += await PARTS[name](rounds, redis, lambda: progress.advance(task))
        finally:
            redis.kill()
    return rows


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", choices=[*PARTS], action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        rows = asyncio.run(measure(given.only or [*PARTS], given.rounds, progress))
    report("Checks that L1 cannot answer, in process", rows, given.json)


if __name__ == "__main__":
    main()
