"""L2: what is believed of Redis, and what its faults may do. Nothing, but cost a moment."""

import asyncio
import contextlib
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fakeredis
import httpx
import pytest

from conftest import MakeEngine, give_redis_time
from keylatch.caches.breaker import Breaker, connect
from keylatch.caches.cache import Absence
from keylatch.caches.shared_cache import SharedCache, Told
from keylatch.engine import Engine
from keylatch.keyring import Created
from keylatch.model import Allow, Deny, KeyRecord, Reason
from keylatch.settings import Settings
from keylatch.tokens import SECRET_LENGTH, CheckKeys, Token
from keylatch_sidecar.app import create_app
from servers import RedisServer, eventually, serving

pytestmark = pytest.mark.long

PEPPER = b"p" * 32
EPOCH = "e"
KEYS = CheckKeys([b"n" * 32])
Connect = Callable[..., Any]
PATIENT: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5}


def record_of(token: Token) -> KeyRecord:
    return KeyRecord(
        id=token.key_id,
        organization_id="org",
        name="Ü",
        permission="FULL",
        environment="live",
        partial_token=token.partial,
        active=True,
        organization_active=True,
        created_at=1,
        updated_at=1,
    )


def with_another_secret(token: Token) -> Token:
    """A token for the same key that nobody minted."""
    start, _, tail = token.reveal().rpartition("_")
    return Token(f"{start}_{tail[::-1]}")


def bearer(token: Token) -> list[bytes]:
    return [b"Bearer " + token.reveal().encode()]


def shared(client: Any, peppers: list[bytes]) -> SharedCache:
    """The shared cache of one process, which is in no hurry."""
    return SharedCache(client, peppers, Breaker(budget_seconds=5))


async def told(client: Any, new_engine: Callable[[], Engine], keys: list[Created]) -> list[bytes]:
    """The names of the keys' values, once Redis knows them all.

    Telling Redis has a budget of 50 ms, so on a busy machine some of it takes another process.
    """
    while len(names := await client.keys()) < len(keys):
        engine = new_engine()
        for key in keys:
            assert isinstance(await engine.check(bearer(key.token)), Allow)
        await asyncio.sleep(0.02)  # it is told in the background
        await engine.stop()
    return list(names)


@pytest.fixture(params=["fakeredis", pytest.param("redis", marks=pytest.mark.service("redis"))])
def connect_anew(request: pytest.FixtureRequest) -> Connect:
    """Connects to the test's own Redis, as each process does for itself."""
    if request.param == "fakeredis":
        server = fakeredis.FakeServer()
        return lambda **options: fakeredis.FakeAsyncRedis(server=server)
    url = request.getfixturevalue("redis_server").url
    return lambda **options: connect(url, **options)


@pytest.mark.anyio
class TestSharedCacheContract:
    """What holds for the real Redis holds for the fake one, so that other tests may use it."""

    async def test_a_proven_key_is_told_to_the_others(self, connect_anew: Connect) -> None:
        """What one process proves, another one finds: the same record, judged by the token."""
        ours, theirs = shared(connect_anew(), [PEPPER]), shared(connect_anew(), [PEPPER])
        token = KEYS.mint("kl", "live")
        assert await theirs.get(token, EPOCH) is None
        await ours.put(token, record_of(token), 7, EPOCH)
        found = await theirs.get(token, EPOCH)
        assert isinstance(found, Told)
        assert (found.record, found.as_of) == (record_of(token), 7)
        await ours.close()
        await theirs.close()

    async def test_another_secret_is_known_to_be_wrong(self, connect_anew: Connect) -> None:
        """A token with the same id and another secret is refused by what Redis holds."""
        cache, token = shared(connect_anew(), [PEPPER]), KEYS.mint("kl", "live")
        await cache.put(token, record_of(token), 7, EPOCH)
        found = await cache.get(with_another_secret(token), EPOCH)
        assert isinstance(found, Absence)
        assert (found.reason, found.key_id) == (Reason.WRONG_SECRET, token.key_id)
        await cache.close()

    async def test_a_tombstone_is_a_miss(self, connect_anew: Connect) -> None:
        """The revoker overwrites what was told, without knowing the token."""
        cache, token = shared(connect_anew(), [PEPPER]), KEYS.mint("kl", "live")
        await cache.put(token, record_of(token), 7, EPOCH)
        await cache.bury(record_of(token), 8, EPOCH)
        assert await cache.get(token, EPOCH) is None
        await cache.close()

    async def test_another_epoch_is_another_store(self, connect_anew: Connect) -> None:
        """After a restore from a backup nothing is believed that was told before."""
        cache, token = shared(connect_anew(), [PEPPER]), KEYS.mint("kl", "live")
        await cache.put(token, record_of(token), 7, EPOCH)
        assert await cache.get(token, "another") is None
        await cache.close()

    async def test_peppers_rotate(self, connect_anew: Connect) -> None:
        """A value of an older pepper is read on; one of an unknown pepper is a miss."""
        cache, token = shared(connect_anew(), [PEPPER]), KEYS.mint("kl", "live")
        rotated = shared(connect_anew(), [b"q" * 32, PEPPER])
        stranger = shared(connect_anew(), [b"s" * 32])
        await cache.put(token, record_of(token), 7, EPOCH)
        assert isinstance(await rotated.get(token, EPOCH), Told)
        assert await stranger.get(token, EPOCH) is None
        for each in (cache, rotated, stranger):
            await each.close()

    async def test_a_herd_is_answered_together(self, connect_anew: Connect) -> None:
        """Whoever comes while somebody asks is asked for with all the others: each finds his own.

        A value that is no value, one that is missing, and one who left keep nobody waiting.
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
        tokens = [KEYS.mint("kl", "live") for _ in range(300)]
        for number, token in enumerate(tokens):
            await cache.put(token, record_of(token), number, EPOCH)
        await client.delete(f"keylatch:{EPOCH}:{tokens[7].key_id}")
        await client.delete(f"keylatch:{EPOCH}:{tokens[8].key_id}")
        await client.rpush(f"keylatch:{EPOCH}:{tokens[8].key_id}", b"1")
        calls.clear()
        tasks = [asyncio.create_task(cache.get(token, EPOCH)) for token in tokens]
        await asyncio.sleep(0)
        tasks[9].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert calls == ["get", "mget", "mget"]
        for number, (token, known) in enumerate(zip(tokens, found, strict=True)):
            if number in (7, 8):
                assert known is None
            elif number == 9:
                assert isinstance(known, asyncio.CancelledError)
            else:
                assert isinstance(known, Told)
                assert (known.record.id, known.as_of) == (token.key_id, number)
        assert isinstance(await cache.get(tokens[0], EPOCH), Told)
        assert calls[-1] == "get"
        await client.aclose()

    async def test_what_was_written_by_others_is_a_miss(self, connect_anew: Connect) -> None:
        """Any changed byte, any cut, garbage, a value of another key, a list: nothing is believed.

        And none of it keeps the next good value from being found.
        """
        client = connect_anew()
        cache = shared(connect_anew(), [PEPPER])
        token, other = KEYS.mint("kl", "live"), KEYS.mint("kl", "live")
        await cache.put(other, record_of(other), 7, EPOCH)
        others = await client.get(f"keylatch:{EPOCH}:{other.key_id}")
        await cache.put(token, record_of(token), 7, EPOCH)
        name = f"keylatch:{EPOCH}:{token.key_id}"
        good = await client.get(name)
        forgeries = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good))]
        forgeries += [good[:at] for at in range(0, len(good), 16)]
        forgeries += [others, good + b" ", good * 2, b"null", b"\xff" * 1_000_000]
        for forgery in forgeries:
            await client.set(name, forgery)
            assert await cache.get(token, EPOCH) is None
        await client.set(name, good)
        assert isinstance(await cache.get(token, EPOCH), Told)
        await client.delete(name)
        await client.rpush(name, good)
        assert await cache.get(token, EPOCH) is None
        await client.aclose()
        await cache.close()

    async def test_an_old_value_that_is_put_back_is_stale(
        self, connect_anew: Connect, make_engine: MakeEngine
    ) -> None:
        """Whoever restores what Redis held before a revoke brings no key back, in no process."""
        revoker, stranger = make_engine(redis=connect_anew()), make_engine(redis=connect_anew())
        client = connect_anew(**PATIENT)
        await revoker.start()
        await stranger.start()
        keyring = await revoker.keyring()
        created = await keyring.create("org", "key")
        assert isinstance(await revoker.check(bearer(created.token)), Allow)
        (name,) = await told(client, lambda: make_engine(redis=connect_anew()), [created])
        old = await client.get(name)
        await keyring.delete("org", created.record.id)
        await client.set(name, old)

        newcomer = make_engine(redis=connect_anew())
        await newcomer.start()
        for engine in (revoker, stranger, newcomer):
            assert await engine.check(bearer(created.token)) == Deny(Reason.REVOKED)
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
        names = await told(client, lambda: make_engine(redis=connect_anew()), created)
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
    """Keys of which Redis knows the best, and whoever wants to make it tell the worst."""

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


@dataclass(frozen=True)
class Answer:
    """What a client saw."""

    status: int
    seconds: float


def ask(client: httpx.Client, key: Created, method: str = "GET", path: str = "/verify") -> Answer:
    start = time.monotonic()
    headers = {"Authorization": f"Bearer {key.token.reveal()}"}
    response = client.request(method, path, headers=headers)
    return Answer(response.status_code, time.monotonic() - start)


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
        return Engine(Settings.load(store=store_url, redis=server.url, hasher="sha256"))

    revoker = new_engine()
    keyring = await revoker.keyring()
    keys = await asyncio.gather(*(keyring.create("org", f"key {n}") for n in range(91)))
    with server.client() as redis:
        while redis.dbsize() < len(keys):  # what is still under way when it stops is lost
            engine = new_engine()
            for key in keys:
                assert isinstance(await engine.check(bearer(key.token)), Allow)
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
        give_redis_time(patient)
        return asyncio.run(prepare(store_url, redis_server))


@pytest.fixture
def serve(store_url: str) -> Iterator[Callable[[str], httpx.Client]]:
    """Serves a new sidecar, as another process, with or without Redis."""
    with contextlib.ExitStack() as stack:

        def serve(redis: str) -> httpx.Client:
            engine = Engine(Settings.load(store=store_url, redis=redis, hasher="sha256"))
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
    """No good key is refused, no revoked key is accepted, nobody waits for 200 ms because of it.

    Every key is new to the sidecar that answers. Three of them are asked in turn, each with a
    breaker of its own: a busy machine stalls one of them by chance, a missing budget stalls all,
    though the breaker sees to it that each stalls only once. So the quickest of them is judged,
    and beside it one that has no Redis: as long as that takes, it is the machine.
    """
    keys, cause = storm
    slowest = {serve(cause.server.url): 0.0 for _ in range(3)}
    without = serve("")
    machine = 0.0

    def expect(status: int, key: Created, *call: str) -> None:
        nonlocal machine
        for client in slowest:
            answer = ask(client, key, *call)
            assert answer.status == status
            slowest[client] = max(slowest[client], answer.seconds)
        machine = max(machine, ask(without, key, *call).seconds)
        assert min(slowest.values()) < 0.2 + machine

    expect(200, keys.manager)
    hits = keyspace_hits(cause.server)
    for key in keys.good[:10]:
        expect(200, key)
    assert keyspace_hits(cause.server) > hits  # so Redis is really asked
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


@pytest.mark.service("redis")
def test_a_paused_redis_really_hangs(redis_server: RedisServer) -> None:
    """Whoever waits for it without a budget waits on: the bound above could fail."""
    redis_server.pause()
    with socket.create_connection(("127.0.0.1", redis_server.port), timeout=0.3) as client:
        client.sendall(b"PING\r\n")
        with pytest.raises(TimeoutError):
            client.recv(7)


@pytest.mark.service("redis")
def test_redis_is_used_again_when_it_is_back(
    storm: tuple[Keys, Storm], serve: Callable[[str], httpx.Client]
) -> None:
    """A second after the last failure somebody tries, and the good times are back."""
    keys, cause = storm
    client = serve(cause.server.url)
    cause.pause()
    assert ask(client, keys.good[0]).status == 200
    cause.server.resume()
    hits = keyspace_hits(cause.server)
    cold = iter(keys.good[1:])

    def one_more_hits() -> bool:
        threading.Event().wait(1.05)  # one attempt for each key: on a busy machine it takes some
        assert ask(client, next(cold)).status == 200
        return keyspace_hits(cause.server) > hits

    eventually(one_more_hits)


@pytest.mark.service("redis")
def test_a_herd_of_cold_keys_does_not_break_redis(
    storm: tuple[Keys, Storm], store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """More requests at once than the client has connections: Redis is not taken for down."""
    keys, cause = storm
    herd = [*keys.good, *keys.doomed, *keys.revoked]

    async def arrive() -> list[bool]:
        engine = Engine(Settings.load(store=store_url, redis=cause.server.url, hasher="sha256"))
        await engine.start()
        verdicts = await asyncio.gather(*(engine.check(bearer(key.token)) for key in herd))
        await engine.stop()
        return [isinstance(verdict, Allow) for verdict in verdicts]

    assert asyncio.run(arrive()) == [key not in keys.revoked for key in herd]
    assert "MaxConnectionsError" not in caplog.text


@pytest.mark.anyio
@pytest.mark.service("redis")
async def test_a_call_that_is_given_up_leaves_no_answer_behind(
    redis_server: RedisServer,
) -> None:
    """Who asks next finds his own answer, and not a late one."""
    client, breaker = connect(redis_server.url), Breaker(lambda: 0.0)
    with redis_server.client() as patient:
        patient.mset({"first": "first", "second": "second"})
    found = 0
    while found < 5:
        redis_server.pause()
        breaker.succeeded()  # try at once
        assert await breaker.attempt(lambda: client.get("first")) is None
        redis_server.resume()
        breaker.succeeded()
        value = await breaker.attempt(lambda: client.get("second"))
        assert value in (b"second", None)  # on a busy machine it is late as well
        found += value is not None
    await client.aclose()
