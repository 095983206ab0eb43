"""What the store needs of a database, and the translation of drivers' errors.

A unit of work is a function of a SQLAlchemy `Connection`. A `Query` is one statement that is
compiled once and then given to the driver as text, because checks and leases run it often. The
repositories contain each of them once; `sqlite`, `postgresql` and `memory` run them. Every error of
a driver becomes `StoreUnavailable` in this file and nowhere else, with a message of one line that
holds no parameters.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, Dialect, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from keylatch.errors import StoreUnavailable

T = TypeVar("T")
Work = Callable[[Connection], T]
Rows = list[tuple[Any, ...]]
Durability = Literal["local", "replicated"]
"""Of an answered change: stored by this server, or by a synchronous standby as well."""


_INSUFFICIENT_PRIVILEGE: Final = "42501"
_MIGRATE_AS_OWNER: Final = (
    "run `keylatch migrate` as the owner of the tables, and GRANT as in docs/postgresql-roles.md"
)


class OtherServer(StoreUnavailable):
    """Another server answered than the one that granted the last lease, after a restart or a
    failover: the next poll finds out which one grants leases now."""


class Contended(Exception):
    """A conflict with another transaction: the work has to be repeated from its beginning."""


class Query:
    """One statement, in one snapshot.

    Args:
        statement: its bind parameters are given to `Database.fetch`.
    """

    def __init__(self, statement: Select[Any]) -> None:
        self.statement = statement
        self._compiled: dict[
            tuple[object, ...], tuple[str, Mapping[str, Any], tuple[str, ...]]
        ] = {}

    def compile_for(
        self, dialect: Dialect, *columns: ColumnElement[Any]
    ) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
        """The text for a driver, the constant parameters, and the order of all parameters where
        the driver needs one.

        Args:
            dialect: of the driver.
            columns: constants of a module, which are added to those of the statement.
        """
        key = (dialect.name, *map(id, columns))
        cached = self._compiled.get(key)
        if cached is None:
            compiled = self.statement.add_columns(*columns).compile(dialect=dialect)
            order = tuple(getattr(compiled, "positiontup", None) or ())
            cached = self._compiled[key] = (str(compiled), compiled.params, order)
        return cached


class Database(Protocol):
    """A database; a method with a body here is what one without that feature does."""

    is_shared: bool = False
    """Whether several hosts use it, so that processes need leases."""
    lease_server: str = ""
    """The server that granted the last lease: another text for each start of each server."""
    has_standby: bool = False
    """Whether `fetch_from_standby` has a standby to ask."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know at start."""
        return ()

    async def fetch(
        self,
        query: Query,
        *,
        seconds: float | None = None,
        is_grant: bool = False,
        **parameters: Any,
    ) -> Rows:
        """The rows of a query.

        Args:
            query: the statement.
            is_grant: whether it grants a lease: only answers of the server that granted the last
                one are believed.
            seconds: the time limit of an urgent query, which does not wait for a connection that
                other queries use; None: the default limit.
            parameters: of the query.
        """

    async def read(self, work: Work[T], *, seconds: float | None = None) -> T:
        """Run work that changes nothing, in a snapshot; `seconds` as in `write`."""

    async def write(
        self,
        work: Work[T],
        *,
        durable: bool = True,
        seconds: float | None = None,
        is_urgent: bool = False,
    ) -> T:
        """Run a transaction.

        Args:
            work: may be repeated from its beginning.
            durable: False: the last commits may be lost when the power fails.
            seconds: the time limit; None: the default limit.
            is_urgent: use the connections that are reserved for leases.
        """

    async def fetch_from_standby(self, query: Query, **parameters: Any) -> Rows | None:
        """The rows of a query as a standby has them, which may be old; None: there is no standby,
        or it did not answer."""
        return None

    def durability(self) -> Durability:
        """Where the last durable transaction was stored when it was answered."""
        return "local"

    def pools(self) -> Mapping[str, int]:
        """Work in progress by kind, including work that waits for a thread; empty: not counted."""
        return {}

    def fetch_nowait(self, query: Query, **parameters: Any) -> Rows | None:
        """`fetch` without waiting for a disk or a socket; None where that is impossible."""
        return None

    def data_version(self) -> bytes | None:
        """Bytes that differ after every commit of any process: while they are equal, no query is
        needed; None: the database has none."""
        return None

    async def identity(self) -> str:
        """The identity of the database, whose tables exist: the same text in all processes that
        use it, another one for every copy of it."""

    async def listen(self, channel: str, on_notification: Callable[[str], None]) -> None:
        """Call `on_notification` at once with an empty payload, and then with the payload of each
        notification, until the connection is lost."""

    async def run_maintenance(self) -> None:
        """Housekeeping that may be slow."""
        return

    async def close(self) -> None:
        """Close connections and end threads."""
        return

    def before_fork(self) -> None:
        """Close what must not be open while the process forks."""
        return

    def after_fork_in_parent(self) -> None:
        """Continue after a fork."""
        return

    def after_fork_in_child(self) -> None:
        """Drop what the parent has open, without closing it."""
        return


@contextlib.contextmanager
def translate_errors(driver: type[Exception], hint: str) -> Iterator[None]:
    """Turn the errors of a driver into `StoreUnavailable`.

    Args:
        driver: the driver's base class of errors.
        hint: what the operator should check.
    """
    try:
        yield
    except (DBAPIError, driver) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        # The first line only: PostgreSQL's DETAIL below it may quote the row.
        first, *_ = str(cause).strip().splitlines() or [type(cause).__name__]
        if getattr(cause, "sqlstate", None) == _INSUFFICIENT_PRIVILEGE:
            hint = _MIGRATE_AS_OWNER
        raise StoreUnavailable(f"the store failed: {first}", hint) from None
    except Contended:
        raise StoreUnavailable("too many conflicts with other transactions", hint) from None
    except (PoolTimeout, TimeoutError):
        raise StoreUnavailable("the store did not answer in time", hint) from None
    except OSError as error:
        raise StoreUnavailable(f"the store failed: {error.strerror or error}", hint) from None
