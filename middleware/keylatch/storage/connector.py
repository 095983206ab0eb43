"""Opens connections to PostgreSQL, and finds out what is at the other end: a server or a pooler.

The law of this file: a connection is given out only if the server can keep what the store promises,
and nothing is set on a session. Behind a pooler, sessions belong to other programs as well.

A pooler shows itself: the process id that libpq received is not that of the server's process. In
transaction mode it gives a client another session for every transaction, so LISTEN is lost and
named statements are not found. Two clients whose transactions overlap find that out.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.rows import class_row, scalar_row

from keylatch.errors import StoreUnavailable
from keylatch.storage.hosts import Hosts
from keylatch.storage.postgresql_dialect import PRIMARY_HINT

PsycopgConnection = psycopg.AsyncConnection[Any]

_CHECKED_TABLES: Final = [
    *("keylatch_keys", "keylatch_organizations", "keylatch_meta", "keylatch_invalidations"),
    *("keylatch_members", "keylatch_secrets", "keylatch_version"),
]
_FACTS: Final = """
SELECT pg_backend_pid() AS pid, pg_is_in_recovery() AS is_standby, version() AS version,
    current_setting('synchronous_standby_names') <> '' AS is_replicated, current_user AS role,
    (SELECT string_agg(relname, ', ' ORDER BY relname) FROM pg_class
     WHERE relname = ANY (%s) AND relkind IN ('r', 'p') AND pg_table_is_visible(oid)
     AND row_security_active(oid)) AS hidden
"""
_PID: Final = "SELECT pg_backend_pid()"
_ROUNDS: Final = 3
_FIND_OUT_SECONDS: Final = 6
POOL_HINT: Final = (
    "a pooler that has no server connection left does this: each process needs seven of a pool in "
    "session mode (default_pool_size)"
)
STANDBY: Final = "this server is a standby, whose answers may be old"
NOT_REPLICATED: Final = "KEYLATCH_DURABLE is replicated, but the server has no synchronous standby"
NOT_REPLICATED_HINT: Final = "set synchronous_standby_names there, or KEYLATCH_DURABLE=local"


def server_hint(variable: str) -> str:
    """What to check of a URL whose server does not answer, or refuses.

    Args:
        variable: the setting that the URL comes from.
    """
    return f"is the server up, and are host, user, password and database of {variable} right?"


@dataclass(frozen=True, slots=True)
class _Facts:
    pid: int
    is_standby: bool
    version: str
    is_replicated: bool
    role: str
    hidden: str | None
    """Tables of which the role sees no or not all rows."""


@dataclass(frozen=True, slots=True)
class Server:
    """What is at the other end of a connection.

    Args:
        is_pooled: a pooler is in between.
        checks_clients: the server can notice that a client has gone while it runs a statement.
    """

    is_pooled: bool
    checks_clients: bool


class Connector:
    """Connects to one URL.

    Args:
        parameters: of libpq.
        variable: the setting that it comes from.
        needs_session: it is for leases and LISTEN, which need a session of their own.
        needs_replication: refuse a server without a synchronous standby.
        may_be_standby: it is for queries to a standby.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        variable: str,
        *,
        needs_session: bool = False,
        needs_replication: bool = False,
        may_be_standby: bool = False,
    ) -> None:
        self._hosts = Hosts(parameters)
        self._variable = variable
        self._needs_session = needs_session
        self._needs_replication = needs_replication
        self._may_be_standby = may_be_standby
        self.server: Server | None = None
        """Known from the first connection on."""

    def hint(self) -> str:
        """What the operator should check when the server does not answer, or refuses."""
        hint = f"{server_hint(self._variable)} `keylatch doctor` says more."
        if self.server is None or not self.server.is_pooled:
            return hint
        return f"{hint} Has the pooler a connection left (default_pool_size)?"

    async def connect(
        self, on_open: Callable[[PsycopgConnection], None] | None = None
    ) -> PsycopgConnection:
        """A connection in autocommit mode.

        Args:
            on_open: gets the connection before the first query is sent.

        Raises:
            psycopg.Error: there is no server, or it refuses the connection.
            StoreUnavailable: the server cannot keep the store's promises.
        """
        connection = await self._hosts.connect()
        try:
            if on_open is not None:
                on_open(connection)
            if self.server is None:
                self.server = await self._find_out_in_time(connection)
            if self.server.is_pooled:
                connection.prepare_threshold = None
        except BaseException:  # a cancellation as well: no caller has the connection yet
            connection.pgconn.finish()
            raise
        return connection

    async def _find_out_in_time(self, connection: PsycopgConnection) -> Server:
        try:
            async with asyncio.timeout(_FIND_OUT_SECONDS):
                return await self._find_out(connection)
        except TimeoutError:
            raise StoreUnavailable(
                f"{self._variable}: connected, but no query was answered in {_FIND_OUT_SECONDS} s",
                POOL_HINT,
            ) from None

    async def _find_out(self, connection: PsycopgConnection) -> Server:
        async with connection.cursor(row_factory=class_row(_Facts)) as cursor:
            await cursor.execute(PRIMARY_HINT + _FACTS, [_CHECKED_TABLES], prepare=False)
            [facts] = await cursor.fetchall()
        self._check(facts)
        is_pooled = facts.pid != connection.info.backend_pid
        if is_pooled and self._needs_session and not await self.keeps_sessions(connection):
            raise StoreUnavailable(
                f"{self._variable}: leases need a session, and this pooler in transaction mode "
                "keeps none",
                "set KEYLATCH_STORE_DIRECT to the URL of the server itself",
            )
        # On other systems a server may refuse the setting: it cannot tell that a client has gone.
        checks_clients = connection.info.server_version >= 140_000 and "linux" in facts.version
        return Server(is_pooled, checks_clients)

    def _check(self, facts: _Facts) -> None:
        if facts.is_standby and not self._may_be_standby:
            raise StoreUnavailable(STANDBY, f"does {self._variable} lead to the primary?")
        if facts.hidden:
            raise StoreUnavailable(
                f"row-level security hides rows of {facts.hidden} from the role {facts.role}",
                "make the role the owner of the tables, or give it BYPASSRLS: a key whose row is "
                "hidden would be refused as unknown",
            )
        if self._needs_replication and not facts.is_replicated:
            raise StoreUnavailable(NOT_REPLICATED, NOT_REPLICATED_HINT)

    async def keeps_sessions(self, first: PsycopgConnection) -> bool:
        """Whether the pooler keeps a client on one session.

        Whether it gives out the session that was used last, or the one that was used first, one of
        two clients gets another one after their transactions have overlapped. Other clients may
        hide that once.
        """
        async with await self._hosts.connect() as second:
            clients = (first, second)
            seen = [await _pid(client) for client in clients]
            for _ in range(_ROUNDS):
                await first.execute("BEGIN", prepare=False)
                pids = [await _pid(client) for client in clients]
                await first.execute("COMMIT", prepare=False)
                if pids != seen or [await _pid(client) for client in clients] != seen:
                    return False
        return seen[0] != seen[1]


async def _pid(client: PsycopgConnection) -> int:
    async with client.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(_PID, prepare=False)
        [pid] = await cursor.fetchall()
        return int(pid)
