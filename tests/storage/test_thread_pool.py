"""The threads of a SQLite file: queries of checks wait for nothing that management does."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from keylatch.storage.records import FIND
from keylatch.storage.sqlite import SQLite
from keylatch.storage.store import Store
from keylatch.storage.thread_pool import ThreadPool
from tests.storage.test_store import NOW, record

pytestmark = pytest.mark.anyio
MANY = 12  # more than there are threads in all


class OnePool(SQLite):
    """A broken twin: all work takes the same threads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._read_threads = self._write_threads = self._query_threads
        self._pools = (self._query_threads,)  # type: ignore[assignment]


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """Of a file with one key."""
    store = Store(f"sqlite:///{tmp_path}/keys.db")
    await store.open(NOW)
    await store.keys.add(record(), "hashed")
    await store.close()
    return tmp_path / "keys.db"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end at the latest, so that no thread outlives the test."""
    gate = threading.Event()
    yield gate
    gate.set()


def held(gate: threading.Event) -> Callable[[Connection], bool]:
    """Work that takes as long as the test wants."""
    return lambda connection: gate.wait(30)


async def query(database: SQLite) -> int:
    return len(await database.fetch(FIND, key_id="key_a"))


@pytest.mark.parametrize("kind", [SQLite, OnePool])
@pytest.mark.parametrize("work", ["reads", "writes"])
async def test_a_cold_check_waits_for_no_work_of_management(
    path: Path, gate: threading.Event, kind: type[SQLite], work: str
) -> None:
    """While lists, pages of the audit log or transactions keep every thread that they may have, a
    query is answered. The twin answers when they are done."""
    database = kind(path)
    run = database.read if work == "reads" else database.write
    holding = [asyncio.create_task(run(held(gate))) for _ in range(MANY)]
    await asyncio.sleep(0)
    asking = asyncio.create_task(query(database))
    await asyncio.wait({asking}, timeout=0.5 if kind is OnePool else 30)
    assert asking.done() is (kind is SQLite)
    gate.set()
    assert await asking == 1
    if work == "reads":
        assert await asyncio.gather(*holding) == [True] * MANY
    await asyncio.wait(holding)
    await database.close()


async def test_reads_and_transactions_wait_for_no_query_nor_for_each_other(
    path: Path, gate: threading.Event
) -> None:
    """Each kind has threads of its own, and says how much it has to do."""
    database = SQLite(path)
    reading = [asyncio.create_task(database.read(held(gate))) for _ in range(MANY)]
    await asyncio.sleep(0)
    assert await database.write(lambda connection: connection.exec_driver_sql("SELECT 7").scalar())
    assert dict(database.pools()) == {"checks": 0, "reads": MANY, "writes": 0}
    gate.set()
    await asyncio.gather(*reading)
    await database.close()
    assert set(database.pools().values()) == {0}


@pytest.mark.parametrize("work", ["reads", "writes"])
async def test_a_fork_waits_for_every_pool(path: Path, gate: threading.Event, work: str) -> None:
    """No thread is at work while the process forks, none begins, and no file is open then."""
    database = SQLite(path)
    assert await query(database) == 1
    begun = threading.Event()

    def work_until(connection: Connection) -> bool:
        begun.set()
        return gate.wait(30)

    run = database.read if work == "reads" else database.write
    working = asyncio.create_task(run(work_until))
    await asyncio.to_thread(begun.wait, 30)
    holding = asyncio.create_task(asyncio.to_thread(database.before_fork))
    await asyncio.wait({holding}, timeout=0.1)
    assert not holding.done()
    gate.set()
    await holding
    assert await working
    late = asyncio.create_task(query(database))
    await asyncio.wait({late}, timeout=0.1)
    assert not late.done()
    assert _descriptors_of(path) == []
    database.after_fork_in_parent()
    assert await late == 1
    assert _descriptors_of(path) != []
    await database.close()


def _descriptors_of(path: Path) -> list[str]:
    """What this process has open of the file and what is beside it."""
    targets = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(each.readlink()))
        except OSError:  # the one that reads the folder
            continue
    return [target for target in targets if target.startswith(str(path))]


async def test_a_pool_lets_an_error_through_and_counts_it_as_done() -> None:
    """And serves on."""
    pool = ThreadPool("test", 1)

    def fail() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(sqlite3.OperationalError):
        await pool.run(fail)
    assert await pool.run(lambda: 7) == 7
    assert pool.under_way == 0
    pool.close()
