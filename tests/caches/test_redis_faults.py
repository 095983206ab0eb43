"""L2: what is accepted from Redis, and what its faults may do: cost a short time, nothing else."""

import asyncio
import contextlib
import itertools
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fakeredis
import httpx
import pytest

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.caches.redis_client import CircuitBreaker, connect, name_in_redis
from keylatch.caches.shared_cache import SharedCache
from keylatch.core import argon2id
from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.core.tokens import SECRET_LENGTH, MacKeys, Token
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from tests.support.clock import Clock
from tests.support.engines import MakeEngine, extend_redis_timeouts
from tests.support.redis_servers import deployment
from tests.support.servers import RedisServer, eventually, serving

pytestmark = pytest.mark.long

PEPPER = b"p" * 32
EPOCH = "e"
KEYS = MacKeys([b"n" * 32])
Connect = Callable[..., Any]
PATIENT: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5}


class Row:
    """A token, what the store holds of it, and what proves that the two belong together."""

    def __init__(self) -> None:
        self.token = KEYS.mint("kl", "live")
        self.hash = argon2id.hash_secret(self.token.reveal(), CHEAPEST)
        self.preimage = argon2id.compute_preimage(self.hash, self.token.reveal())

    async def put(self, cache: SharedCache) -> None:
        await cache.put(self.token, self.token.key_id, self.hash, self.preimage, EPOCH)

    async def is_proven(
        self, cache: SharedCache, token: Token | None = None, epoch: str = EPOCH
    ) -> bool:
        return await cache.proves(token or self.token, self.token.key_id, self.hash, epoch)

    @property
    def name(self) -> str:
        return name_in_redis(EPOCH, self.token.key_id)


def with_another_secret(token: Token) -> Token:
    """A token for the same key that this store did not mint."""
    start, _, tail = token.reveal().rpartition("_")
    return Token(f"{start}_{tail[::-1]}")


def bearer(token: Token) -> list[bytes]:
    return [b"Bearer " + token.reveal().encode()]


def engine_on(store: str, redis: str) -> Engine:
    """An engine that argon2 costs hardly anything; with SHA-256 it would not ask Redis."""
    return Engine(
        Settings.load(store=store, redis=redis), hasher=Hasher("argon2id", CHEAPEST, queue=200)
    )


def shared(client: Any, peppers: list[bytes]) -> SharedCache:
    """The shared cache of one process, which is in no hurry."""
    return SharedCache(client, peppers, CircuitBreaker(timeout_seconds=5))


async def all_names(client: Any) -> list[bytes]:
    """The names in every primary: redis-py sends KEYS to one node of a Cluster."""
    if not hasattr(client, "get_primaries"):
        return list(await client.keys())
    await client.initialize()
    return [
        name for node in client.get_primaries() for name in await client.keys(target_nodes=node)
    ]


async def names_in_redis(
    client: Any, new_engine: Callable[[], Engine], keys: list[Created]
) -> list[bytes]:
    """The names of the keys' values, once Redis has all of them.

    Writing to Redis has a budget of 50 ms, and connecting to it takes time as well, so on a busy
    machine it may take other processes. Each begins with another key: the first ones are checked
    while it connects.
    """
    for _ in range(len(keys) * 10):
        names = await all_names(client)
        if len(names) == len(keys):
            return list(names)
        keys = [*keys[1:], keys[0]]
        engine = new_engine()
        for key in keys:
            assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        await asyncio.sleep(0.02)  # it is written in the background
        await engine.stop()
    raise AssertionError("Redis never had all values")


@pytest.fixture(scope="module")
def deployments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Starts a Redis of a shape once for all tests of this file; it is empty for each of them."""
    started: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        def start(shape: str) -> Any:
            if shape not in started:
                folder = tmp_path_factory.mktemp(shape)
                started[shape] = stack.enter_context(deployment(shape, folder))
            started[shape].flush()
            return started[shape]

        yield start


REAL_SHAPES = ["redis", "sentinel", "cluster", "tls", "valkey"]


@pytest.fixture(
    params=[
        "fakeredis",
        *(pytest.param(shape, marks=pytest.mark.service("redis")) for shape in REAL_SHAPES),
    ]
)
def connect_anew(request: pytest.FixtureRequest, deployments: Callable[[str], Any]) -> Connect:
    """Connects to the test's own Redis, as each process does for itself."""
    if request.param == "fakeredis":
        server = fakeredis.FakeServer()
        return lambda **options: fakeredis.FakeAsyncRedis(server=server)
    url = deployments(request.param).url
    return lambda **options: connect(url, **options)


@pytest.mark.anyio
class TestSharedCacheContract:
    """What holds for the real Redis holds for the fake one, so that other tests may use it."""

    async def test_a_verified_token_is_shared_with_other_processes(
        self, connect_anew: Connect
    ) -> None:
        """What one process has hashed, another one need not."""
        ours, theirs = shared(connect_anew(), [PEPPER]), shared(connect_anew(), [PEPPER])
        row = Row()
        assert not await row.is_proven(theirs)
        await row.put(ours)
        assert await row.is_proven(theirs)
        await ours.close()
        await theirs.close()

    async def test_it_proves_one_token_of_one_row(self, connect_anew: Connect) -> None:
        """Another secret of the same key, and a hash that was made since, are misses: Redis has
        positive entries only, so no token is refused by what it holds."""
        cache, row = shared(connect_anew(), [PEPPER]), Row()
        await row.put(cache)
        assert not await row.is_proven(cache, with_another_secret(row.token))
        renewed = argon2id.hash_secret(row.token.reveal(), CHEAPEST)
        assert not await cache.proves(row.token, row.token.key_id, renewed, EPOCH)
        assert cache.forged.value == 0
        await cache.close()

    async def test_a_tombstone_is_a_miss(self, connect_anew: Connect) -> None:
        """The revoker overwrites the value, without knowing the token."""
        cache, row = shared(connect_anew(), [PEPPER]), Row()
        await row.put(cache)
        await cache.invalidate(row.token.key_id, EPOCH)
        assert not await row.is_proven(cache)
        assert cache.forged.value == 0
        await cache.close()

    async def test_another_epoch_is_another_store(self, connect_anew: Connect) -> None:
        """After a restore from a backup, and in a copy, no earlier value is found."""
        cache, row = shared(connect_anew(), [PEPPER]), Row()
        await row.put(cache)
        assert not await row.is_proven(cache, epoch="another")
        await cache.close()

    async def test_peppers_rotate(self, connect_anew: Connect) -> None:
        """A value of an older pepper is read on; one of an unknown pepper is a miss."""
        cache, row = shared(connect_anew(), [PEPPER]), Row()
        rotated = shared(connect_anew(), [b"q" * 32, PEPPER])
        other = shared(connect_anew(), [b"s" * 32])
        await row.put(cache)
        assert await row.is_proven(rotated)
        assert not await row.is_proven(other)
        for each in (cache, rotated, other):
            await each.close()

    async def test_a_herd_is_answered_together(self, connect_anew: Connect) -> None:
        """Look-ups that arrive during a request share the next one: each gets its own value.

        An invalid value, a missing one and a cancelled caller delay no other caller.
        """
        calls: list[str] = []

        class Listening:
            """The client, overheard."""

            def __init__(self, client: Any) -> None:
                self._client = client

            def __getattr__(self, name: str) -> Any:
                calls.append(name)
                return getattr(self._client, name)

        client = connect_anew(**PATIENT)
        cache = shared(Listening(client), [PEPPER])
        rows = [Row() for _ in range(300)]
        for row in rows:
            await row.put(cache)
        await client.delete(rows[7].name)
        await client.delete(rows[8].name)
        await client.rpush(rows[8].name, b"1")
        calls.clear()
        tasks = [asyncio.create_task(row.is_proven(cache)) for row in rows]
        await asyncio.sleep(0)
        tasks[9].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert calls == ["get", "mget", "mget"]
        for number, known in enumerate(found):
            if number == 9:
                assert isinstance(known, asyncio.CancelledError)
            else:
                assert known is (number not in (7, 8))
        assert await rows[0].is_proven(cache)
        assert calls[-1] == "get"
        await client.aclose()

    async def test_what_was_written_by_others_is_a_miss(
        self, connect_anew: Connect, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Any changed byte, any cut, garbage, a value of another key, a list: nothing is accepted.

        And none of it keeps the next good value from being found.
        """
        client = connect_anew()
        cache = shared(connect_anew(), [PEPPER])
        row, other = Row(), Row()
        await other.put(cache)
        others = await client.get(other.name)
        await row.put(cache)
        good = await client.get(row.name)
        forgeries = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
        forgeries += [good[:at] for at in range(0, len(good), 16)]
        forgeries += [others, good + b" ", good * 2, b"null", b"\xff" * 1_000_000]
        for forgery in forgeries:
            await client.set(row.name, forgery)
            assert not await row.is_proven(cache)
        assert cache.forged.value == len(forgeries)
        warnings = [each for each in caplog.messages if "has no valid MAC" in each]
        assert len(warnings) == cache.forged.value.bit_length(), "1, 2, 4, … of them are logged"
        await client.set(row.name, good)
        assert await row.is_proven(cache)
        await client.delete(row.name)
        await client.rpush(row.name, good)
        assert not await row.is_proven(cache)
        await client.aclose()
        await cache.close()

    async def test_an_old_value_that_is_put_back_is_stale(
        self, connect_anew: Connect, make_engine: MakeEngine
    ) -> None:
        """Restoring what Redis held before a revoke re-activates no key, in no process."""
        revoker, other = make_engine(redis=connect_anew()), make_engine(redis=connect_anew())
        client = connect_anew(**PATIENT)
        await revoker.start()
        await other.start()
        keyring = await revoker.keyring()
        created = await keyring.create("org", "key")
        assert isinstance(await revoker.authenticate(bearer(created.token)), Allow)
        (name,) = await names_in_redis(client, lambda: make_engine(redis=connect_anew()), [created])
        old = await client.get(name)
        await keyring.delete("org", created.record.id)
        await client.set(name, old)

        newcomer = make_engine(redis=connect_anew())
        await newcomer.start()
        for engine in (revoker, other, newcomer):
            assert await engine.authenticate(bearer(created.token)) == Deny(Reason.REVOKED)
            await engine.stop()
        await client.aclose()

    async def test_redis_never_holds_a_token(
        self, connect_anew: Connect, make_engine: MakeEngine
    ) -> None:
        """No key and no value holds a secret, nor its digest, with which one could try others."""
        client, engine = connect_anew(**PATIENT), make_engine(redis=connect_anew())
        await engine.start()
        keyring = await engine.keyring()
        created = [await keyring.create("org", f"key {number}") for number in range(20)]
        names = await names_in_redis(client, lambda: make_engine(redis=connect_anew()), created)
        held = b"".join(names) + b"".join(await client.mget(names))
        for key in created:
            assert key.token.reveal()[-41:][:SECRET_LENGTH].encode() not in held
            for digest in (key.token.digest, key.token.fingerprint):
                assert digest not in held
                assert digest.hex().encode() not in held
        await engine.stop()
        await client.aclose()


# Faults of a real Redis while a real sidecar answers


class Storm:
    """Keys that Redis has as valid, and values that an attacker would write instead."""

    def __init__(self, server: RedisServer, before_revokes: dict[bytes, bytes]) -> None:
        self.server = server
        self._before_revokes = before_revokes

    def kill(self) -> None:
        self.server.kill()

    def pause(self) -> None:
        self.server.pause()

    def flush(self) -> None:
        self.server.flush()

    def restart_empty(self) -> None:
        self.server.kill()
        self.server.start()

    def write_garbage(self) -> None:
        chance = random.Random(1)
        kinds = itertools.cycle([b"", chance.randbytes(31), chance.randbytes(300), b"[" * 20_000])
        with self.server.client() as redis:
            for name, garbage in zip(self._before_revokes, kinds, strict=False):
                redis.set(name, garbage)

    def write_other_types(self) -> None:
        with self.server.client() as redis:
            for name in self._before_revokes:
                redis.delete(name)
                redis.rpush(name, b"1")

    def copy_from_other_keys(self) -> None:
        names = [*self._before_revokes]
        with self.server.client() as redis:
            for name, other in zip(names, names[1:] + names[:1], strict=True):
                redis.set(name, self._before_revokes[other])

    def put_old_values_back(self) -> None:
        with self.server.client() as redis:
            for name, value in self._before_revokes.items():
                redis.set(name, value)


def request_(client: httpx.Client, key: Created, method: str = "GET", path: str = "/verify") -> int:
    """The status that a client sees."""
    headers = {"Authorization": f"Bearer {key.token.reveal()}"}
    return client.request(method, path, headers=headers).status_code


@dataclass
class Keys:
    """Some of them good, some revoked while Redis knew them as good."""

    good: list[Created]
    revoked: list[Created]
    doomed: list[Created]
    manager: Created


async def prepare(store_url: str, server: RedisServer) -> tuple[Keys, Storm]:
    """Other processes have seen all keys, so Redis knows them; then one revoked some."""

    def new_engine() -> Engine:
        return engine_on(store_url, server.url)

    revoker = new_engine()
    keyring = await revoker.keyring()
    keys = await asyncio.gather(*(keyring.create("org", f"key {n}") for n in range(91)))
    with server.client() as redis:
        while redis.dbsize() < len(keys):  # what is still under way when it stops is lost
            engine = new_engine()
            for key in keys:
                assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
            await engine.stop()
        storm = Storm(server, {name: redis.get(name) for name in redis.scan_iter()})
    good, revoked, doomed, (manager,) = keys[:50], keys[50:80], keys[80:90], keys[90:]
    for key in revoked:
        await keyring.delete("org", key.record.id)
    await revoker.stop()
    return Keys(good, revoked, doomed, manager), storm


@pytest.fixture
def storm(
    store_url: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> tuple[Keys, Storm]:
    with monkeypatch.context() as patient:
        extend_redis_timeouts(patient)
        return asyncio.run(prepare(store_url, redis_server))


@pytest.fixture
def serve(store_url: str) -> Iterator[Callable[[str], httpx.Client]]:
    """Serves a new sidecar, as another process, with or without Redis."""
    with contextlib.ExitStack() as stack:

        def serve(redis: str) -> httpx.Client:
            engine = engine_on(store_url, redis)
            url = stack.enter_context(serving(create_app(engine)))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60))

        yield serve


FAULTS = {
    "killed": Storm.kill,
    "paused": Storm.pause,
    "flushed": Storm.flush,
    "restarted empty": Storm.restart_empty,
    "garbage": Storm.write_garbage,
    "lists": Storm.write_other_types,
    "swapped": Storm.copy_from_other_keys,
    "put back": Storm.put_old_values_back,
}


@pytest.mark.service("redis")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_redis_shows(
    storm: tuple[Keys, Storm], serve: Callable[[str], httpx.Client], fault: str
) -> None:
    """No good key is refused, no revoked key is accepted, whatever Redis does.

    Every key is new to the sidecar that answers. What a fault costs is limited by the breaker: see
    the two tests of calls that hang.
    """
    keys, cause = storm
    client = serve(cause.server.url)

    def expect(status: int, key: Created, *call: str) -> None:
        assert request_(client, key, *call) == status

    expect(200, keys.manager)
    hits = keyspace_hits(cause.server)
    for key in keys.good[:10]:
        expect(200, key)
    assert keyspace_hits(cause.server) > hits  # so Redis is really used
    FAULTS[fault](cause)
    for good, revoked in itertools.zip_longest(keys.good[10:], keys.revoked):
        expect(200, good)
        if revoked is not None:
            expect(401, revoked)
    for doomed in keys.doomed:
        expect(200, doomed)
        expect(200, keys.manager, "DELETE", f"/v1/api-keys/{doomed.record.id}")
        expect(401, doomed)


def keyspace_hits(server: RedisServer) -> int:
    with server.client() as redis:
        return int(redis.info("stats")["keyspace_hits"])


@pytest.mark.anyio
async def test_a_call_that_hangs_is_given_up_and_not_repeated() -> None:
    """A Redis that does not answer costs one limit, 50 ms, in each second of the timer."""
    clock, calls = Clock(), 0
    breaker = CircuitBreaker(clock, clock)

    async def hang() -> None:
        nonlocal calls
        calls += 1
        await asyncio.Event().wait()

    for _ in range(100):
        await breaker.attempt("GET", hang)
    assert calls == 1
    clock.tick(1.1)
    for _ in range(100):
        await breaker.attempt("GET", hang)
    assert calls == 2
    assert breaker.component_health().state == "degraded"


@pytest.mark.anyio
async def test_the_twin_without_a_limit_is_caught() -> None:
    """A call that hangs goes on where the breaker sets no limit."""
    breaker = CircuitBreaker(Clock(), timeout_seconds=3600)
    attempt = asyncio.create_task(breaker.attempt("GET", asyncio.Event().wait))
    done, _ = await asyncio.wait({attempt}, timeout=0.2)
    assert not done
    attempt.cancel()


@pytest.mark.service("redis")
def test_a_paused_redis_really_hangs(redis_server: RedisServer) -> None:
    """A check without a budget waits on: the bound above could fail."""
    redis_server.pause()
    with socket.create_connection(("127.0.0.1", redis_server.port), timeout=0.3) as client:
        client.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            client.recv(7)


@pytest.mark.service("redis")
def test_redis_is_used_again_when_it_is_back(
    storm: tuple[Keys, Storm], serve: Callable[[str], httpx.Client]
) -> None:
    """A second after the last failure one check tries Redis again, and it is used again."""
    keys, cause = storm
    client = serve(cause.server.url)
    cause.pause()
    assert request_(client, keys.good[0]) == 200
    cause.server.resume()
    hits = keyspace_hits(cause.server)
    cold = iter(keys.good[1:])

    def one_more_hits() -> bool:
        threading.Event().wait(1.05)  # one attempt for each key: on a busy machine it takes some
        assert request_(client, next(cold)) == 200
        return keyspace_hits(cause.server) > hits

    eventually(one_more_hits)


@pytest.mark.service("redis")
def test_a_herd_of_cold_keys_does_not_break_redis(
    storm: tuple[Keys, Storm], store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """More requests at once than the client has connections: Redis does not count as down."""
    keys, cause = storm
    herd = [*keys.good, *keys.doomed, *keys.revoked]

    async def arrive() -> list[bool]:
        engine = engine_on(store_url, cause.server.url)
        await engine.start()
        decisions = await asyncio.gather(*(engine.authenticate(bearer(key.token)) for key in herd))
        await engine.stop()
        return [isinstance(decision, Allow) for decision in decisions]

    assert asyncio.run(arrive()) == [key not in keys.revoked for key in herd]
    assert "MaxConnectionsError" not in caplog.text


@pytest.mark.anyio
@pytest.mark.service("redis")
async def test_a_call_that_is_given_up_leaves_no_answer_behind(
    redis_server: RedisServer,
) -> None:
    """The next look-up gets its own answer, and not a late one."""
    client, breaker = connect(redis_server.url), CircuitBreaker(lambda: 0.0)
    with redis_server.client() as patient:
        patient.mset({"first": "first", "second": "second"})
    found = 0
    while found < 5:
        redis_server.pause()
        breaker.record_success()  # try at once
        assert await breaker.attempt("GET", lambda: client.get("first")) is None
        redis_server.resume()
        breaker.record_success()
        value = await breaker.attempt("GET", lambda: client.get("second"))
        assert value in (b"second", None)  # on a busy machine it is late as well
        found += value is not None
    await client.aclose()
