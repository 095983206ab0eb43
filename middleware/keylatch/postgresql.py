"""The store as a server for many hosts, over psycopg's asynchronous sockets."""

import asyncio
from importlib.util import find_spec
from typing import Any, Final, TypeVar

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import create_async_engine

from keylatch.database import Work, errors_translated
from keylatch.errors import ConfigurationError

T = TypeVar("T")

_READ_SECONDS: Final = 2.0
_WRITE_SECONDS: Final = 5.0


class PostgreSQL:
    """A server for many hosts, over psycopg's asynchronous sockets."""

    warnings: tuple[str, ...] = ()

    def __init__(self, url: URL) -> None:
        for package in ("psycopg", "greenlet"):
            if find_spec(package) is None:
                raise ConfigurationError(
                    [
                        (
                            f"KEYLATCH_STORE: postgresql needs the package {package}",
                            "pip install 'keylatch[postgres]'",
                        )
                    ]
                )
        self._url = url.set(drivername="postgresql+psycopg")
        self._hint = f"is PostgreSQL up at {url.host or 'its socket'}, and does the user exist?"
        self._open()

    def _open(self) -> None:
        engine = create_async_engine(
            self._url,
            connect_args={"connect_timeout": 2, "application_name": "keylatch"},
            hide_parameters=True,
            pool_pre_ping=True,
            pool_timeout=_READ_SECONDS,
        )
        self._engine = engine
        # One statement is its own snapshot, so reads need no BEGIN and no ROLLBACK.
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def read(self, work: Work[T]) -> T:
        with errors_translated(self._hint):
            async with asyncio.timeout(_READ_SECONDS), self._reader.connect() as connection:
                return await connection.run_sync(work)

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        with errors_translated(self._hint):
            async with asyncio.timeout(_WRITE_SECONDS), self._engine.begin() as connection:
                return await connection.run_sync(work)

    def read_now(self, sql: str, *parameters: object) -> list[tuple[Any, ...]] | None:
        return None

    async def tidy(self) -> None:
        return None

    async def close(self) -> None:
        await self._engine.dispose()

    def forget(self) -> None:
        self._engine.sync_engine.dispose(close=False)
        self._open()
