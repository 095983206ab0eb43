"""Checks of a store in PostgreSQL."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, NamedTuple

from keylatch.errors import StoreUnavailable
from keylatch.storage.conninfo import connection_parameters
from keylatch.storage.database import translate_errors
from keylatch_sidecar.operations.doctor import connections, replication, rights, tables
from keylatch_sidecar.operations.doctor.finding import Finding, Status, failure, ok, warning

_SECONDS: Final = 2.0
_POOLER_SECONDS: Final = 5.0
_SLOW_SECONDS: Final = 0.02
_MAX_CLOCK_SKEW_SECONDS: Final = 1.0
_LEASE_FACTOR: Final = 1.2

_SERVER: Final = """
    SELECT current_setting('server_version'), version(), pg_is_in_recovery(),
           current_setting('default_transaction_read_only'),
           current_setting('default_transaction_isolation'),
           current_setting('fsync'), current_setting('full_page_writes'),
           current_setting('client_connection_check_interval', true),
           (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()),
           host(inet_server_addr())
"""
_CLOCK: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"
_HAS_TABLES: Final = "SELECT to_regclass('keylatch_version') IS NOT NULL"
_READABLE: Final = "SELECT pg_is_in_recovery(), to_regclass('keylatch_keys') IS NOT NULL"

Fetch = Callable[[str], Awaitable[tables.Rows]]


class _Server(NamedTuple):
    """The row of `_SERVER`."""

    version: str
    build: str
    is_replica: bool
    read_only: str
    isolation: str
    fsync: str
    full_page_writes: str
    client_check: str | None
    is_encrypted: bool | None
    address: str | None


async def examine(
    url: str,
    lease: float,
    *,
    direct_url: str = "",
    read_url: str = "",
    must_replicate: bool = False,
) -> list[Finding]:
    """The findings for the server and the tables.

    The connection is the doctor's own: a store refuses servers that cannot keep its promises, and
    what is wrong with those is to be found here.

    Args:
        url: of a store on PostgreSQL.
        lease: the lease duration in seconds, within which every running process renews its lease.
        direct_url: `KEYLATCH_STORE_DIRECT`; empty: none.
        read_url: `KEYLATCH_STORE_READ`; empty: none.
        must_replicate: `KEYLATCH_DURABLE=replicated`.
    """
    import psycopg  # it is an extra, and the rest of the doctor works without it

    from keylatch.storage.connector import server_hint

    async def fetch(statement: str) -> list[tuple[Any, ...]]:
        async with asyncio.timeout(_SECONDS):
            return await (await connection.execute(statement.encode())).fetchall()

    parameters = connection_parameters(url)
    findings: list[Finding] = []
    try:
        with translate_errors(psycopg.Error, server_hint("KEYLATCH_STORE")):
            async with await psycopg.AsyncConnection.connect(
                autocommit=True, prepare_threshold=None, **parameters
            ) as connection:
                await _examine_server(fetch, findings, must_replicate=must_replicate)
                processes = await _examine_tables(fetch, findings, lease)
        if not any(each.check == rights.HIDDEN_ROWS for each in findings):
            findings += await _check_poolers(url, direct_url, processes)
            if direct_url and findings[-1].status is not Status.FAILURE:
                findings += await _check_direct(url, direct_url)
    except StoreUnavailable as error:
        findings.append(failure("store", error.message, error.hint))
    if read_url:
        findings.append(await _check_read(read_url))
    return findings


async def _check_direct(url: str, direct_url: str) -> list[Finding]:
    """Whether both URLs lead to one store, as at the start of a process."""
    from keylatch.storage.postgresql import PostgreSQL  # as above

    database = PostgreSQL(url, direct_url)
    try:
        await database.identity()
    except StoreUnavailable as error:
        return [failure("direct", error.message, error.hint)]
    finally:
        await database.close()
    return [ok("direct", "KEYLATCH_STORE_DIRECT leads to the same store")]


async def _check_read(read_url: str) -> Finding:
    """Whether the standby for look-ups can answer; without it the primary does."""
    import psycopg  # as above

    from keylatch.storage.connector import Connector, server_hint

    variable = "KEYLATCH_STORE_READ"
    parameters = connection_parameters(read_url, needs_primary=False)
    connector = Connector(parameters, variable, may_be_standby=True)
    hint = server_hint(variable)
    try:
        with translate_errors(psycopg.Error, hint):
            async with asyncio.timeout(_SECONDS), await connector.connect() as connection:
                rows = await (await connection.execute(_READABLE, prepare=False)).fetchall()
    except StoreUnavailable as error:
        message = f"{variable}: {error.message}; the primary answers all look-ups"
        return warning("standby", message, error.hint)
    [(is_standby, has_tables)] = rows
    if not has_tables:
        message = (
            f"{variable} leads to a database without a store; the primary answers all look-ups"
        )
        return warning("standby", message, hint)
    if not is_standby:
        return warning("standby", f"{variable} leads to a primary", "the URL of a standby, or none")
    return ok("standby", f"{variable} leads to a standby with a store")


async def _check_poolers(url: str, direct_url: str, processes: int) -> list[Finding]:
    variable = "KEYLATCH_STORE"
    try:
        direct_mode = mode = await _pool_mode(url, variable)
        if direct_url:
            variable = "KEYLATCH_STORE_DIRECT"
            direct_mode = await _pool_mode(direct_url, variable)
    except StoreUnavailable as error:
        return [failure("pooler", f"{variable}: {error.message}", error.hint)]
    return list(connections.check_pooler(mode, direct_mode, processes))


async def _pool_mode(url: str, variable: str) -> connections.PoolMode | None:
    """How the pooler behind a URL assigns its connections; None: there is none.

    Raises:
        StoreUnavailable: no server answers there.
    """
    import psycopg  # as above; and the connector imports it

    from keylatch.storage.connector import Connector

    connector = Connector(connection_parameters(url), variable, may_be_standby=True)
    hint = "does the URL lead to the primary, and is a pool large enough?"
    with translate_errors(psycopg.Error, hint):
        async with asyncio.timeout(_POOLER_SECONDS), await connector.connect() as connection:
            if connector.server is None or not connector.server.is_pooled:
                return None
            return "session" if await connector.keeps_sessions(connection) else "transaction"


async def _examine_server(fetch: Fetch, findings: list[Finding], *, must_replicate: bool) -> None:
    [row] = await fetch(_SERVER)
    server = _Server(*row)
    findings += _check_server(server)
    findings += await _check_clock(fetch)
    if not server.is_replica:
        [(names, standbys)] = await fetch(replication.REPLICATION)
        findings += replication.check_replication(names, standbys, must_replicate=must_replicate)


async def _examine_tables(fetch: Fetch, findings: list[Finding], lease: float) -> int:
    """Add the findings, and return the number of processes."""
    if not (await fetch(_HAS_TABLES))[0][0]:
        findings.append(tables.check_version(None))
        return 0
    relations = [rights.Relation(*relation) for relation in await fetch(rights.RELATIONS)]
    found = list(rights.check_rights(relations))
    findings += found
    if any(each.status is Status.FAILURE for each in found):  # what is below would fail as well
        return 0
    findings.append(tables.check_version((await fetch(tables.STORED_VERSION))[0][0]))
    findings += tables.check_secrets(await fetch(tables.SECRETS))
    before = await fetch(tables.MEMBERS)
    [(allowed, in_use, of_keylatch)] = await fetch(connections.CONNECTIONS)
    findings.append(
        connections.check_connections(allowed, in_use, of_keylatch, processes=len(before))
    )
    if before:
        await asyncio.sleep(lease * _LEASE_FACTOR)
    findings.append(tables.check_members(dict(before), dict(await fetch(tables.MEMBERS))))
    return len(before)


def _check_server(server: _Server) -> Iterator[Finding]:
    yield ok("store", f"PostgreSQL {server.version.split()[0]}")
    if server.is_replica:
        message = "this is a replica: it grants no leases, and every check is answered with 503"
        yield failure("primary", message, "set KEYLATCH_STORE to the primary")
    elif server.read_only == "on":
        message = "transactions are read-only by default"
        yield failure("primary", message, "ALTER ROLE … SET default_transaction_read_only = off")
    else:
        yield ok("primary", "this is the primary, and it is writable")
    unsafe = [
        f"{name} is off"
        for name, value in [("fsync", server.fsync), ("full_page_writes", server.full_page_writes)]
        if value == "off"
    ]
    if unsafe:
        message = f"{', '.join(unsafe)}: a crash can undo a revocation that was confirmed"
        yield failure("durability", message, "turn it on for this server")
    else:
        yield ok("durability", "changes are on disk before they are confirmed")
    if server.isolation != "read committed":
        message = f"{server.isolation} by default; keylatch asks for read committed itself"
        yield ok("isolation", message)
    is_windows = any(word in server.build for word in ("Visual C++", "msvc", "mingw"))
    if server.client_check is None or is_windows:
        yield warning(
            "lost clients",
            "this server does not notice that a client has given up: while a synchronous standby"
            " is missing, each change that is tried keeps a server process and its connection",
            "PostgreSQL 14 or newer, not on Windows",
        )
    if server.address not in (None, "127.0.0.1", "::1") and not server.is_encrypted:
        yield warning(
            "encryption", "the connection to the server is not encrypted", "sslmode=verify-full"
        )


async def _check_clock(fetch: Fetch) -> list[Finding]:
    asked_at = time.time()
    [(store_seconds,)] = await fetch(_CLOCK)
    seconds = time.time() - asked_at
    skew = store_seconds - (asked_at + seconds / 2)
    findings = [ok("latency", f"{seconds * 1000:.1f} ms for a query")]
    if seconds > _SLOW_SECONDS:
        hint = "use a server that is closer: each uncached key and each revocation waits for it"
        findings = [warning("latency", f"{seconds * 1000:.1f} ms for a query", hint)]
    if abs(skew) - seconds / 2 > _MAX_CLOCK_SKEW_SECONDS:
        message = f"this host's clock and the store's are {abs(skew):.1f} s apart"
        hint = "synchronise them: expiry uses the store's clock, times of creation use this host's"
        return [*findings, warning("clocks", message, hint)]
    return [*findings, ok("clocks", "this host's and the store's agree within a second")]
