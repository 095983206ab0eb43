"""Checks of a store in PostgreSQL."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from keylatch.errors import StoreUnavailable
from keylatch.storage.database import Database
from keylatch_sidecar.operations.doctor import tables
from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

_SECONDS: Final = 2.0
_SLOW_SECONDS: Final = 0.02
_MAX_CLOCK_SKEW_SECONDS: Final = 1.0
_LEASE_FACTOR: Final = 1.2
_MIN_FREE_CONNECTIONS: Final = 20

_SERVER: Final = """
    SELECT current_setting('server_version'), pg_is_in_recovery(),
           current_setting('default_transaction_read_only'), current_setting('fsync'),
           current_setting('synchronous_commit'), current_setting('full_page_writes'),
           current_setting('max_connections')::int,
           (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
           (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()),
           host(inet_server_addr())
"""
_MAY_WRITE: Final = "SELECT has_table_privilege('keylatch_meta', 'UPDATE')"
_CLOCK: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"
_HAS_TABLES: Final = "SELECT to_regclass('keylatch_version') IS NOT NULL"


async def examine(database: Database, lease: float) -> list[Finding]:
    """The findings for the server and the tables.

    Args:
        database: on PostgreSQL.
        lease: the lease duration in seconds, within which every running process renews its lease.
    """

    async def fetch(statement: str) -> list[tuple[Any, ...]]:
        rows = await database.read(
            lambda connection: connection.exec_driver_sql(statement).all(), seconds=_SECONDS
        )
        return [tuple(row) for row in rows]

    try:
        [row] = await fetch(_SERVER)
        findings = [*_check_server(*row), *await _check_clock(fetch)]
        if not (await fetch(_HAS_TABLES))[0][0]:
            return [*findings, tables.check_version(None)]
        findings.append(tables.check_version((await fetch(tables.STORED_VERSION))[0][0]))
        if not (await fetch(_MAY_WRITE))[0][0]:
            hint = "GRANT this user the privileges of the tables' owner"
            findings.append(failure("rights", "the tables are not writable", hint))
        findings += tables.check_secrets(await fetch(tables.SECRETS))
        before = await fetch(tables.MEMBERS)
        if before:
            await asyncio.sleep(lease * _LEASE_FACTOR)
        findings.append(tables.check_members(dict(before), dict(await fetch(tables.MEMBERS))))
    except StoreUnavailable as error:
        return [failure("store", error.message, error.hint)]
    return findings


def _check_server(
    version: str,
    is_replica: bool,
    read_only: str,
    fsync: str,
    synchronous_commit: str,
    full_page_writes: str,
    max_connections: int,
    open_connections: int,
    is_encrypted: bool | None,
    address: str | None,
) -> Iterator[Finding]:
    yield ok("store", f"PostgreSQL {version.split()[0]}")
    if is_replica:
        message = "this is a replica: it grants no leases, and every check is answered with 503"
        yield failure("primary", message, "set KEYLATCH_STORE to the primary")
    elif read_only == "on":
        message = "transactions are read-only by default"
        yield failure("primary", message, "ALTER ROLE … SET default_transaction_read_only = off")
    else:
        yield ok("primary", "this is the primary, and it is writable")
    unsafe = [
        f"{name} is off"
        for name, value in [
            ("fsync", fsync),
            ("synchronous_commit", synchronous_commit),
            ("full_page_writes", full_page_writes),
        ]
        if value == "off"
    ]
    if unsafe:
        message = f"{', '.join(unsafe)}: a crash can undo a revocation that was confirmed"
        yield failure("durability", message, "turn it on for this server or this user")
    else:
        yield ok("durability", "commits are on disk before they are confirmed")
    if max_connections - open_connections < _MIN_FREE_CONNECTIONS:
        yield warning(
            "connections",
            f"{open_connections} of {max_connections} are in use",
            "raise max_connections, or use smaller pools",
        )
    if address not in (None, "127.0.0.1", "::1") and not is_encrypted:
        yield warning(
            "encryption", "the connection to the server is not encrypted", "sslmode=verify-full"
        )


async def _check_clock(fetch: Callable[[str], Awaitable[tables.Rows]]) -> list[Finding]:
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
