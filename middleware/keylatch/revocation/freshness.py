"""Freshness: whether this process knows every committed change (RFC 9111 section 4.2).

`sequence` implements it for SQLite and `lease` for PostgreSQL. `Invalidations` says which cached
entries the known changes leave valid; `Freshness` says whether those are all changes there are.
"""

from typing import Protocol

from keylatch.telemetry.health import ComponentHealth


class Freshness(Protocol):
    """Says whether `Invalidations` are complete, and keeps them complete."""

    def now_if_fresh(self) -> float | None:
        """The time to judge expiry at, in milliseconds since the epoch; None while cached entries
        may not be used, even those that `Invalidations` accept. Never waits; reads one clock."""

    async def begin(self) -> None:
        """Read the current sequence number of the store."""

    async def revalidate(self) -> None:
        """Fetch the changes, so that the process is fresh again (RFC 9111 section 4.3).

        Raises:
            StoreUnavailable: the process is not fresh.
        """

    async def poll(self) -> None:
        """Fetch the changes with a query that is sent after this call, also while the process is
        fresh.

        Raises:
            StoreUnavailable: the store did not answer.
        """

    async def run(self) -> None:
        """Keep the process fresh, until cancelled."""

    async def end(self) -> None:
        """Stop using cached entries and give up the lease, if there is one."""

    def is_fresh(self) -> bool:
        """Whether cached entries that `Invalidations` accept may be used now."""

    def now_ms(self) -> int:
        """The time of `now_if_fresh`, also while the process is not fresh."""

    def component_health(self) -> ComponentHealth:
        """The health of the lease; state `off` where there is none."""

    def clear(self) -> None:
        """Not fresh until the next `begin`."""
