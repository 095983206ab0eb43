"""PostgreSQL on three nodes: a primary and its standbys, one of them synchronous, and failovers.

There is no Patroni, whose lock takes 20 seconds to expire: the run itself promotes a standby and
leads connections to it, in the order in which Patroni and HAProxy do it.
"""

import asyncio
from pathlib import Path

from services import PostgresService, until


class PostgresCluster:
    """Nodes, the first of which is the primary.

    Args:
        folder: for their logs.
        nodes: how many; one alone has no standby.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self._nodes = [
            PostgresService(folder / f"postgres-{number}.log", f"node-{number}")
            for number in range(nodes)
        ]

    @property
    def primary(self) -> PostgresService:
        return self._nodes[0]

    @property
    def next_primary(self) -> PostgresService:
        """The synchronous standby."""
        return self._nodes[1]

    async def make(self) -> None:
        """Make all nodes; commits wait for the synchronous standby from now on."""
        await self.primary.make()
        await asyncio.gather(*(node.copy(self.primary) for node in self._nodes[1:]))
        await self.wait_for_standby()

    async def wait_for_standby(self) -> None:
        """Commits wait for the synchronous standby, if there are several nodes."""
        if len(self._nodes) == 1:
            return
        standby = self.next_primary.name
        await self.primary.configure("synchronous_standby_names", f'"{standby}"')
        states = f"SELECT sync_state FROM pg_stat_replication WHERE application_name = '{standby}'"

        async def is_synchronous() -> bool:
            return await self.primary.query(states) == [("sync",)]

        await until(is_synchronous)

    async def stop_waiting(self) -> None:
        """Replication is asynchronous from now on."""
        await self.primary.configure("synchronous_standby_names", "")

    async def cut_standby(self) -> None:
        """The next primary receives nothing any more."""
        standby = self.next_primary
        await standby.configure("primary_conninfo", "")

        async def is_cut() -> bool:
            return await standby.query("SELECT 1 FROM pg_stat_wal_receiver") == []

        await until(is_cut)

    async def promote(self) -> PostgresService:
        """Make the standby the primary; return the old one, which goes on if it was alive."""
        # It commits alone until it has a standby itself, as Patroni lets it.
        await self.next_primary.configure("synchronous_standby_names", "")
        await self.next_primary.query("SELECT pg_promote(true, 30)")

        async def takes_writes() -> bool:
            return await self.next_primary.query("SELECT pg_is_in_recovery()") == [(False,)]

        await until(takes_writes)
        old, *others = self._nodes
        self._nodes = [*others, old]
        return old

    async def rebuild_standbys(self) -> None:
        """All other nodes become standbys of the primary; what only they had is gone."""
        for node in self._nodes[1:]:
            await node.crash()
        await asyncio.gather(*(node.copy(self.primary) for node in self._nodes[1:]))
        await self.wait_for_standby()

    async def remove(self) -> None:
        """Stop all nodes and remove their folders."""
        for node in self._nodes:
            await node.remove()
