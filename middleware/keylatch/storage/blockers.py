"""Terminates keylatch sessions that block a change because their process was stopped or cut off.

`idle_in_transaction_session_timeout` does not end them in the middle of a pipeline: psycopg sends
many rows without waiting for answers, and to the server that is no idle transaction. So a process
whose change waits asks the server every second who blocks it, with one query for all of its
changes. It sees no sessions of other roles, and so terminates none.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import psycopg

from keylatch.storage.database import Rows
from keylatch.storage.postgresql_dialect import PRIMARY_HINT

_POLL_SECONDS: Final = 1.0
_TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid IN (SELECT unnest(pg_blocking_pids(blocked)) FROM unnest($1::int[]) AS blocked)
AND application_name IN ('keylatch', current_setting('application_name'))
AND wait_event = 'ClientRead' AND state_change < now() - interval '2 seconds'
"""

log = logging.getLogger("keylatch")


class Blockers:
    """Looks out for all changes of one process.

    Args:
        fetch: runs a statement with a connection that waits for no change.
    """

    def __init__(self, fetch: Callable[[str, list[bytes | None], float], Awaitable[Rows]]) -> None:
        self._fetch = fetch
        self._began: dict[int, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def terminated_for(self, pid: int) -> Iterator[None]:
        """While it is open, sessions that block the server's process `pid` are terminated."""
        loop = asyncio.get_running_loop()
        self._began[pid] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(_POLL_SECONDS, self._on_timer)
        try:
            yield
        finally:
            del self._began[pid]

    def _on_timer(self) -> None:
        self._timer = None
        if not self._began:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_POLL_SECONDS, self._on_timer)
        waiting = [
            pid for pid, began in self._began.items() if loop.time() - began >= _POLL_SECONDS
        ]
        if waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._terminate(waiting), name="keylatch-blockers")

    async def _terminate(self, pids: list[int]) -> None:
        value = f"{{{','.join(map(str, pids))}}}".encode()
        with contextlib.suppress(psycopg.Error, TimeoutError, OSError):
            terminated = await self._fetch(PRIMARY_HINT + _TERMINATE, [value], _POLL_SECONDS)
            if terminated:
                log.warning(
                    "terminated %d stalled keylatch sessions that blocked a change",
                    len(terminated),
                )

    def close(self) -> None:
        """Stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            self._task.cancel()
