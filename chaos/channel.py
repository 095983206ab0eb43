"""How the processes of a run talk: lines of JSON over one socket file, times in nanoseconds of
CLOCK_MONOTONIC, which all processes of a host share."""

import asyncio
import json
import os
from typing import Any, Final

LONGEST_LINE: Final = 2**22


class Channel:
    """One end of the connection between a process and the run."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: str, **hello: Any) -> "Channel":
        """Connect to the run and send this process's name."""
        reader, writer = await asyncio.open_unix_connection(path, limit=LONGEST_LINE)
        channel = cls(reader, writer)
        channel.send(pid=os.getpid(), **hello)
        return channel

    def send(self, **message: Any) -> None:
        """Send a message if the peer is connected; never waits."""
        if self._writer.transport.is_closing():
            return
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None: the peer has disconnected."""
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    async def close(self) -> None:
        """Send what is waiting, and leave."""
        try:
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
        except OSError:
            return
