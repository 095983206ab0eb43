"""What is counted: right numbers, bounded labels, no secrets, and nothing that a hit has to pay."""

import asyncio
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from keylatch.authentication.authenticator import Authenticator
from keylatch.authentication.hashing import CHEAPEST, Hasher, VerifyResult
from keylatch.core.decisions import Allow, Deny, Reason, Requirement
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Created
from keylatch.metrics import Collector
from keylatch.settings import Settings
from keylatch.storage.store import Invalidation, Poll, Position, Store
from keylatch.telemetry.counters import Counter, Histogram
from keylatch.usage.recorder import UsageRecorder
from keylatch_sidecar.metrics import MetricsPage, merge
from tests.sidecar.test_server import answers, served
from tests.support.clock import Clock
from tests.support.command_line import Operator, wait_for_exit
from tests.support.engines import MakeEngine, wait_until
from tests.support.raw_http import send
from tests.support.servers import PostgresServer, eventually, free_port
from tests.support.sidecars import Sidecar

Numbers = dict[str, float]


def numbers(page: str) -> Numbers:
    """The samples of a page, as Prometheus' own parser reads them."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def page_of(*engine: Engine, **named: Engine) -> str:
    registry = CollectorRegistry()
    registry.register(Collector(*engine, **named))
    return generate_latest(registry).decode()


def seen(engine: Engine) -> Numbers:
    """The numbers of an engine that are not 0."""
    return {name: value for name, value in numbers(page_of(engine)).items() if value}


def decided(engine: Engine) -> Numbers:
    """Its decisions: decision and source."""
    return {
        re.sub(r".*decision=(\w+).*source=(\w+).*", r"\1 \2", name): value
        for name, value in seen(engine).items()
        if name.startswith("keylatch_decisions_total")
    }


def header(created: Created) -> list[bytes]:
    return [f"Bearer {created.token.reveal()}".encode()]


async def make(engine: Engine, **fields: Any) -> Created:
    return await (await engine.keyring()).create("org", "a key", **fields)


@pytest.mark.anyio
async def test_decisions_are_counted_where_they_are_made(
    make_engine: MakeEngine, generous_redis_timeouts: None
) -> None:
    """By decision and by source: each check once, whatever it met on the way."""
    redis = FakeServer()
    first, second = (make_engine(redis=FakeAsyncRedis(server=redis)) for _ in range(2))
    created = await make(first)
    sending = await make(first, permission="SENDING")
    right = header(created)[0]
    wrong = right[:-1] + (b"1" if right.endswith(b"0") else b"0")
    forged = wrong[:20] + wrong[20:].swapcase()
    only_full = Requirement(frozenset(("FULL",)))
    for _ in range(3):
        assert isinstance(await first.authenticate(header(created)), Allow)
    await wait_until(FakeAsyncRedis(server=redis).keys)  # what was found is put there by a task
    assert isinstance(await second.authenticate(header(created)), Allow)
    for values in ([], [b"Basic x"], [b"Bearer"], [wrong], [forged]):
        assert isinstance(await second.authenticate(values), Deny)
    for _ in range(2):
        assert await second.authenticate(header(sending), only_full) == Deny(
            Reason.INSUFFICIENT_SCOPE, "FULL"
        )
    await (await first.keyring()).delete("org", created.record.id)
    for _ in range(3):
        assert isinstance(await second.authenticate(header(created)), Deny)
    assert decided(first) == {"allow store": 1, "allow l1": 2}
    assert decided(second) == {
        "allow l2": 1,
        "missing header": 2,
        "malformed header": 1,
        "wrong_secret l1": 1,
        "forged mac": 1,
        "insufficient_scope store": 1,
        "insufficient_scope l1": 1,
        "revoked store": 1,
        "revoked negative_cache": 2,
    }
    await first.stop()
    await second.stop()


@pytest.mark.anyio
async def test_stages_are_timed(make_engine: MakeEngine) -> None:
    """L2, store and hash each time; hits and headers some of the time."""
    engine = make_engine(redis=FakeAsyncRedis())
    created = await make(engine)
    for _ in range(200):
        await engine.authenticate(header(created))
    found = seen(engine)
    timed = {  # the first of the 64 was no hit
        name: found[f"keylatch_stage_seconds_count{{stage={name}}}"]
        for name in ("parse", "l1", "l2", "store", "hash")
    }
    assert timed == {"parse": 1, "l1": 63, "l2": 1, "store": 1, "hash": 1}
    assert found["keylatch_stage_seconds_sum{stage=l1}"] > 0
    assert found["keylatch_decisions_total{decision=allow,source=l1}"] == 199
    await engine.stop()  # stores uses: then some are timed again
    await engine.start()
    for _ in range(3):
        await engine.authenticate(header(created))
    assert seen(engine)["keylatch_stage_seconds_count{stage=l1}"] == 65
    await engine.stop()


@pytest.mark.anyio
async def test_a_request_without_a_header_is_no_hit_to_time(engine: Engine) -> None:
    """Also while hits are timed."""
    assert await engine.authenticate([]) == Deny(Reason.MISSING)
    assert await engine.authenticate([b"Bearer a", b"Bearer b"]) == Deny(Reason.MALFORMED)


def test_an_engine_has_few_attributes(make_engine: MakeEngine) -> None:
    """CPython 3.11 keeps fewer than 30 in an array; a 30th costs every hit 50 ns."""
    assert len(vars(make_engine())) < 30


def test_a_count_loses_nothing_between_threads() -> None:
    """And to look at it changes nothing."""
    count = Counter()

    def add() -> None:
        for _ in range(10_000):
            next(count.steps)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert count.value <= 80_000
    assert [count.value, count.value] == [80_000, 80_000]


def test_a_histogram_counts_up_to_its_bounds() -> None:
    """As Prometheus has it: at most so long, and the last one counts all."""
    histogram = Histogram((0.001, 0.01))
    for seconds in (0.0005, 0.001, 0.002, 5.0):
        histogram.observe(seconds)
    buckets, total = histogram.read()
    assert buckets == [("0.001", 2), ("0.01", 3), ("+Inf", 4)]
    assert total == pytest.approx(5.0035)


@pytest.mark.anyio
async def test_two_engines_have_one_page(make_engine: MakeEngine) -> None:
    """Distinguished by name; two equal ones in one registry fail at once."""
    api, console = make_engine(), make_engine()
    created = await make(api)
    await api.authenticate(header(created))
    found = numbers(page_of(api=api, console=console))
    assert found["keylatch_decisions_total{decision=allow,engine=api,source=store}"] == 1
    assert found["keylatch_decisions_total{decision=allow,engine=console,source=store}"] == 0
    registry = CollectorRegistry()
    registry.register(Collector(api))
    with pytest.raises(ValueError, match=r"[Dd]uplicate"):
        registry.register(Collector(console))
    for wrong in ((), (api,)):
        with pytest.raises(ValueError, match="either one engine"):
            Collector(*wrong, **({"console": console} if wrong else {}))
    await api.stop()


@pytest.mark.anyio
async def test_an_engine_that_was_not_started_has_numbers_too(make_engine: MakeEngine) -> None:
    """A scrape before the start is no error."""
    found = numbers(page_of(make_engine()))
    assert found["keylatch_cache_entries{type=keys}"] == 0


def test_labels_have_few_values(make_engine: MakeEngine) -> None:
    """All of them are there from the start, so that no key, path or name can add one."""
    samples = numbers(page_of(make_engine()))
    assert 150 < len(samples) < 250
    assert not any("key_" in name for name in samples)


# What must stay 0


class DeafAuthenticator(Authenticator):
    """The broken twin: what it has accepted once, it accepts for ever."""

    def _still_valid(self, entry: Any) -> bool:
        return True


class Deaf(Engine):
    """An engine with it."""

    authenticator_class = DeafAuthenticator


class Moved(Store):
    """A store whose time is the test's."""

    def __init__(self, url: str, clock: Clock) -> None:
        super().__init__(url)
        self._clock = clock
        self._poll = self.leases.poll
        self.leases.poll = self.poll  # type: ignore[method-assign]

    async def poll(
        self, member: str, known: Position, seconds: float, pending: Sequence[Invalidation] = ()
    ) -> Poll:
        return replace(await self._poll(member, known, seconds), store_seconds=self._clock())


async def accepted_late(kind: type[Engine], url: str, clock: Clock) -> tuple[list[bool], float]:
    """Use a key, have another process revoke it, and use it on for a while."""

    def started(kind: type[Engine]) -> Engine:
        settings = Settings.load(store=url, redis="", lease=1)
        hasher = Hasher("argon2id", CHEAPEST)
        return kind(settings, clock=clock, timer=clock, hasher=hasher, store=Moved(url, clock))

    engine, other = started(kind), started(Engine)
    created = await make(other)
    await other.stop()  # a member that does not run is waited for
    accepted = []
    for turn in range(5):
        if isinstance(await engine.authenticate(header(created)), Allow):
            accepted.append(True)
        await engine._usage.flush()
        if turn == 1:
            await (await other.keyring()).delete("org", created.record.id)
            await other.stop()
        clock.tick(5)
    late = seen(engine).get("keylatch_accepted_after_revocation_total", 0)
    await engine.stop()
    return accepted, late


@pytest.mark.anyio
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_what_is_accepted_after_a_revocation_is_found(
    database: str, store_url: str, clock: Clock, request: pytest.FixtureRequest
) -> None:
    """A process that goes on accepting a revoked key finds that out; a right one finds nothing."""
    url = store_url
    if database == "postgresql":
        url = request.getfixturevalue("postgres").new_database()
    accepted, late = await accepted_late(Engine, url, clock)
    assert (len(accepted), late) == (2, 0)
    url = url if database == "sqlite" else request.getfixturevalue("postgres").new_database()
    accepted, late = await accepted_late(Deaf, url, clock)
    assert len(accepted) == 5
    assert late >= 2, "the first look learns of it, the later ones find it"


@pytest.mark.anyio
async def test_a_change_is_no_false_alarm(engine: Engine, clock: Clock) -> None:
    """A key that is renamed, or is new, is used right on."""
    created = await make(engine)
    keyring = await engine.keyring()
    for number in range(4):
        assert isinstance(await engine.authenticate(header(created)), Allow)
        await keyring.change("org", created.record.id, name=f"name {number}")
        assert isinstance(await engine.authenticate(header(created)), Allow)
        await engine._usage.flush()
        clock.tick(5)
    assert "keylatch_accepted_after_revocation_total" not in seen(engine)


# Parts


@pytest.mark.anyio
async def test_a_full_queue_is_counted(make_engine: MakeEngine) -> None:
    """Rejections, and what is under way."""
    gate = threading.Event()

    class GatedHasher(Hasher):
        """Its one thread is occupied until the gate opens."""

        async def verify(self, stored: str, token: Token) -> VerifyResult:
            return await self._check_pool.run(lambda: gate.wait() and stored == "")

    engine = make_engine(hasher=GatedHasher("argon2id", CHEAPEST, workers=1, queue=0))
    keys = [await make(engine) for _ in range(4)]
    checks = [asyncio.create_task(engine.authenticate(header(key))) for key in keys]

    async def others_are_refused() -> bool:
        return sum(map(asyncio.Task.done, checks)) == 3

    await wait_until(others_are_refused)
    gate.set()
    refused = (await asyncio.gather(*checks)).count(Deny(Reason.BUSY))
    found = seen(engine)
    assert refused == 3
    assert found["keylatch_hashes_rejected_total"] == refused
    assert found["keylatch_decisions_total{decision=busy,source=none}"] == refused
    assert "keylatch_hashes_in_progress{pool=checks}" not in found
    assert "keylatch_component_healthy{component=hashing}" not in found
    await engine.stop()


@pytest.mark.anyio
async def test_redis_is_counted(make_engine: MakeEngine, store_url: str) -> None:
    """Forged values, errors, and the breaker; a deployment without Redis has none of them."""
    server = FakeServer()
    engine = make_engine(redis=FakeAsyncRedis(server=server))
    keys = [await make(engine) for _ in range(3)]
    async with FakeAsyncRedis(server=server) as anybody:
        for key in keys[:2]:
            name = f"keylatch:{{{engine._invalidations.epoch}}}:{key.record.id}"
            await anybody.set(name, b"x" * 100)
    for key in keys[:2]:
        assert isinstance(await engine.authenticate(header(key)), Allow)
    assert seen(engine)["keylatch_redis_forged_total"] == 2
    assert "keylatch_redis_breaker_open" not in seen(engine)
    server.connected = False
    assert isinstance(await engine.authenticate(header(keys[2])), Allow)
    found = seen(engine)
    assert found["keylatch_redis_errors_total"] >= 1
    assert found["keylatch_redis_breaker_open"] == 1
    assert "keylatch_component_healthy{component=redis}" not in found
    await engine.stop()
    assert not any("redis" in name for name in numbers(page_of(make_engine())))


@pytest.mark.anyio
async def test_caches_and_uses_are_counted(make_engine: MakeEngine, clock: Clock) -> None:
    """Sizes, what waits to be stored, and the store's errors."""
    engine = make_engine()
    created = await make(engine)
    await engine.authenticate(header(created))
    found = seen(engine)
    assert found["keylatch_cache_entries{type=keys}"] == 1
    assert found["keylatch_cache_entries{type=tombstones}"] == 1
    assert found["keylatch_usage_pending"] == 1
    await engine._usage.flush()
    assert "keylatch_usage_pending" not in seen(engine)
    await engine.stop()


@pytest.mark.long
@pytest.mark.anyio
async def test_lost_uses_are_counted() -> None:
    """Beyond 50,000 keys that wait, a use is lost, and counted as dropped."""
    from keylatch.caches.local_cache import UsageCounter

    async def write(uses: object, batch: object) -> None:
        raise StoreUnavailable("down")

    usage = UsageRecorder(write)
    for number in range(50_003):
        usage.record(UsageCounter(f"key_{number}"), 1)
    await usage.flush()
    assert (usage.pending, usage.dropped) == (50_000, 3)


@pytest.mark.anyio
async def test_a_restored_store_is_counted(make_engine: MakeEngine) -> None:
    """The alarm stays on the page, also if the log was not read."""
    engine = make_engine()
    await make(engine)
    created = await make(engine)
    assert "keylatch_store_restored_total" not in seen(engine)
    # As if it had known another state of the store.
    engine._invalidations.position = Position(engine._invalidations.seq + 10, 1)
    for _ in range(3):
        await engine.authenticate(header(created))
    await engine._tasks.stop()  # it gives the store a new epoch
    await engine.authenticate(header(created))
    assert seen(engine)["keylatch_store_restored_total"] == 1
    await engine.stop()


@pytest.mark.anyio
async def test_a_lease_is_on_the_page(postgres: PostgresServer, clock: Clock) -> None:
    """How old, how long it lasts; how long changes took to be known everywhere."""
    url = postgres.new_database()
    settings = Settings.load(store=url, redis="")
    engine = Engine(settings, clock=clock, timer=clock, hasher=Hasher("argon2id", CHEAPEST))
    created = await make(engine)
    await (await engine.keyring()).delete("org", created.record.id)
    found = seen(engine)
    assert 0 < found["keylatch_lease_left_seconds"] <= 1
    assert found["keylatch_propagation_seconds_count"] == 1, "a new key waits for no process"
    assert found["keylatch_component_healthy{component=lease}"] == 1
    clock.tick(30)
    found = seen(engine)
    assert found["keylatch_lease_age_seconds"] >= 30
    assert "keylatch_lease_left_seconds" not in found
    assert "keylatch_component_healthy{component=lease}" not in found
    await engine.stop()


# The sidecar's page


def test_the_sidecar_has_a_page(sidecar: Sidecar, client: httpx.Client) -> None:
    """In Prometheus' format, without a key on its own listener: decisions, and the process."""
    with sidecar.probe() as anybody:
        before = numbers(anybody.get("/metrics").text)
        assert client.get("/verify").status_code == 200
        assert client.get("/verify").status_code == 200
        answer = anybody.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    after = numbers(answer.text)
    hits = "keylatch_decisions_total{decision=allow,source=l1}"
    assert after[hits] - before[hits] >= 1
    assert after["process_resident_memory_bytes"] > 0
    assert client.headers["Authorization"].encode()[-20:] not in answer.content


def test_no_secret_is_on_the_page(
    sidecar: Sidecar, client: httpx.Client, admin_key: Created
) -> None:
    """Nor any name, id or path: labels are bounded, and clients that scrape need not be trusted."""
    client.post("/v1/api-keys", json={"name": "canary"})
    page = client.get("/metrics").text
    record = admin_key.record
    for word in (record.id, record.organization_id, "canary", admin_key.token.reveal()[-41:]):
        assert word not in page


def test_the_page_is_for_operators(sidecar: Sidecar, admin_key: Created) -> None:
    """On the main listener it needs a key that may manage; the document of the API as well."""
    small = sidecar.create(admin_key.record.organization_id, "small", permission="SENDING")
    for path in ("/metrics", "/openapi.json"):
        seen = []
        for key in (None, small, admin_key):
            with sidecar.client(key) as client:
                seen.append(client.get(path).status_code)
        assert seen == [401, 403, 200]


def test_the_listener_for_metrics_serves_nothing_else(sidecar: Sidecar, admin_key: Created) -> None:
    """No key is allowed more there, and no check can be requested."""
    credential = {"Authorization": f"Bearer {admin_key.token.reveal()}"}
    with sidecar.probe() as probe:
        for path in ("/metrics", "/healthz", "/readyz"):
            assert probe.get(path).status_code == 200
        for path in ("/v1/api-keys", "/v1/api_keys", "/verify", "/ext_authz/x", "/openapi.json"):
            assert probe.get(path, headers=credential).status_code == 404
        assert probe.post("/leaked", json={"token": "x"}).status_code == 404


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_prometheus_has_a_listener_of_its_own(operator: Operator, workers: int) -> None:
    """Beside a main one and one for management, which is a socket that it could not reach."""
    port, metrics_port = free_port(), free_port()
    main, metrics = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
    words = ["--port", str(port), "--metrics-port", str(metrics_port), "--workers", str(workers)]
    admin = operator.folder / "admin.sock"
    with served(operator, *words, "--admin-uds", str(admin)):
        eventually(lambda: answers(metrics))
        page = send(metrics, b"GET /metrics")
        assert (page.status, b"keylatch_decisions_total" in page.body) == (200, True)
        assert b'"components"' in send(metrics, b"GET /readyz").body
        assert b'"components"' not in send(main, b"GET /readyz").body
        assert send(main, b"GET /metrics").status == 404
        assert send(admin, b"GET /metrics").status == 200


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_all_workers_are_on_every_page(operator: Operator, workers: int) -> None:
    """Whichever worker answers, and for management keys only."""
    key = operator.create()
    port, admin = free_port(), free_port()
    asking, managing = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
    credential = f"Authorization: Bearer {key['token']}".encode()
    words = ["--port", str(port), "--admin-port", str(admin), "--workers", str(workers)]

    def page() -> Numbers:
        return numbers(send(managing, b"GET /metrics").body.decode())

    def allowed() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in page().items():
            if "decision=allow" in name:
                worker = re.search(r"worker=(\d+)", name)
                who = worker[1] if worker else ""
                found[who] = found.get(who, 0) + value
        return found

    everybody = {""} if workers == 1 else {"0", "1"}
    with served(operator, *words) as process:
        eventually(lambda: answers(asking) and allowed().keys() == everybody)
        assert send(asking, b"GET /metrics", credential).status == 404
        for _ in range(40):
            assert send(asking, b"GET /verify", credential).status == 200
        assert [sum(allowed().values()) for _ in range(6)] == [40] * 6
        process.terminate()
        stopped = wait_for_exit(process)
        assert (stopped.exit_code, "Traceback" in stopped.stderr) == (0, False)


@pytest.mark.anyio
async def test_a_worker_that_ends_leaves_its_number(
    tmp_path: Path, make_engine: MakeEngine
) -> None:
    """So there are never more values of `worker` than workers; one that is gone is just missing."""

    def workers(text: str) -> set[str]:
        return set(re.findall(r'worker="(\d+)"', text))

    first, second, third = (MetricsPage(make_engine(), tmp_path) for _ in range(3))
    async with second.shared_with_workers():
        async with first.shared_with_workers():
            assert workers(await second.text()) == {"0", "1"}
        assert workers(await second.text()) == {"0"}
        (tmp_path / "1.sock").touch()  # as one that was killed leaves behind
        assert workers(await second.text()) == {"0"}
        async with third.shared_with_workers():
            assert workers(await third.text()) == {"0", "1"}


def test_pages_are_merged_by_family() -> None:
    """Prometheus wants each family in one piece."""
    a, b = "# HELP a x\n# TYPE a counter\n", "# HELP b y\n# TYPE b gauge\n"
    first = f'{a}a{{w="0"}} 1.0\n{b}b{{w="0"}} 2.0\n'
    second = f'{a}a{{w="1"}} 3.0\n'
    assert merge([first, second, ""]) == (f'{a}a{{w="0"}} 1.0\na{{w="1"}} 3.0\n{b}b{{w="0"}} 2.0\n')
