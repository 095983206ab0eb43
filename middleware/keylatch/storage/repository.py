"""What the repositories share: a database, the health of its reads, a count of failed writes.

An operation of a repository is a method whose first argument is the connection of its transaction.
`reads`, `writes` and `changes` make a coroutine method of it, which is called without a connection.

The law of this file: a change is not made twice. If the database repeats a change because the
answer to its COMMIT was lost, the change is recognised by its row in the invalidation log.
"""

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import Connection, Table, func, select, update

from keylatch.errors import StoreUnavailable
from keylatch.storage.database import Database, OtherServer, Query, Rows, Work
from keylatch.storage.schema import invalidations, meta
from keylatch.telemetry.counters import Counter
from keylatch.telemetry.health import Health

MANY_ROWS_SECONDS: Final = 60.0
"""The time limit of statements that touch every key of an organisation or of the store. An index
of a million keys takes two seconds."""
_MAX_PARAMETERS: Final = 500

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R", bound="Repository")
Operation = Callable[Concatenate[R, Connection, P], T]
Method = Callable[Concatenate[R, P], Coroutine[Any, Any, T]]


def batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """Parts of a list, as the bind parameters of one statement each."""
    for start in range(0, len(values), _MAX_PARAMETERS):
        yield values[start : start + _MAX_PARAMETERS]


async def _no_lease() -> None:
    return


class MonitoredDatabase:
    """A database with the health of its reads and the number of its failed writes.

    Args:
        database: `unmonitored` runs the work of leases, members and usage, which have a health of
            their own.
    """

    def __init__(self, database: Database) -> None:
        self.unmonitored = database
        self.health = Health("the store does not answer", "the store answers again")
        """Of reads only: changes may fail while reads succeed."""
        self.failed_writes = Counter()
        self._poll_lease: Callable[[], Awaitable[object]] = _no_lease

    def set_lease_poll(self, poll: Callable[[], Awaitable[object]]) -> None:
        """Use this to find out which server grants leases now."""
        self._poll_lease = poll

    async def fetch(self, query: Query, *, seconds: float | None = None, **parameters: Any) -> Rows:
        return await self.tracked(self._fetch(query, seconds, parameters))

    async def _fetch(
        self, query: Query, seconds: float | None, parameters: Mapping[str, Any]
    ) -> Rows:
        try:
            return await self.unmonitored.fetch(query, seconds=seconds, **parameters)
        except OtherServer:
            if seconds is not None:  # a query for leases, which polls by itself
                raise
        await self._poll_lease()
        return await self.unmonitored.fetch(query, **parameters)

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        return await self.tracked(self.unmonitored.read(work, seconds=seconds))

    async def tracked(self, reading: Awaitable[T]) -> T:
        """The value that was read; its success or failure is recorded in `health`."""
        value = await self.failures_tracked(reading)
        self.health.record_success()
        return value

    async def failures_tracked(self, reading: Awaitable[T]) -> T:
        """The value that was read, by one of several steps: its success alone means nothing."""
        try:
            return await reading
        except StoreUnavailable as error:
            self.health.record_failure(error.message, error.hint)
            raise

    async def write(self, work: Work[T], *, seconds: float | None = None) -> T:
        try:
            return await self.unmonitored.write(work, seconds=seconds)
        except StoreUnavailable:
            self.failed_writes.add()
            raise

    async def change(
        self,
        change: Work[T],
        now_ms: int,
        invalidated_id: str | None,
        *,
        seconds: float | None = None,
    ) -> T:
        """Run a change. The database repeats it if the answer to its COMMIT was lost. If the first
        attempt was committed, it is not made again: the acting key may be gone by its own change.

        Args:
            change: returns its sequence number, last; anything but an int: it changed nothing.
            now_ms: the time that it writes into the invalidation log.
            invalidated_id: the key or organisation that it invalidates; None: several keys.
            seconds: the time limit.
        """
        result: list[T] = []

        def work(connection: Connection) -> T:
            if result and _is_committed(
                connection, _sequence_of(result[0]), now_ms, invalidated_id
            ):
                lock_sequence(connection)
                return result[0]
            result[:] = [change(connection)]
            return result[0]

        return await self.write(work, seconds=seconds)

    def after_fork_in_child(self) -> None:
        self.health.clear()
        self.failed_writes = Counter()


class Repository:
    """Operations on one kind of rows."""

    def __init__(self, database: MonitoredDatabase) -> None:
        self._database = database


def reads(operation: Operation[R, P, T]) -> Method[R, P, T]:
    """An operation that changes nothing; it runs in one snapshot."""

    @functools.wraps(operation)
    async def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._database.read(
            lambda connection: operation(self, connection, *args, **kwargs)
        )

    return run


def writes(operation: Operation[R, P, T]) -> Method[R, P, T]:
    """An operation in one transaction, which finds out itself what an earlier attempt did."""

    @functools.wraps(operation)
    async def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._database.write(
            lambda connection: operation(self, connection, *args, **kwargs)
        )

    return run


def changes(
    invalidated: str = "", *, seconds: float | None = None
) -> Callable[[Operation[R, P, T]], Method[R, P, T]]:
    """An operation that `MonitoredDatabase.change` runs. It has an argument `now_ms`.

    Args:
        invalidated: the name of the argument with the id that it invalidates; empty: several keys.
        seconds: the time limit.
    """

    def decorate(operation: Operation[R, P, T]) -> Method[R, P, T]:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        async def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
            arguments = signature.bind(self, None, *args, **kwargs).arguments
            return await self._database.change(
                lambda connection: operation(self, connection, *args, **kwargs),
                arguments["now_ms"],
                arguments.get(invalidated),
                seconds=seconds,
            )

        return run

    return decorate


def lock_sequence(connection: Connection) -> None:
    """Keep all other changes from committing until this transaction ends. It is a write: its COMMIT
    waits, like that of a change, until it and every change before it are durable."""
    connection.execute(update(meta).values(seq=meta.c.seq))


def may_delete(connection: Connection, table: Table) -> bool:
    """Whether this process may do a table's housekeeping. A role that only checks keys may not, and
    leaves it to processes with other roles."""
    if connection.dialect.name != "postgresql":
        return True
    may = select(func.has_table_privilege(table.name, "DELETE"))
    return bool(connection.execute(may).scalar_one())


def _is_committed(
    connection: Connection, seq: int, now_ms: int, invalidated_id: str | None
) -> bool:
    """Whether the invalidation log has the row that a change with this sequence number wrote."""
    row = connection.execute(select(invalidations).where(invalidations.c.seq == seq)).first()
    if row is None or row.at != now_ms:
        return False
    return invalidated_id in (None, row.key_id, row.organization_id)


def _sequence_of(result: object) -> int:
    """The sequence number of a change; 0: it changed nothing."""
    number = result[-1] if isinstance(result, tuple) else result
    return number if isinstance(number, int) else 0
