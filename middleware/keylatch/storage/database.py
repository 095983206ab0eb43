"""What the store needs of a database, and the one gate through which drivers' errors pass.

A unit of work is a plain function of a SQLAlchemy `Connection`; a question is one statement, which
is compiled once and then given to the driver as text, because checks and leases ask it often.
`questions` and `changes` write each of them once and both `sqlite` and `postgresql` run it. Every
error of a driver becomes `StoreUnavailable` here and nowhere else, with a one-line message that
holds no parameters.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Dialect, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from keylatch.errors import StoreUnavailable

T = TypeVar("T")
Work = Callable[[Connection], T]
Rows = list[tuple[Any, ...]]


class Contended(Exception):
    """Another transaction was faster; the work has to be repeated from its beginning."""


class Query:
    """One statement, in one snapshot.

    Args:
        statement: what is asked; its bind parameters are given with every question.
    """

    def __init__(self, statement: Select[Any]) -> None:
        self.statement = statement
        self._compiled: dict[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {}

    def compile_for(self, dialect: Dialect) -> tuple[str, Mapping[str, Any], tuple[str, ...]]:
        """The text for a driver, the parameters that never change, and the order of all of them
        where the driver wants an order."""
        cached = self._compiled.get(dialect.name)
        if cached is None:
            compiled = self.statement.compile(dialect=dialect)
            order = tuple(getattr(compiled, "positiontup", None) or ())
            cached = self._compiled[dialect.name] = (str(compiled), compiled.params, order)
        return cached


class Database(Protocol):
    """One of the two databases."""

    is_shared: bool
    """Whether many hosts use it, so that it has to be asked and cannot just be read."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know at start."""

    async def fetch(self, query: Query, *, seconds: float | None = None, **parameters: Any) -> Rows:
        """The rows that answer a question.

        Args:
            query: the statement.
            seconds: how long to wait for a server, where it is urgent: then it waits for nobody
                else's question; None: as long as is usual.
            parameters: the question's own.
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
            durable: False: the last ones may be lost when the power fails.
            seconds: how long to wait for a server; None: as long as is usual.
            is_urgent: whether it waits for no other transaction's connection: for leases alone.
        """

    def pools(self) -> Mapping[str, int]:
        """Work under way by kind, with what waits for a thread of that kind; empty: not counted."""

    def fetch_nowait(self, query: Query, **parameters: Any) -> Rows | None:
        """`fetch` without waiting for a disk or a socket; None where that is impossible."""

    def data_version(self) -> bytes | None:
        """Bytes that differ after every commit, by whomever, so that equal ones spare the question;
        None where there are none."""

    async def identity(self) -> str:
        """Which database this is, once its tables are there: another text for every copy of it,
        and the same for all processes that use it."""

    async def listen(self, channel: str, on_notification: Callable[[str], None]) -> None:
        """Call `on_notification` at once, and with the payload of each notification, until the
        line breaks."""

    async def run_maintenance(self) -> None:
        """Housekeeping that may take its time."""

    async def close(self) -> None:
        """Let connections and threads go."""

    def before_fork(self) -> None:
        """Close whatever must not be open while the process forks."""

    def after_fork_in_parent(self) -> None:
        """In the parent: go on."""

    def after_fork_in_child(self) -> None:
        """In the child: drop what the parent has open, without closing it."""


@contextlib.contextmanager
def translate_errors(driver: type[Exception], hint: str) -> Iterator[None]:
    """Turn whatever a driver raises into `StoreUnavailable`.

    Args:
        driver: the driver's base class of errors.
        hint: what the operator should look at.
    """
    try:
        yield
    except (DBAPIError, driver) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        # The first line only: PostgreSQL's DETAIL below it may quote the row.
        first, *_ = str(cause).strip().splitlines() or [type(cause).__name__]
        raise StoreUnavailable(f"the store failed: {first}", hint) from None
    except Contended:
        raise StoreUnavailable("too many conflicts with other transactions", hint) from None
    except (PoolTimeout, TimeoutError):
        raise StoreUnavailable("the store did not answer in time", hint) from None
    except OSError as error:
        raise StoreUnavailable(f"the store failed: {error.strerror or error}", hint) from None
