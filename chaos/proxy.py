"""What lies between a process and a server: a network that can be broken on purpose.

One listener on a free port passes bytes to one server. `held` is a partition that heals: bytes wait
and arrive late. `swallowing` is a connection that dies without a reset: bytes vanish, and the
connections that lost some stay dead for ever, on the server's side too, as where no FIN arrives.
`refusing` and `cut` are the loud ways.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

_CHUNK: Final = 65_536
_HALF_OPEN_SECONDS: Final = 8.0  # how long a server keeps a dead peer; real ones keep it for hours


class _Connection:
    """One connection: what the client sees of it and, once connected, what the server sees."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.has_lost_bytes = False
        self.is_asking = False

    def abort(self) -> None:
        self.client.transport.abort()
        if self.server is not None:
            self.server.transport.abort()


class Proxy:
    """A listener in front of one server.

    Args:
        port: of the server, on this machine.

    Attributes:
        forwarded_bytes: that the server was sent so far.
        round_trips: requests so far, as a network counts them: what a client sends before it waits
            for an answer is one.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_flowing = asyncio.Event()
        self._is_flowing.set()
        self._blackholing = 0
        self._bytes_before_blackhole = 0
        self.forwarded_bytes = 0
        self.round_trips = 0
        self._resetting = 0
        self._held = 0
        self._delays: list[float] = []

    async def start(self) -> None:
        """Listen; `port` is known then."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Let everything go."""
        self._listener.close()
        self.reset_connections()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in range(3):  # an aborted transport closes its socket in a later turn of the loop
            await asyncio.sleep(0)

    # What can be done to the connections; each may overlap with itself and with the others

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Bytes wait in both directions, and so do new connections."""
        self._held += 1
        self._is_flowing.clear()
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._is_flowing.set()

    @contextlib.contextmanager
    def blackholing(self, after: int = 0) -> Iterator[None]:
        """Bytes vanish in both directions, once so many more have reached the server: then a client
        falls silent amid what it says. What lost bytes once never comes to life again."""
        self._blackholing += 1
        self._bytes_before_blackhole = after
        try:
            yield
        finally:
            self._blackholing -= 1

    @property
    def is_blackholing(self) -> bool:
        """Whether bytes vanish already."""
        return self._blackholing > 0 and not self._bytes_before_blackhole

    @contextlib.contextmanager
    def resetting(self) -> Iterator[None]:
        """Every connection is reset, and so is every new one."""
        self._resetting += 1
        self.reset_connections()
        try:
            yield
        finally:
            self._resetting -= 1

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Answers come so much later."""
        self._delays.append(seconds)
        try:
            yield
        finally:
            self._delays.remove(seconds)

    def lead_to(self, port: int) -> None:
        """New connections go to another server; those that exist stay where they are."""
        self._server_port = port

    def reset_connections(self) -> None:
        """Reset every connection, on both sides."""
        for line in list(self._connections):
            line.abort()

    # Passing bytes

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(connection)
        self._tasks.add(task)
        try:
            await self._serve(connection, reader)
        except (OSError, asyncio.CancelledError):
            pass  # the connection broke or the run is over; both ends are let go below
        finally:
            connection.abort()
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def _serve(self, connection: _Connection, requests: asyncio.StreamReader) -> None:
        if self._resetting:
            return
        await self._is_flowing.wait()
        if self.is_blackholing:
            connection.has_lost_bytes = True
            while await _read(requests):
                pass
            return
        responses, connection.server = await asyncio.open_connection("127.0.0.1", self._server_port)
        async with asyncio.TaskGroup() as both:
            both.create_task(
                self._forward(connection, requests, connection.server, is_response=False)
            )
            both.create_task(
                self._forward(connection, responses, connection.client, is_response=True)
            )

    async def _forward(
        self,
        connection: _Connection,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        *,
        is_response: bool,
    ) -> None:
        while True:
            data = await _read(source)
            if data and not is_response and not connection.is_asking:
                self.round_trips += 1
            connection.is_asking = not is_response
            if self._blackholing:
                if not self._bytes_before_blackhole:
                    connection.has_lost_bytes = True
                elif not is_response:
                    data = data[: self._bytes_before_blackhole]
                    self._bytes_before_blackhole -= len(data)
            if not connection.has_lost_bytes:
                await self._is_flowing.wait()
                if is_response and self._delays:
                    await asyncio.sleep(max(self._delays))
            if not data:
                break
            if not connection.has_lost_bytes and not target.transport.is_closing():
                target.write(data)
                self.forwarded_bytes += 0 if is_response else len(data)
                with contextlib.suppress(OSError):  # the next read shows it
                    await target.drain()
        if connection.has_lost_bytes:
            if is_response:
                return  # the client gets no reset; it times out
            await asyncio.sleep(_HALF_OPEN_SECONDS)
        connection.abort()


async def _read(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.read(_CHUNK)
    except OSError:  # reset: for who waits at the other end, the same as closed
        return b""
