"""Checks of the connection budget, and of a pooler between keylatch and the server.

The statement, and what its row means; this file executes nothing.
"""

from collections.abc import Iterator
from typing import Final, Literal

from keylatch_sidecar.operations.doctor.finding import Finding, failure, ok, warning

CONNECTIONS_IN_USE: Final = 7
"""The most of one process: two each for leases, look-ups and changes, and one for notices."""
_MIN_FREE_CONNECTIONS: Final = 20

PoolMode = Literal["session", "transaction"]
"""For how long a pooler gives a client a connection of the server."""

CONNECTIONS: Final = """
    SELECT current_setting('max_connections')::int
               - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true), '0')::int,
           count(*), count(*) FILTER (WHERE application_name = 'keylatch')
    FROM pg_stat_activity
    WHERE coalesce(backend_type, 'client backend') = 'client backend'
        AND datid IS NOT NULL AND usesysid IS NOT NULL
"""
"""How many connections roles without special rights may have; how many are open; how many of those
are keylatch's. `backend_type` of another role's session is NULL without `pg_read_all_stats`."""


def check_connections(allowed: int, in_use: int, of_keylatch: int, processes: int) -> Finding:
    """Whether all processes may use all of their connections at once, as after a failover.

    Args:
        allowed: by the server, without those that it reserves.
        in_use: now, by all programs.
        of_keylatch: those of them that are keylatch's.
        processes: that hold or held leases.
    """
    others = in_use - of_keylatch
    needed = processes * CONNECTIONS_IN_USE
    budget = f"{processes} processes x {CONNECTIONS_IN_USE} = {needed}, other programs {others}"
    if needed + others > allowed:
        message = f"too few: {budget}, and the server allows {allowed}"
    elif allowed - in_use < _MIN_FREE_CONNECTIONS:
        message = f"{in_use} of {allowed} are in use"
    else:
        return ok("connections", f"{budget}; the server allows {allowed}")
    return warning("connections", message, "raise max_connections, or use smaller pools")


def check_pooler(
    mode: PoolMode | None, direct_mode: PoolMode | None, processes: int
) -> Iterator[Finding]:
    """Whether the poolers that were found, if any, can carry what is sent through them.

    Args:
        mode: of the pooler behind `KEYLATCH_STORE`; None: there is none.
        direct_mode: the same for the URL of leases and notices.
        processes: that hold or held leases.
    """
    if direct_mode == "transaction":
        yield failure(
            "pooler",
            "transaction mode, which cannot carry leases and notices: every check is answered"
            " with 503",
            "KEYLATCH_STORE_DIRECT: a URL of the primary that does not lead through the pooler",
        )
    elif mode == "transaction":
        yield ok("pooler", "transaction mode; leases and notices use KEYLATCH_STORE_DIRECT")
    elif mode == "session":
        size = max(processes, 1) * CONNECTIONS_IN_USE
        message = (
            f"session mode: it needs {CONNECTIONS_IN_USE} server connections for each process,"
            f" so a pool of {size} or more; with fewer all checks are answered with 503"
        )
        yield ok("pooler", message)
