"""PostgreSQL as it is run for availability: a primary, its standbys, and a way to them that moves.

Servers are processes on this machine. kill -9 of all processes of one is what a power cut is to the
others; what the kernel has is durable here, so `fsync` stays off.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psycopg

from proxy import Proxy
from tests.support.servers import PostgresServer, eventually

Answer = TypeVar("Answer")
Row = tuple[Any, ...]

DATABASE = "keys"


class Node(PostgresServer):
    """A primary with an empty database `keys`, or a streaming standby of another node.

    Args:
        standby_of: the node that it replicates; None: it is a primary.
        options: settings of the server.
    """

    def __init__(self, standby_of: "Node | None" = None, **options: str) -> None:
        self._source = standby_of
        super().__init__(wal_keep_size="256MB", **options)
        if standby_of is None:
            self.query(f"CREATE DATABASE {DATABASE}", "postgres")
        else:
            eventually(
                lambda: self.query("SELECT status FROM pg_stat_wal_receiver") == [("streaming",)]
            )

    def _create(self) -> None:
        if self._source is None:
            super()._create()
            return
        self._run(
            [self._postgres.replace("bin/postgres", "bin/pg_basebackup"), "-D", str(self._data)]
            + ["-h", "127.0.0.1", "-p", str(self._source.port), "-U", "postgres"]
            + ["-R", "-X", "stream", "-c", "fast", "--no-sync"]
        )

    @property
    def url(self) -> str:
        """Of the store on this node."""
        return store_url(self.port)

    def query(self, sql: str, database: str = DATABASE) -> list[Row]:
        """The rows of a statement, over a connection of its own."""
        with self.connect(database) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def connect(self, database: str = DATABASE) -> "psycopg.Connection[Any]":
        return self._connect(database)

    def configure(self, name: str, value: str) -> None:
        """Change a setting of the running server."""
        self.query(f"ALTER SYSTEM SET {name} = '{value}'")
        self.query("SELECT pg_reload_conf()")

    def wait_for_standby(self) -> None:
        """From now on every commit waits until a standby has it."""
        self.configure("synchronous_standby_names", "*")
        eventually(lambda: ("sync",) in self.query("SELECT sync_state FROM pg_stat_replication"))

    def stop_replication(self) -> None:
        """On a standby: it receives nothing any more, as behind a network that is cut."""
        self.configure("primary_conninfo", "")
        eventually(lambda: not self.query("SELECT 1 FROM pg_stat_wal_receiver"))

    def promote(self) -> None:
        """On a standby: it is a primary when this returns."""
        self.query("SELECT pg_promote(true, 60)")
        eventually(lambda: self.query("SELECT pg_is_in_recovery()") == [(False,)])

    def _answers(self) -> bool:
        if self._process.poll() is not None:  # what kill -9 left was still in its way
            self._launch()
        return super()._answers()

    def shut_down(self) -> None:
        """Stop as an operator does before a switchover: standbys receive everything."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def kill(self) -> None:
        """kill -9 of all its processes, as if the power had failed."""
        self._process.send_signal(signal.SIGSTOP)  # it starts no other
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        pids = children.read_text().split() if self._process.poll() is None else []
        self._process.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self._process.wait()

    # What the store says

    def seq(self) -> int:
        """The number of the newest change."""
        ((seq,),) = self.query("SELECT seq FROM keylatch_meta")
        return int(seq)

    def live_keys(self) -> set[str]:
        """The ids of keys that are not deleted."""
        return {
            row[0] for row in self.query("SELECT id FROM keylatch_keys WHERE deleted_at IS NULL")
        }

    def connections(self) -> int:
        """Server processes of keylatch's connections."""
        counted = self.query(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'keylatch'"
        )
        return int(counted[0][0])


def store_url(port: int, user: str = "postgres") -> str:
    return f"postgresql://{user}@127.0.0.1:{port}/{DATABASE}"


def url_of_all(*nodes: Node) -> str:
    """The store on the one of these nodes that is the primary, as libpq finds it."""
    hosts = ",".join("127.0.0.1" for _ in nodes)
    ports = ",".join(str(node.port) for node in nodes)
    where = f"host={hosts}&port={ports}&target_session_attrs=read-write"
    return f"postgresql://postgres@/{DATABASE}?{where}"


class Way:
    """A TCP address that leads to one node and can be led to another, as a virtual IP address, a
    DNS name or a load balancer is; it can also be long.

    Args:
        port: that it leads to.
        seconds: the round trip takes so much longer.
    """

    def __init__(self, port: int, seconds: float = 0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._proxy = Proxy(port)
        self._run(self._proxy.start())
        self._faults = contextlib.ExitStack()
        if seconds:
            self._do(lambda: self._faults.enter_context(self._proxy.slow(seconds)))

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _do(self, work: Callable[[], object]) -> None:
        async def do() -> None:
            work()

        self._run(do())

    @property
    def url(self) -> str:
        """Of the store at its end."""
        return store_url(self.port)

    @property
    def port(self) -> int:
        """Of its near end."""
        return self._proxy.port

    @property
    def round_trips(self) -> int:
        """Of all clients so far."""
        return self._proxy.round_trips

    def lead_to(self, port: int, *, cut: bool = True) -> None:
        """New connections go there; `cut`: those that exist are reset."""
        self._do(lambda: self._proxy.lead_to(port))
        if cut:
            self._do(self._proxy.reset_connections)

    def close(self) -> None:
        """Reset every connection, and each new one."""
        self._do(lambda: self._faults.enter_context(self._proxy.resetting()))

    def remove(self) -> None:
        self._do(self._faults.close)
        self._run(self._proxy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Removable(Protocol):
    """A server or a way to one."""

    def remove(self) -> None: ...


Made = TypeVar("Made", bound=Removable)


class Machines:
    """Makes the servers of one test, and removes them at its end, the last one first."""

    def __init__(self) -> None:
        self._made = contextlib.ExitStack()

    def add(self, server: Made) -> Made:
        """It is removed with the others."""
        self._made.callback(server.remove)
        return server

    def primary(self, **options: str) -> Node:
        return self.add(Node(None, **options))

    def standby(self, primary: Node, **options: str) -> Node:
        return self.add(Node(primary, **options))

    def pair(self, *, synchronous: bool) -> tuple[Node, Node]:
        """A primary and its standby."""
        primary = self.primary()
        standby = self.standby(primary)
        if synchronous:
            primary.wait_for_standby()
        return primary, standby

    def way(self, node: Node, seconds: float = 0) -> Way:
        return self.add(Way(node.port, seconds))

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()
