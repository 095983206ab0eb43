"""What tests share: a clock to move, cheap hashes, engines, and real servers on demand."""

import asyncio
import contextlib
import gc
import itertools
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from keylatch._variables import variable_name
from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.caches.redis_client import CircuitBreaker
from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings
from keylatch.storage.store import Store
from keylatch_sidecar.app import create_app
from keylatch_sidecar.settings import TestSettings
from servers import PostgresServer, RedisServer, serving

if TYPE_CHECKING:
    from proxies import FaultInjector, Proxy, ProxyStack
    from shell import Operator

pytest.register_assert_rewrite("proxies", "proxy_contract", "shell")  # imported only where needed

MakeEngine = Callable[..., Engine]
Times = Callable[[int, int], int]


class Clock:
    """Wall clock and monotonic timer in one, moved by hand. Seconds."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds

    def tick(self, seconds: float) -> None:
        self.seconds += seconds


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


class StoreTests:
    """For what both databases promise: each class of tests names its own `url`."""

    @pytest.fixture
    def url(self) -> str:
        raise AssertionError("each database has its own")

    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[Store]:
        store = Store(url)
        await store.open(0)
        yield store
        await store.close()


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


def extend_redis_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as a busy machine takes: the 50 ms of an attempt are other tests' affair."""
    monkeypatch.setattr("keylatch.caches.redis_client.TIMEOUT_SECONDS", 60)
    monkeypatch.setattr(
        "keylatch.engine.CircuitBreaker", partial(CircuitBreaker, timeout_seconds=60)
    )


async def wait_until(condition: Callable[[], Awaitable[object]]) -> None:
    """Return once something is so that a background task of this loop brings about."""
    while not await condition():  # noqa: ASYNC110 - it has no event that a test could wait for
        await asyncio.sleep(0)


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


class Sidecar:
    """A sidecar on a real socket, and its operator, who makes the first key of an organisation."""

    def __init__(
        self, url: str, probes: str, clock: Clock, operator: Engine, runner: asyncio.Runner
    ) -> None:
        self.url = url
        self._probes = probes
        self.clock = clock
        self._operator = operator
        self._runner = runner
        self._numbers = itertools.count(1)

    def create(self, organization: str = "", name: str = "Admin key", **fields: Any) -> Created:
        """A key, of a new organisation where none is named."""
        organization = organization or f"organization-{next(self._numbers)}"

        async def create() -> Created:
            keyring = await self._operator.keyring()
            created = await keyring.create(organization, name, **fields)
            if self._operator.store.is_shared:  # a member that does not run is waited for
                await self._operator.stop()
            return created

        return self._runner.run(create())

    def client(self, key: Created | None = None) -> httpx.Client:
        """An HTTP client that sends this key."""
        headers = {"Authorization": f"Bearer {key.token.reveal()}"} if key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False
        )

    def probe(self) -> httpx.Client:
        """An HTTP client without a key, at the listener for metrics."""
        return httpx.Client(base_url=self._probes, timeout=30, trust_env=False)


@contextlib.contextmanager
def sidecar_on(store_url: str, clock: Clock, **settings: Any) -> Iterator[Sidecar]:
    """A sidecar that is served until the end of the block."""

    def engine() -> Engine:
        return Engine(
            Settings.load(**{"store": store_url, "redis": "", **settings}),
            clock=clock,
            timer=clock,
            hasher=Hasher("argon2id", CHEAPEST),
        )

    probes = socket.create_server(("127.0.0.1", 0))
    port = probes.getsockname()[1]
    app = create_app(engine(), metrics_address=port)
    with serving(app, [probes]) as url, asyncio.Runner() as runner:
        operator = engine()
        yield Sidecar(url, f"http://127.0.0.1:{port}", clock, operator, runner)
        runner.run(operator.stop())


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
    """Somebody at a shell, with a store of the test's own."""
    from shell import Operator

    return Operator(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def proxy(request: pytest.FixtureRequest) -> "Iterator[ProxyStack]":
    """The proxy that the module calls `KIND`, with a sidecar, an app, and keys."""
    import proxies

    with proxies.running_stack(request.module.KIND) as made:
        yield made


@pytest.fixture(scope="module")
def proxy_with_fault(proxy: "ProxyStack") -> "Iterator[tuple[FaultInjector, Proxy]]":
    """Another such proxy, with somebody between it and the sidecar."""
    import proxies

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
        from proxy_contract import properties

        terminalreporter.section("proxy x property: tests passed (failed)")
        for line in properties(reports):
            terminalreporter.write_line(line)
