"""Repositories whose operations run in the transaction of one connection, to look at statements."""

from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from sqlalchemy import Connection

from keylatch.storage.database import Work
from keylatch.storage.repository import MonitoredDatabase, Repository

T = TypeVar("T")
R = TypeVar("R", bound=Repository)


class _OnConnection:
    """A database that runs all work with one connection, and waits for nothing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self, work: Work[T], **_: Any) -> T:
        return work(self._connection)

    async def write(self, work: Work[T], **_: Any) -> T:
        return work(self._connection)

    async def change(self, change: Work[T], *_: Any, **__: Any) -> T:
        return change(self._connection)


def on(connection: Connection, kind: type[R]) -> R:
    """A repository in the transaction of a connection."""
    return kind(cast(MonitoredDatabase, _OnConnection(connection)))


def run(operation: Coroutine[Any, Any, T]) -> T:
    """The result of an operation of such a repository, which never suspends."""
    try:
        operation.send(None)
    except StopIteration as finished:
        return cast(T, finished.value)
    raise RuntimeError("the operation waits for something")
