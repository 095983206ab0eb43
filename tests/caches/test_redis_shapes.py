"""Redis with Sentinels, as a Cluster, with TLS, with limited rights, and full: what keylatch does
with it, and what it reports."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

from keylatch.caches import redis_errors
from keylatch.caches.redis_client import (
    CircuitBreaker,
    connect,
    connect_subscriber,
    explain,
    name_in_redis,
)
from keylatch.caches.redis_connections import Opener, Watch
from keylatch.revocation.notices import Notice, Signer
from keylatch.revocation.notifier import RedisNotifier
from tests.support.clock import Clock
from tests.support.redis_servers import ClusterDeployment, SentinelDeployment, TLSServer
from tests.support.servers import RedisServer

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
PEPPER = b"p" * 32
NAME = name_in_redis("epoch", "name")
CHANNEL = name_in_redis("epoch", "invalidations")
SECONDS = 60
"""For what takes a few seconds on an idle machine."""


async def refuse(error: Exception) -> None:
    raise error


# What is counted and logged


async def test_each_kind_of_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """And again after a recovery; each is counted, by the first word of the reply."""
    clock = Clock()
    breaker = CircuitBreaker(clock, clock)

    async def succeed() -> int:
        return 1

    for _ in range(10):
        await breaker.attempt("SET", lambda: refuse(OutOfMemoryError("used memory > 'maxmemory'")))
        await breaker.attempt("MGET", lambda: refuse(NoPermissionError("no 'mget' for hunter2")))
        assert await breaker.attempt("GET", succeed) == 1
    health = breaker.component_health()
    assert (health.state, health.reason) == ("degraded", "Redis refuses commands")
    assert breaker.refusals.counts() | {"OOM": 0, "NOPERM": 0} == dict.fromkeys(
        breaker.refusals.counts(), 0
    )
    assert breaker.refusals.counts()["OOM"] == breaker.refusals.counts()["NOPERM"] == 10
    assert [re.sub(".*: ([A-Z]+: .*);.*", r"\1", line) for line in caplog.messages] == [
        "OOM: it refuses SET",
        "NOPERM: it refuses MGET",
    ]
    clock.tick(6)
    await breaker.attempt("SET", succeed)
    assert breaker.component_health().state == "degraded", "MGET was not tried again"
    await breaker.attempt("MGET", succeed)
    assert breaker.component_health().state == "ok"
    assert len([line for line in caplog.messages if "again" in line]) == 2
    await breaker.attempt("SET", lambda: refuse(OutOfMemoryError("used memory > 'maxmemory'")))
    assert len([line for line in caplog.messages if "refuses SET" in line]) == 2
    assert "hunter2" not in caplog.text, "a reply can repeat arguments"


async def test_the_labels_of_refusals_are_few() -> None:
    """A server that replies with ever new words adds no series to the metrics."""
    breaker = CircuitBreaker(Clock())
    known = breaker.refusals.counts().keys()
    for number in range(100):
        reply = ResponseError(f"WORD{number} text")
        await breaker.attempt("GET", lambda reply=reply: refuse(reply))  # type: ignore[misc]
    assert breaker.refusals.counts().keys() == known
    assert breaker.refusals.counts()["other"] == 100


async def test_a_refused_command_does_not_open_the_breaker() -> None:
    """Redis answers, so other commands go on; a wrong password stops them for a second."""
    breaker = CircuitBreaker(Clock())
    await breaker.attempt("SET", lambda: refuse(NoPermissionError("no")))
    assert not breaker.is_open
    breaker.connection_failed(NoPermissionError("no"))
    assert breaker.is_open


# Connections


class SlowContext:
    """redis-py's holder of an SSLContext: notes where it is built."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def get(self) -> None:
        self.threads.append(threading.current_thread())


async def test_one_ssl_context_serves_all_connections() -> None:
    """It is built once, in another thread, and again after a connection could not be opened."""
    opener, contexts = Opener(None), [SlowContext() for _ in range(3)]
    first = await asyncio.gather(*(opener.ssl_context(each) for each in contexts[:2]))
    assert first == [contexts[0], contexts[0]]
    assert contexts[1].threads == []
    assert contexts[0].threads != [threading.current_thread()]
    with pytest.raises(OSError, match="refused"):
        await opener.open(lambda: refuse(OSError("refused")))
    assert await opener.ssl_context(contexts[2]) is contexts[2]


@pytest.mark.service("redis")
@pytest.mark.long
async def test_a_slow_connect_is_no_failure(redis_server: RedisServer) -> None:
    """The connection opens in the background: calls meanwhile are misses, and Redis does not count
    as down."""
    breaker = CircuitBreaker(timeout_seconds=SECONDS)
    client = connect(redis_server.url, breaker)
    redis_server.pause()  # the kernel accepts, nothing replies to HELLO
    assert await breaker.attempt("GET", lambda: client.get(NAME)) is None
    assert await breaker.attempt("GET", lambda: client.get(NAME)) is None
    assert breaker.health.is_healthy
    redis_server.resume()
    await eventually(lambda: breaker.attempt("SET", lambda: client.set(NAME, b"1")))
    assert breaker.health.failures.value <= 1  # on a busy machine two seconds may pass
    await client.aclose()


@pytest.mark.service("redis")
@pytest.mark.long
async def test_time_spent_on_connecting_is_no_failure(redis_server: RedisServer) -> None:
    """A limit that is over while the connection opens is no sign that Redis does not answer."""
    breaker = CircuitBreaker(timeout_seconds=0.001)
    client = connect(redis_server.url, breaker)
    redis_server.pause()
    assert await breaker.attempt("GET", lambda: client.get(NAME)) is None
    assert breaker.health.failures.value == 0
    await client.aclose()


async def eventually(attempt: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await attempt():  # noqa: ASYNC110 - another program brings it about
            await asyncio.sleep(0.02)


@pytest.mark.service("redis")
@pytest.mark.long
class TestTLS:
    """With an authority of its own, and a certificate for `localhost`."""

    async def test_commands_and_notices_go_through_tls(self, tmp_path: Path) -> None:
        """The server has no other port that the URL names."""
        server = TLSServer(tmp_path)
        try:
            async with processes(server.url) as (one, other):
                await expect_notices(one, other)
                await eventually(lambda: one.put(b"1"))
                await eventually(lambda: other.get(b"1"))
        finally:
            server.kill()

    @pytest.mark.parametrize("fault", ["authority", "name"])
    async def test_the_reason_is_logged(
        self, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An unknown authority, and another name: no exception is left to asyncio's handler."""
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: unhandled.append(context)
        )
        server = TLSServer(tmp_path)
        url = server.url.partition("?")[0]
        if fault == "name":
            url = server.url.replace("localhost", "127.0.0.1")
        try:
            async with processes(url) as (one, _):

                async def has_failed() -> bool:
                    await one.put(b"1")
                    return "(continuing without it): certificate verify" in caplog.text

                await eventually(has_failed)
                await eventually(lambda: one.is_deaf())
        finally:
            server.kill()
        assert "certificate verify failed" in caplog.text
        assert unhandled == []


# Rights


def documented_rights() -> str:
    """The line of ACL SETUSER in docs/redis.md, after the password."""
    found = re.search(
        r"ACL SETUSER keylatch on >PASSWORD (.*)", (ROOT / "docs/redis.md").read_text()
    )
    assert found is not None
    return found[1]


def set_user(server: RedisServer, rights: str) -> str:
    """The URL of a user with these rights."""
    with server.client() as admin:
        command = ["ACL", "SETUSER", "user", "reset", "on", ">word", *rights.split()]
        admin.execute_command(*command)
    return server.url.replace("redis://", "redis://user:word@")


@pytest.mark.service("redis")
@pytest.mark.long
class TestRights:
    """A user of Redis that may do less than everything."""

    async def test_the_documented_rights_are_enough(self, redis_server: RedisServer) -> None:
        """Nothing that keylatch sends is denied."""
        async with processes(set_user(redis_server, documented_rights())) as (one, other):
            await expect_notices(one, other)
            await eventually(lambda: one.put(b"1"))
            await eventually(lambda: other.get(b"1"))
            await eventually(lambda: other.mget(b"1"))
            assert one.breaker.component_health().state == "ok"
        with redis_server.client() as admin:
            denied = admin.acl_log()
        assert [each["object"] for each in denied if each["object"] != "client|setinfo"] == []

    @pytest.mark.parametrize("command", ["get", "mget", "set", "publish"])
    async def test_a_missing_right_is_reported(
        self, redis_server: RedisServer, command: str
    ) -> None:
        """Each of them is needed: without it the component is degraded."""
        rights = documented_rights().replace(f" +{command}", "")
        async with processes(set_user(redis_server, rights)) as (one, _):

            async def is_reported() -> bool:
                await one.put(b"1")
                await one.get(b"1")
                await one.mget(b"1")
                await one.notifier.publish(None)
                return one.breaker.refusals.counts()["NOPERM"] >= 1

            await eventually(is_reported)
            assert one.breaker.component_health().state == "degraded"

    @pytest.mark.parametrize("right", [" &keylatch:*", " +subscribe"])
    async def test_a_process_that_may_not_subscribe_is_reported(
        self, redis_server: RedisServer, right: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A new user of Redis 7 may use no channel: logged once, though it is tried each second."""
        rights = documented_rights().replace(right, "")
        async with processes(set_user(redis_server, rights)) as (one, other):
            await eventually(lambda: one.is_deaf())
            await eventually(lambda: other.is_deaf())
        said = [line for line in caplog.messages if "cannot receive notices from Redis" in line]
        assert len(said) == 2, "one line for each process"
        assert all("NOPERM" in line for line in said)

    async def test_a_wrong_password_is_reported(self, redis_server: RedisServer) -> None:
        """As what Redis replied, and not as a Redis that does not answer."""
        set_user(redis_server, documented_rights())
        url = redis_server.url.replace("redis://", "redis://user:wrong@")
        async with processes(url) as (one, _):

            async def is_reported() -> bool:
                await one.put(b"1")
                return one.breaker.refusals.counts()["WRONGPASS"] >= 1

            await eventually(is_reported)
            assert one.breaker.component_health().reason == "Redis refuses commands"


def more_rights(where: str) -> str:
    """What docs/redis.md has for a shape: a row of its table, or the rights at the Sentinels."""
    text = (ROOT / "docs/redis.md").read_text()
    pattern = r"needs `([^`]*)`" if where == "At the Sentinels" else r"\| `([^`]*)` \| " + where
    found = re.search(pattern, text[text.index("ACL SETUSER") :])
    assert found is not None
    return found[1].replace("\\|", "|")


def denied(ports: Iterable[int]) -> list[str]:
    """What servers have denied, without what the page calls optional."""
    found: list[str] = []
    for port in ports:
        with redis.Redis(port=port, socket_timeout=5) as admin:
            found += [each["object"] for each in admin.acl_log()]
    return [each for each in found if each != "client|setinfo"]


def set_user_at(ports: Iterable[int], name: str, rights: str) -> None:
    for port in ports:
        with redis.Redis(port=port, socket_timeout=5) as admin:
            command = ["ACL", "SETUSER", name, "reset", "on", ">word", *rights.split()]
            admin.execute_command(*command)


@pytest.mark.service("redis")
@pytest.mark.long
class TestRightsWithTLS:
    """The documented rights, at each server of a shape, through TLS alone."""

    async def test_sentinels_and_their_servers(self, tmp_path: Path) -> None:
        """The Sentinels have another user than the servers that they watch."""
        deployment = SentinelDeployment(tmp_path, tls=True)
        try:
            servers = [each.port for each in deployment.servers]
            set_user_at(servers, "user", documented_rights())
            set_user_at(deployment.ports, "watcher", more_rights("At the Sentinels"))
            url = deployment.url.replace("://", "://user:word@")
            await use(f"{url}&sentinel_username=watcher&sentinel_password=word")
            assert denied(servers + deployment.ports) == []
        finally:
            deployment.kill()

    async def test_the_nodes_of_a_cluster(self, tmp_path: Path) -> None:
        """A process starts with two nodes, and finds the others by their addresses."""
        cluster = ClusterDeployment(tmp_path, tls=True)
        try:
            nodes = [each.port for each in cluster.nodes]
            set_user_at(nodes, "user", f"{documented_rights()} {more_rights('Cluster')}")
            await use(cluster.url.replace("://", "://user:word@"))
            assert denied(nodes) == []
        finally:
            cluster.kill()

    async def test_the_twin_with_fewer_rights_is_denied(self, tmp_path: Path) -> None:
        """What the table adds for a Cluster is needed, and the servers say so."""
        cluster = ClusterDeployment(tmp_path, tls=True)
        try:
            nodes = [each.port for each in cluster.nodes]
            set_user_at(nodes, "user", documented_rights())
            async with processes(cluster.url.replace("://", "://user:word@")) as (one, _):

                async def is_denied() -> bool:
                    await one.put(b"1")
                    return "cluster|slots" in denied(nodes)

                await eventually(is_denied)
        finally:
            cluster.kill()


async def use(url: str) -> None:
    """All that two processes do with Redis."""
    async with processes(url) as (one, other):
        await expect_notices(one, other)
        await eventually(lambda: one.put(b"1"))
        await eventually(lambda: other.get(b"1"))
        await eventually(lambda: other.mget(b"1"))


@pytest.mark.service("redis")
@pytest.mark.long
async def test_a_full_redis_is_reported(redis_server: RedisServer) -> None:
    """With `noeviction` it stores nothing new; reads go on."""
    with redis_server.client() as admin:
        admin.config_set("maxmemory", "1")
        admin.config_set("maxmemory-policy", "noeviction")
    async with processes(redis_server.url) as (one, _):

        async def is_reported() -> bool:
            await one.put(b"1")
            return one.breaker.refusals.counts()["OOM"] >= 1

        await eventually(is_reported)
        assert one.breaker.component_health().state == "degraded"
        assert not one.breaker.is_open


@pytest.mark.service("redis")
@pytest.mark.long
async def test_a_node_of_a_cluster_as_one_server_is_reported(tmp_path: Path) -> None:
    """With `redis://`, other nodes' names are MOVED."""
    cluster = ClusterDeployment(tmp_path)
    try:
        owner = cluster.owner_of(NAME)
        node = next(each for each in cluster.nodes if each is not owner)
        async with processes(node.url) as (one, _):

            async def is_reported() -> bool:
                await one.put(b"1")
                return one.breaker.refusals.counts()["MOVED"] >= 1

            await eventually(is_reported)
    finally:
        cluster.kill()


# Failover


def test_another_primary_is_tried_at_once() -> None:
    """By one caller; the twin that does not know of it waits for a second."""
    clock = Clock()
    breaker, twin = CircuitBreaker(clock, clock), CircuitBreaker(clock, clock)
    for each in (breaker, twin):
        each.record_failure()
    breaker.primary_changed()
    assert [breaker.try_acquire(), breaker.try_acquire()] == [True, False]
    assert not twin.try_acquire()


async def test_another_primary_ends_attempts_to_reach_the_old_one() -> None:
    """It is looked for while Redis does not answer, whatever a look raises; then the attempt that
    hangs is given up. The twin whose primary is the same keeps its attempt."""
    for looks in ([OSError(), False, True], [False] * 3):
        breaker = CircuitBreaker()
        opener, found = Opener(breaker), asyncio.Event()
        breaker.on_new_primary = found.set
        left, looked = list(looks), asyncio.Event()

        async def look(left: list[Any] = left, looked: asyncio.Event = looked) -> bool:
            if not left:
                looked.set()
                return False
            found = left.pop(0)
            if isinstance(found, Exception):
                raise found
            return bool(found)

        hanging = opener.start(asyncio.Event().wait)
        breaker.on_failure = Watch(opener, breaker, look).start
        breaker.record_failure()
        async with asyncio.timeout(SECONDS):
            await (found if looks[-1] else looked).wait()
        assert hanging.cancelled() == looks[-1] == found.is_set()
        await opener.cancel()


class SilentSubscriptions:
    """A client whose subscriptions receive nothing, as from a host that is gone."""

    def __init__(self) -> None:
        self.subscribed: asyncio.Queue[None] = asyncio.Queue()

    @asynccontextmanager
    async def pubsub(self) -> AsyncIterator["SilentSubscriptions"]:
        yield self

    async def subscribe(self, channel: str) -> None:
        self.subscribed.put_nowait(None)

    async def get_message(self, timeout: float) -> None:
        await asyncio.Event().wait()


async def test_subscriptions_move_to_another_primary() -> None:
    """At once; the twin that gets no notification waits for the host that is gone."""
    breaker, silent = CircuitBreaker(), SilentSubscriptions()
    notifier = RedisNotifier(None, silent, breaker, CHANNEL, Signer([PEPPER]))
    task = asyncio.create_task(notifier.subscribe(lambda notice: None))
    async with asyncio.timeout(SECONDS):
        await silent.subscribed.get()
        await asyncio.sleep(0)
        assert silent.subscribed.empty()
        breaker.primary_changed()
        await silent.subscribed.get()
    assert notifier.health.is_healthy
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.service("redis")
@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill", "pause"])
async def test_sentinel_leads_to_the_new_primary(tmp_path: Path, fault: str) -> None:
    """After the primary was lost, values and notices go through the new one, in each process."""
    deployment = SentinelDeployment(tmp_path)
    try:
        async with processes(deployment.url) as (one, other):
            await expect_notices(one, other)
            old = deployment.primary()
            getattr(old, fault)()
            await wait_for_change(lambda: deployment.primary() is not old)
            await eventually(lambda: one.put(b"2"))
            await eventually(lambda: other.get(b"2"))
            await expect_notices(one, other)
    finally:
        deployment.kill()


@pytest.mark.service("redis")
@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill", "pause"])
async def test_a_cluster_leads_to_the_new_primary(tmp_path: Path, fault: str) -> None:
    """The same for the node of a Cluster that holds the names of the store."""
    cluster = ClusterDeployment(tmp_path, replicas=1)
    try:
        async with processes(cluster.url) as (one, other):
            await eventually(lambda: one.put(b"1"))
            await expect_notices(one, other)
            old = cluster.owner_of(NAME)
            getattr(old, fault)()
            await eventually(lambda: one.put(b"2"))
            await eventually(lambda: other.get(b"2"))
            await expect_notices(one, other)
    finally:
        cluster.kill()


async def wait_for_change(has_changed: Callable[[], bool]) -> None:
    async def attempt() -> bool:
        return await asyncio.to_thread(has_changed)

    await eventually(attempt)


class Process:
    """What one process does with Redis."""

    def __init__(self, url: str) -> None:
        self.breaker = CircuitBreaker()
        self.client = connect(url, self.breaker)
        subscriber = connect_subscriber(url, self.client)
        signer = Signer([PEPPER])
        self.notifier = RedisNotifier(self.client, subscriber, self.breaker, CHANNEL, signer)
        self.received = 0

    def on_notice(self, notice: Notice | None) -> None:
        self.received += 1

    async def put(self, value: bytes) -> bool:
        return bool(await self.breaker.attempt("SET", lambda: self.client.set(NAME, value)))

    async def get(self, value: bytes) -> bool:
        return await self.breaker.attempt("GET", lambda: self.client.get(NAME)) == value

    async def mget(self, value: bytes) -> bool:
        names = [NAME, name_in_redis("epoch", "no such name")]
        found = await self.breaker.attempt("MGET", lambda: self.client.mget(names))
        return found == [value, None]

    async def is_deaf(self) -> bool:
        return not self.notifier.health.is_healthy


@asynccontextmanager
async def processes(url: str) -> AsyncIterator[tuple[Process, Process]]:
    """Two processes that listen for notices."""
    both = Process(url), Process(url)
    tasks = [asyncio.create_task(each.notifier.subscribe(each.on_notice)) for each in both]
    try:
        yield both
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in both:
            await each.notifier.close()
            await each.client.aclose()


async def expect_notices(one: Process, other: Process) -> None:
    """Return when each has received what the other has published."""
    for sender, receiver in ((one, other), (other, one)):
        before = receiver.received

        async def is_received(
            sender: Process = sender, receiver: Process = receiver, before: int = before
        ) -> bool:
            await sender.notifier.publish(None)
            await asyncio.sleep(0.02)
            return receiver.received > before + 1  # one may be for a connect

        await eventually(is_received)


# What an error means


async def test_an_error_is_explained_without_its_text() -> None:
    """The reply of a server, the reason of a TLS failure, an error of the system."""
    refused = ConnectionRefusedError(111, "Connection refused")
    assert explain(refused)[0] == "Connection refused"
    assert explain(NoPermissionError("hunter2"))[0] == "NOPERM"
    assert explain(ResponseError("MISCONF hunter2"))[0] == "MISCONF"
    assert "hunter2" not in "".join(explain(ResponseError("hunter2 hunter2")))
    assert explain(TimeoutError())[0] == "no answer in time"
    assert explain(MasterNotFoundError("hunter2"))[0].startswith("no Sentinel knows")
    assert redis_errors.refusal(ResponseError("")) == ""
