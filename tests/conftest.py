"""What tests share: a clock to move, cheap hashes, engines, and real servers on demand."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keylatch.engine import Engine
from keylatch.hashing import CHEAPEST, Hasher
from keylatch.settings import Settings
from keylatch.store import Store
from servers import PostgresServer, RedisServer

MakeEngine = Callable[..., Engine]


class Clock:
    """Wall clock and monotonic timer in one, moved by hand. Seconds."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds

    def tick(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STORE", "REDIS", "PREFIX", "HASHER", "LEASE", "ENVIRONMENT", "PERMISSIONS"):
        monkeypatch.delenv(f"KEYLATCH_{name}", raising=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """An empty SQLite store."""
    return f"sqlite:///{tmp_path}/keys.db"


@pytest.fixture
def make_engine(store_url: str, clock: Clock) -> MakeEngine:
    """Builds engines on the test's store, with cheap hashes; the test starts and stops them."""

    def make(
        *,
        redis: Any = None,
        hasher: Hasher | None = None,
        store: Store | None = None,
        **settings: Any,
    ) -> Engine:
        return Engine(
            Settings.load(**{"store": store_url, "redis": "", **settings}),
            clock=clock,
            timer=clock,
            hasher=hasher or Hasher("argon2id", CHEAPEST),
            redis=redis,
            store=store,
        )

    return make


@pytest.fixture
async def engine(make_engine: MakeEngine) -> AsyncIterator[Engine]:
    """A started engine on an empty SQLite store."""
    engine = make_engine()
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis of this test's own."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL cluster; take `postgres.new_database()`."""
    server = PostgresServer()
    yield server
    server.remove()
