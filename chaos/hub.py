"""Where the processes of a run report: which are connected, which keys to check, what was seen."""

import asyncio
import time
from pathlib import Path
from typing import Any, Final

from channel import LONGEST_LINE, Channel
from judge import Ledger, Loss, Revoke

LINGER_SECONDS: Final = 4.0
"""So long a revoked key is still checked."""
_CLOSE_SECONDS: Final = 6.0  # then, reports of slow checks have come as well


class Hub:
    """One socket file, and a ledger for each side.

    Args:
        path: of the socket file.
        lease_ns: X.
    """

    def __init__(self, path: Path, lease_ns: int) -> None:
        self.path = str(path)
        self.ledgers = {"keylatch": Ledger(lease_ns), "naive": Ledger(lease_ns)}
        self.pids: dict[str, int] = {}
        """Connected processes: side and name → process id."""
        self._channels: dict[str, Channel] = {}
        self._checked: dict[str, dict[str, str]] = {"keylatch": {}, "naive": {}}
        self._done: list[tuple[float, str, str]] = []

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._accept, self.path, limit=LONGEST_LINE)

    async def stop(self) -> None:
        """Judge what is left. Connections that are still open are closed."""
        self._server.close()
        for ledger in self.ledgers.values():
            ledger.close()

    def send_command(self, process: str, do: str, **what: Any) -> None:
        """Give an order to a process, if it is there."""
        channel = self._channels.get(process)
        if channel is not None:
            channel.send(do=do, **what)

    def note_loss(self, start: int, end: int) -> None:
        """Commits since `start` were lost by a failover that was over at `end`."""
        for ledger in self.ledgers.values():
            ledger.losses.append(Loss(start, end))

    def note_split(self, at: int) -> None:
        """A standby takes over from now on, beside a primary that lives on."""
        for ledger in self.ledgers.values():
            ledger.splits.append(at)

    def sweep(self) -> None:
        """Drop keys that were revoked a while ago, and judge those dropped a while ago."""
        now = time.monotonic()
        closed: dict[str, set[str]] = {"keylatch": set(), "naive": set()}
        waiting = []
        for answered_at, side, key in self._done:
            if answered_at + LINGER_SECONDS + _CLOSE_SECONDS < now:
                closed[side].add(key)
                continue
            waiting.append((answered_at, side, key))
            if answered_at + LINGER_SECONDS < now and key in self._checked[side]:
                del self._checked[side][key]
                self._broadcast(side, do="drop", key=key)
        self._done = waiting
        for side, keys in closed.items():
            self.ledgers[side].close(keys)

    def _broadcast(self, side: str, **command: Any) -> None:
        for who, channel in self._channels.items():
            if who.startswith(f"{side} worker"):
                channel.send(**command)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        hello = await channel.receive()
        if hello is None:
            return
        side, name = hello["side"], hello["name"]
        who = f"{side} {name}"
        self._channels[who], self.pids[who] = channel, hello["pid"]
        if hello["role"] == "checker":
            channel.send(do="add", keys=self._checked[side])
        while (message := await channel.receive()) is not None:
            self._handle(side, name, message)
        if self._channels.get(who) is channel:
            del self._channels[who], self.pids[who]
        writer.close()

    def _handle(self, side: str, name: str, message: dict[str, Any]) -> None:
        ledger = self.ledgers[side]
        match message:
            case {"facts": facts, "undecided": undecided}:
                ledger.observe(name, facts)
                ledger.count_undecided(name, undecided)
            case {"created": key, "token": token}:
                ledger.created[key] = time.monotonic_ns()
                self._checked[side][key] = token
                self._broadcast(side, do="add", keys={key: token})
            case {"requested": key, "at": at}:
                ledger.revokes[key] = Revoke(requested=at)
            case {"gone": key}:
                del ledger.revokes[key]
                del self._checked[side][key]
                self._broadcast(side, do="drop", key=key)
            case {"answered": key}:
                revoke = ledger.revokes[key]
                revoke.answered, revoke.committed = message["at"], message["committed"]
                revoke.waited, revoke.bound_ns = message["waited"], message["bound_ns"]
                revoke.refused = message["refused"]
                self._done.append((time.monotonic(), side, key))
