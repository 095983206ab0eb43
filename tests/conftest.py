"""What tests share: a clock to move, cheap hashes, engines, and real servers on demand."""

import gc
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from keylatch._variables import variable_name
from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch.storage.store import Store
from keylatch_sidecar.settings import TestSettings
from tests.support.clock import Clock
from tests.support.engines import MakeEngine, Times, extend_redis_timeouts
from tests.support.servers import PostgresServer, RedisServer
from tests.support.sidecars import Sidecar, sidecar_on

if TYPE_CHECKING:
    from tests.support.command_line import Operator
    from tests.support.proxies import FaultInjector, Proxy, ProxyStack

pytest.register_assert_rewrite(
    *(f"tests.support.{name}" for name in ("proxies", "proxy_contract", "command_line"))
)  # imported only where needed


def pytest_sessionstart() -> None:
    """4,000 tests are as many objects that stay: a quarter of the time went into looking for
    garbage among them."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on there is garbage, and it is what tests leave."""
    gc.enable()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="the length that SECURITY.md speaks of; takes hours"
    )


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Times:
    """How often: the first of two numbers, or the second where `--full` is given."""
    return lambda short, full: full if request.config.getoption("--full") else short


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {variable_name(name) for name in TestSettings.model_fields}
    for name in os.environ:
        if name.upper().startswith("KEYLATCH_") and name not in known:
            monkeypatch.delenv(name)


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
def generous_redis_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `give_redis_time`."""
    extend_redis_timeouts(monkeypatch)


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


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """One for all tests of a file: each takes an organisation of its own."""
    store_url = f"sqlite:///{tmp_path_factory.mktemp('sidecar')}/keys.db"
    with sidecar_on(store_url, Clock()) as sidecar:
        yield sidecar


@pytest.fixture
def admin_key(sidecar: Sidecar) -> Created:
    """The first key of an organisation of the test's own: FULL, live."""
    return sidecar.create()


@pytest.fixture
def client(sidecar: Sidecar, admin_key: Created) -> Iterator[httpx.Client]:
    """HTTP with the admin key's key."""
    with sidecar.client(admin_key) as client:
        yield client


@pytest.fixture
def operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> "Operator":
    """Runs `keylatch` commands, with a store of the test's own."""
    from tests.support.command_line import Operator

    return Operator(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def proxy(request: pytest.FixtureRequest) -> "Iterator[ProxyStack]":
    """The proxy that the module calls `KIND`, with a sidecar, an app, and keys."""
    from tests.support import proxies

    with proxies.running_stack(request.module.KIND) as made:
        yield made


@pytest.fixture(scope="module")
def proxy_with_fault(proxy: "ProxyStack") -> "Iterator[tuple[FaultInjector, Proxy]]":
    """Another such proxy, with a fault-injecting relay between it and the sidecar."""
    from tests.support import proxies

    with proxies.faulty_proxy(proxy) as made:
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, a line for each reason, and what was found of the proxies."""
    skipped = terminalreporter.getreports("skipped")
    reasons = Counter(str(cast(Sequence[object], report.longrepr)[2]) for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
    _report_proxies(terminalreporter)


def _report_proxies(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        (outcome, report.nodeid)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
    ]
    if any("::Test" in nodeid and "test_a_websocket_opens" in nodeid for _, nodeid in reports):
        from tests.support.proxy_contract import properties

        terminalreporter.section("proxy x property: tests passed (failed)")
        for line in properties(reports):
            terminalreporter.write_line(line)
