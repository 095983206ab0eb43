"""How a transaction of a change begins and ends on PostgreSQL.

The law of this file: what a transaction needs is set in the transaction, in the round trip of its
BEGIN, whatever the database, the role or another client of a pooler has set.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from keylatch.storage.connector import STANDBY, Server
from keylatch.storage.libpq_connection import ConnectionLost
from keylatch.storage.postgresql_dialect import PRIMARY_HINT, SERVER_STARTED

PsycopgConnection = psycopg.AsyncConnection[Any]

# A process that is stopped or cut off in the middle of a transaction must not keep its locks: the
# lock on the sequence row would block every change.
_IDLE_MILLISECONDS: Final = 2_000
# A server process whose client has left ends while it waits for a lock. One that waits for a
# standby does not: it holds the sequence row, so there is one.
_CHECK_CLIENT: Final = "SET LOCAL client_connection_check_interval = 1000;"
_BEGIN: Final = """BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL lock_timeout = {lock_milliseconds};
SET LOCAL idle_in_transaction_session_timeout = {idle_milliseconds};
{check_client}
{hint}SELECT pg_backend_pid(), pg_is_in_recovery(),
    current_setting('synchronous_standby_names') <> '',
    {started},
    set_config('synchronous_commit', {synchronous_commit}, true)
"""
_DURABLE: Final = """CASE current_setting('synchronous_commit')
    WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END"""


@dataclass(frozen=True, slots=True)
class Begun:
    """What the server says when a transaction begins.

    Args:
        pid: of the server's process, which a pooler does not tell.
        is_replicated: the commit waits for a synchronous standby.
        server: when it was started, which tells servers apart.
    """

    pid: int
    is_replicated: bool
    server: str


@contextlib.asynccontextmanager
async def transaction(
    connection: PsycopgConnection, server: Server, seconds: float, *, durable: bool
) -> AsyncIterator[Begun]:
    """A transaction, committed at the end and rolled back after an error.

    Args:
        connection: in autocommit mode.
        server: at the other end.
        seconds: how long it may wait for a lock.
        durable: False: the commit waits neither for the disk nor for a standby.

    Raises:
        ConnectionLost: the server is a standby.
    """
    begin = _BEGIN.format(
        lock_milliseconds=max(1, int(seconds * 1_000)),
        idle_milliseconds=_IDLE_MILLISECONDS,
        check_client=_CHECK_CLIENT if server.checks_clients else "",
        hint=PRIMARY_HINT,
        started=SERVER_STARTED,
        synchronous_commit=_DURABLE if durable else "'off'",
    )
    async with connection.cursor() as cursor:
        # Several statements in one message of the simple protocol, which has no parameters.
        await cursor.execute(begin.encode(), prepare=False)
        while cursor.nextset():
            pass
        [[pid, is_standby, is_replicated, started, _]] = await cursor.fetchall()
        if is_standby:
            raise ConnectionLost(STANDBY)
        try:
            yield Begun(pid, is_replicated, started)
        except BaseException:
            with contextlib.suppress(psycopg.Error):
                await cursor.execute("ROLLBACK", prepare=False)
            raise
        await cursor.execute("COMMIT", prepare=False)
        if cursor.statusmessage != "COMMIT":  # an error was ignored
            raise psycopg.errors.InFailedSqlTransaction("the transaction was rolled back")
