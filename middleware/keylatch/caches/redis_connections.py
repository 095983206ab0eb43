"""redis-py's clients, with connections that open in the background.

The law of this file: a command has 50 ms on an open connection; what comes before it (DNS, TCP,
TLS, AUTH, asking the Sentinels, reading the map of a Cluster) has 2 s in a task of its own. A check
waits 25 ms for it at most, and after that no check waits for the same attempt.

All connections of a client share one `SSLContext`: creating it reads the certificates of the
system, which takes 20 to 40 ms, so it is done in a thread. It is created anew after a connection
could not be opened, because a certificate may have been renewed.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Protocol

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff

from keylatch.caches.redis_errors import NotConnected
from keylatch.caches.redis_url import RedisURL

OPEN_SECONDS: Final = 2.0
_WAIT_SECONDS: Final = 0.025
_SENTINEL_SECONDS: Final = 0.5
"""For each Sentinel, so that one that hangs leaves time for the next one."""
_MAX_CONNECTIONS: Final = 8
_MAX_NODE_CONNECTIONS: Final = 32

_LOOK_SECONDS: Final = 0.1
_NODE_SECONDS: Final = 0.25
"""For each node of a Cluster that is asked for the map."""
_WATCH_SECONDS: Final = 5.0

Step = Callable[[], Awaitable[object]]


class Listener(Protocol):
    """A circuit breaker, which learns of what happens in the background."""

    on_failure: Callable[[], None] | None

    @property
    def is_open(self) -> bool:
        """Whether Redis does not answer."""

    def connection_failed(self, error: BaseException) -> None:
        """An attempt has failed."""

    def connection_opened(self) -> None:
        """An attempt has succeeded."""

    def primary_changed(self) -> None:
        """Another server is the primary."""


class Opener:
    """Opens the connections of one client.

    Args:
        listener: learns of each attempt, and connections open in the background; None: callers
            wait up to 2 s and get the error themselves.
    """

    def __init__(self, listener: Listener | None) -> None:
        self.listener = listener
        self._opening: set[asyncio.Task[Any] | None] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._tls: Any = None
        self._tls_lock = asyncio.Lock()

    async def ssl_context(self, unused: Any) -> Any:
        """redis-py's holder of the shared `SSLContext`; `unused`: that of a new connection."""
        async with self._tls_lock:
            if self._tls is None:
                await asyncio.to_thread(unused.get)
                self._tls = unused
            return self._tls

    def is_opening(self) -> bool:
        """Whether the current task already runs an attempt; steps within it need no other task."""
        return asyncio.current_task() in self._opening

    def start(self, step: Step) -> asyncio.Task[None]:
        """Run an attempt in the background."""
        return self.run(self._report(step), "keylatch-redis-open")

    def run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task that `cancel` ends."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _report(self, step: Step) -> None:
        try:
            await self.open(step)
        except Exception as error:  # noqa: BLE001 - every error of redis-py means "not connected"
            if self.listener is not None:
                self.listener.connection_failed(error)
        else:
            if self.listener is not None:
                self.listener.connection_opened()

    async def open(self, step: Step) -> None:
        """Run an attempt of at most two seconds."""
        task = asyncio.current_task()
        self._opening.add(task)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await step()
        except BaseException:
            self._tls = None
            raise
        finally:
            self._opening.discard(task)

    async def cancel(self) -> None:
        """End all attempts in the background."""
        tasks = self._background - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Watch:
    """Looks for another primary while the one that is known does not answer.

    Without it a caller would find the new primary when the breaker lets it try, up to a second
    later, or three if an attempt to open a connection to the old one hangs.

    Args:
        opener: its attempts are given up when there is another primary.
        listener: learns of it.
        has_changed: asks the Sentinels or the nodes.
    """

    def __init__(
        self, opener: Opener, listener: Listener, has_changed: Callable[[], Awaitable[bool]]
    ) -> None:
        self._opener = opener
        self._listener = listener
        self._has_changed = has_changed
        self._until = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for five seconds, which is longer than callers wait until their next failure."""
        self._until = asyncio.get_running_loop().time() + _WATCH_SECONDS
        if self._task is None or self._task.done():
            self._task = self._opener.run(self._look(), "keylatch-redis-watch")

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while self._listener.is_open and loop.time() < self._until:
            await asyncio.sleep(_LOOK_SECONDS)
            with contextlib.suppress(Exception):  # the next look may succeed
                await self._opener.open(self._step)

    async def _step(self) -> None:
        if await self._has_changed():
            await self._opener.cancel()
            self._listener.primary_changed()


class _Attempts:
    """Opens one connection, or one Cluster: one attempt at a time."""

    __slots__ = ("_began", "_opener", "task")

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self.task: asyncio.Task[None] | None = None
        self._began = 0.0

    async def run(self, step: Step, is_open: Callable[[], bool]) -> None:
        """Return when it is open.

        Raises:
            NotConnected: it is not, and an attempt goes on or has failed.
        """
        opener = self._opener
        if opener.is_opening():
            await step()
        elif opener.listener is None:
            await opener.open(step)
        else:
            await self._wait(step)
            if self.task is not None or not is_open():
                raise NotConnected

    async def _wait(self, step: Step) -> None:
        loop = asyncio.get_running_loop()
        if self.task is None:
            self.task, self._began = self._opener.start(step), loop.time()
            self.task.add_done_callback(self._done)
        remaining = self._began + _WAIT_SECONDS - loop.time()
        if remaining <= 0:
            return
        try:
            await asyncio.wait({self.task}, timeout=remaining)
        except asyncio.CancelledError:  # the caller's time is over: that is no failure of Redis
            raise asyncio.CancelledError from NotConnected()

    def _done(self, task: asyncio.Task[None]) -> None:
        self.task = None


class _OpensInBackground:
    """A connection of redis-py that an `Opener` opens."""

    def __init__(self, *, opener: Opener, **options: Any) -> None:
        self._opener = opener
        self._attempts = _Attempts(opener)
        super().__init__(**options)

    @property
    def is_connected(self) -> bool:
        """Whether commands may be sent: not while another task opens it."""
        if self._attempts.task is not None and not self._opener.is_opening():
            return False
        return bool(super().is_connected)  # type: ignore[misc]

    async def connect(self) -> None:
        if not self.is_connected:
            await self._attempts.run(super().connect, self._is_open)  # type: ignore[misc]

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        if not self.is_connected:
            step = partial(super().connect_check_health, *args, **options)  # type: ignore[misc]
            await self._attempts.run(step, self._is_open)

    def _is_open(self) -> bool:
        return self.is_connected

    async def _connect(self) -> None:
        own_context = getattr(self, "ssl_context", None)
        if own_context is not None:
            self.ssl_context = await self._opener.ssl_context(own_context)
        await super()._connect()  # type: ignore[misc]


class _Connection(_OpensInBackground, Connection):
    """TCP."""


class _TLSConnection(_OpensInBackground, SSLConnection):
    """TCP and TLS."""


class _UnixConnection(_OpensInBackground, UnixDomainSocketConnection):
    """A Unix socket."""


class _SentinelConnection(_OpensInBackground, SentinelManagedConnection):
    """To the primary that the Sentinels name."""


class _SentinelTLSConnection(_OpensInBackground, SentinelManagedSSLConnection):
    """The same with TLS."""


class _Pool(BlockingConnectionPool):
    """Many cold keys at once wait for a connection; redis-py's other pool would raise an error."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        if inuse_connections:  # it is closed
            await self.connection_kwargs["opener"].cancel()
        await super().disconnect(inuse_connections)


class _SentinelPool(SentinelConnectionPool, _Pool):
    """To the primary; asks the Sentinels for its address at each connect."""

    async def has_changed(self) -> bool:
        """Whether the primary is another one than at the last connect."""
        last = self.master_address
        now = await self.get_master_address()  # type: ignore[no-untyped-call]
        return bool(now != last)

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


class _Cluster(RedisCluster):
    """A Cluster, whose map is read in the background."""

    def __init__(self, url: RedisURL, opener: Opener, timeout: float, options: Any) -> None:
        nodes = [ClusterNode(host, port) for host, port in url.hosts]
        super().__init__(startup_nodes=nodes, ssl=url.uses_tls, **options)
        self._attempts = _Attempts(opener)
        self._opener = opener
        self._timeout = timeout
        kind = _TLSConnection if url.uses_tls else _Connection
        self.connection_kwargs.update(connection_class=kind, opener=opener)  # of nodes to come
        for node in self.nodes_manager.startup_nodes.values():
            node.connection_class = kind
            node.connection_kwargs["opener"] = opener

    async def initialize(self, *args: Any, **options: Any) -> "RedisCluster":
        if self._initialize:
            step = partial(super().initialize, *args, **options)
            await self._attempts.run(step, lambda: not self._initialize)
        return self

    async def publish(self, channel: Any, message: Any, **options: Any) -> int:
        """Send a message; redis-py 6.2 has no such method for a Cluster."""
        return int(await self.execute_command("PUBLISH", channel, message, **options))

    def read_map_again(self) -> None:
        """Before the next command: a node may have failed."""
        self._initialize = True

    async def has_changed(self) -> bool:
        """Whether a node knows other primaries than the map; then the map is read again, but not
        from nodes that do not answer or are no primary any more."""
        manager = self.nodes_manager
        nodes = {**manager.startup_nodes, **manager.nodes_cache}
        known = {node.name for node in self.get_primaries()}
        for name in random.sample(list(nodes), len(nodes)):
            try:
                async with asyncio.timeout(_NODE_SECONDS):
                    slots = await nodes[name].execute_command("CLUSTER SLOTS")
            except Exception:  # noqa: BLE001 - the next one may answer
                del nodes[name]
                continue
            primaries = {_node_name(slot[2], nodes[name]) for slot in slots}
            if primaries == known:
                return False
            for gone in known - primaries - {name}:
                nodes.pop(gone, None)
            await self._opener.cancel()  # an attempt that hangs holds redis-py's lock
            for lost in manager.startup_nodes.keys() - nodes.keys():
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(_NODE_SECONDS):
                        await manager.startup_nodes.pop(lost).disconnect()
            if not manager.startup_nodes:
                manager.startup_nodes.update(nodes)
            self.read_map_again()
            await self.initialize()
            return True
        return False

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await super().execute_command(*args, **options)
        except asyncio.CancelledError:
            if loop.time() - began >= self._timeout / 2:  # the node does not answer
                self.read_map_again()
            raise

    async def aclose(self) -> None:
        await self._opener.cancel()
        await super().aclose()
        self._initialize = True
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


def _node_name(address: Any, node: ClusterNode) -> str:
    """redis-py's name of a node in a reply; a node without a known address gives none."""
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    return f"{host or node.host}:{address[1]}"


class ClusterSubscriber:
    """Subscriptions to one node of a Cluster: PUBLISH reaches all of them.

    Each subscription goes to another node, so that it is back when its node has failed. redis-py's
    own, which newer versions have, stays with the node that the name of the channel maps to.
    """

    def __init__(self, cluster: "_Cluster", options: Any) -> None:
        self._cluster = cluster
        self._options = options

    def pubsub(self, **options: Any) -> Any:
        known = self._cluster.get_nodes() or list(
            self._cluster.nodes_manager.startup_nodes.values()
        )
        node = random.choice(known)  # noqa: S311 - spreads load
        pool = ConnectionPool(host=node.host, port=node.port, **self._options)
        return Redis.from_pool(pool).pubsub(**options)

    async def aclose(self) -> None:
        """A subscription closes its own connection."""


def client(
    url: RedisURL, timeout: float, listener: Listener | None, options: dict[str, Any]
) -> Any:
    """A client for the commands.

    Args:
        url: where Redis is.
        timeout: seconds that a caller waits for a free connection.
        listener: see `Opener`; of Sentinels or a Cluster it also learns of another primary.
        options: of a redis-py connection.
    """
    opener = Opener(listener)
    options = {**_defaults(), **options, **url.options}
    if url.shape == "cluster":
        options = {"max_connections": _MAX_NODE_CONNECTIONS, **options}
        cluster = _Cluster(url, opener, timeout, options)
        if listener is not None:
            watch = Watch(opener, listener, cluster.has_changed)

            def failed() -> None:
                cluster.read_map_again()
                watch.start()

            listener.on_failure = failed
        return cluster
    options = {"max_connections": _MAX_CONNECTIONS, "timeout": timeout, **options, "opener": opener}
    if url.shape == "sentinel":
        made = _sentinel_client(url, options)
        if listener is not None:
            listener.on_failure = Watch(opener, listener, made.connection_pool.has_changed).start
        return made
    options["connection_class"] = _connection_class(options.pop("connection_class", None))
    return Redis.from_pool(_Pool(**options))


def subscriber(url: RedisURL, commands: Any, options: dict[str, Any]) -> Any:
    """A client for subscriptions: it waits without a limit for messages.

    Args:
        url: where Redis is.
        commands: the client for commands, which knows the nodes of a Cluster.
        options: of a redis-py connection.
    """
    options = {**options, "socket_timeout": None}
    if url.shape != "cluster":
        return client(url, OPEN_SECONDS, None, options)
    options = {**_defaults(), **url.options, **options}
    options["connection_class"] = _TLSConnection if url.uses_tls else _Connection
    return ClusterSubscriber(commands, {**options, "opener": Opener(None)})


def _defaults() -> dict[str, Any]:
    # The caller limits each command; limits of redis-py's own would take a task for each write.
    return {
        "socket_timeout": None,
        "socket_connect_timeout": OPEN_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }


def _connection_class(parsed: Any) -> Any:
    kinds = {SSLConnection: _TLSConnection, UnixDomainSocketConnection: _UnixConnection}
    return kinds.get(parsed, _Connection)


def _sentinel_client(url: RedisURL, options: dict[str, Any]) -> Any:
    # Sentinel() would make clients that retry for seconds and have an SSLContext for each.
    manager = Sentinel([])  # type: ignore[no-untyped-call]
    shared = {
        name: value
        for name, value in options.items()
        if name.startswith("ssl_") or name in ("retry", "protocol")
    }
    sentinel_options = {
        **shared,
        "socket_timeout": _SENTINEL_SECONDS,
        "socket_connect_timeout": _SENTINEL_SECONDS,
        **url.sentinel_options,
        "connection_class": _TLSConnection if url.uses_tls else _Connection,
        "opener": options["opener"],
    }
    manager.sentinels = [
        Redis.from_pool(ConnectionPool(host=host, port=port, **sentinel_options))
        for host, port in url.hosts
    ]
    kind = _SentinelTLSConnection if url.uses_tls else _SentinelConnection
    pool = _SentinelPool(  # type: ignore[no-untyped-call]
        url.service, manager, connection_class=kind, **options
    )
    return Redis.from_pool(pool)


def check(url: RedisURL) -> None:
    """Raise TypeError or ValueError for options that redis-py does not know; opens nothing."""
    made = client(url, OPEN_SECONDS, None, {})
    if url.shape != "cluster":
        made.connection_pool.make_connection()
