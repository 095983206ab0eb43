"""The store's own secrets: rotated under load, without a refused request."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from keylatch.authentication.authenticator import CacheMiss
from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.errors import HashingFailed, SecretInUse, StoreUnavailable
from keylatch.management.store_secrets import SHARED_CACHE_SECONDS
from keylatch.revocation.notices import Notice, Signer
from keylatch.settings import Settings
from keylatch.storage.secrets import KINDS
from keylatch.storage.store import Poll, Store
from tests.support.clock import Clock
from tests.support.command_line import Operator
from tests.support.engines import MakeEngine, Times, wait_until
from tests.support.servers import PostgresServer, RedisServer
from tests.support.stores import StoreTests

NOW = 1_800_000_000_000


def bearer(token: Token) -> list[bytes]:
    return [b"Bearer " + token.reveal().encode()]


async def create(engine: Engine, name: str = "ci") -> Token:
    return (await (await engine.keyring()).create("acme", name)).token


class VaultContract(StoreTests):
    """What both databases promise of the secrets that they keep."""

    async def test_what_is_introduced_makes_nothing_yet(self, store: Store) -> None:
        """First it is enabled, after the primary one; then it is primary, and comes first."""
        before = await store.secrets.load()
        seq = await store.secrets.add_pending(KINDS, NOW)
        known = await store.secrets.load()
        assert known.as_of == seq == before.as_of + 1
        assert known.mac_keys[0] == before.mac_keys[0]
        assert known.peppers[0] == before.peppers[0]
        assert (len(known.mac_keys), len(known.peppers)) == (2, 2)
        await store.secrets.promote(KINDS, NOW)
        after = await store.secrets.load()
        assert after.mac_keys == known.mac_keys[::-1]
        assert after.peppers == known.peppers[::-1]

    async def test_every_step_is_audited(self, store: Store) -> None:
        """The invalidations since then contain the secrets, and no key."""
        since = (await store.secrets.load()).as_of
        await store.secrets.add_pending(KINDS, NOW)
        await store.secrets.promote(KINDS, NOW)
        assert {
            touched[1:3] for touched in (await store.invalidations.since(since)).invalidations
        } == {(None, "*")}

    async def test_a_rotation_that_was_cut_off_is_finished(self, store: Store) -> None:
        """No second secret is created, and processes that may have missed it are notified again."""
        first = await store.secrets.add_pending(["mac"], NOW)
        assert await store.secrets.add_pending(["mac"], NOW) == first + 1
        assert len((await store.secrets.load()).mac_keys) == 2
        await store.secrets.promote(["mac"], NOW)
        await store.secrets.promote(["mac"], NOW)
        assert [each.status for each in await store.secrets.infos() if each.kind == "mac"] == [
            "primary",
            "enabled",
        ]

    async def test_only_what_was_replaced_long_ago_is_retired(self, store: Store) -> None:
        """Not the primary, not a pending one, not one that was just replaced."""
        oldest = {each.kind: each.id for each in await store.secrets.infos()}
        assert await store.secrets.retire(oldest["mac"], NOW, NOW) is None
        await store.secrets.add_pending(KINDS, NOW)
        waiting = max(each.id for each in await store.secrets.infos())
        assert await store.secrets.retire(oldest["mac"], NOW, NOW) is None
        assert await store.secrets.retire(waiting, NOW, NOW) is None
        await store.secrets.promote(["mac"], NOW)
        assert await store.secrets.retire(oldest["mac"], NOW - 1, NOW) is None
        assert await store.secrets.retire(oldest["pepper"], NOW, NOW) is None
        assert await store.secrets.retire(oldest["mac"], NOW, NOW) is not None
        assert oldest["mac"] not in [each.id for each in await store.secrets.infos()]


@pytest.mark.anyio
class TestSQLite(VaultContract):
    """On a file."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


@pytest.mark.anyio
class TestPostgreSQL(VaultContract):
    """On a server."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()

    async def test_a_process_without_the_store_rejects_no_token_as_forged(
        self, url: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A MAC key that it has not loaded may have created it: 503 once its lease is over. A token
        with no key's MAC is refused all the same."""
        engines = [
            Engine(Settings.load(store=url, redis="", hasher="sha256"), clock=clock, timer=clock)
            for _ in range(2)
        ]
        for engine in engines:
            await engine.start()
        cut, rotator = engines
        await create(cut)
        unknown = MacKeys([b"s" * 32]).mint("kl", "live")
        miscopied = Token(unknown.reveal()[:-12] + unknown.reveal()[-12:].swapcase())
        assert cut.authenticator.check_token_cached(unknown) == Deny(Reason.FORGED)

        async def fail(*args: Any, **kwargs: Any) -> Poll:
            raise StoreUnavailable("cut off by the test")

        for repository, name in (
            (cut.store.leases, "poll"),
            (cut.store.invalidations, "since"),
            (cut.store.keys, "find"),
            (cut.store.secrets, "load"),
        ):
            monkeypatch.setattr(repository, name, fail)
        clock.tick(1)
        assert await cut.authenticate(bearer(unknown)) == Deny(Reason.UNAVAILABLE)
        assert await cut.authenticate(bearer(miscopied)) == Deny(Reason.FORGED)
        rotation = asyncio.create_task((await rotator.store_secrets()).rotate())
        while not rotation.done():  # it waits until the lease of the one that is cut off is over
            clock.tick(0.1)
            await asyncio.sleep(0.01)
        created = await create(rotator)
        assert await cut.authenticate(bearer(created)) == Deny(Reason.UNAVAILABLE)
        monkeypatch.undo()
        assert isinstance(await cut.authenticate(bearer(created)), Allow)
        assert await cut.authenticate(bearer(unknown)) == Deny(Reason.FORGED)
        for engine in engines:
            await engine.stop()


@pytest.fixture
async def engines(make_engine: MakeEngine) -> AsyncIterator[list[Engine]]:
    """Two processes that share a Redis."""
    redis = FakeAsyncRedis()
    engines = [make_engine(redis=redis) for _ in range(2)]
    for engine in engines:
        await engine.start()
    yield engines
    for engine in engines:
        await engine.stop()


@pytest.mark.anyio
async def test_old_and_new_keys_are_good_in_every_process(engines: list[Engine]) -> None:
    """No request waits and no process restarts; new tokens have a MAC of the new key."""
    here, there = engines
    old = await create(here)
    before = await here.store.secrets.load()
    await (await here.store_secrets()).rotate()
    new = await create(here)
    after = await here.store.secrets.load()
    assert not MacKeys(before.mac_keys).verify_mac(new)
    assert MacKeys(after.mac_keys[:1]).verify_mac(new)
    for engine in engines:
        for token in (old, new):
            assert isinstance(await engine.authenticate(bearer(token)), Allow)
    assert MacKeys(after.mac_keys[:1]).verify_mac(await create(there)), "it makes with it as well"


@pytest.mark.anyio
async def test_what_redis_holds_stays_readable(
    generous_redis_timeouts: None,
    engines: list[Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Values under the old pepper are read, those under the new one as well, and none is counted
    as forged."""
    here, there = engines
    tokens = [await create(here)]
    assert isinstance(await here.authenticate(bearer(tokens[0])), Allow)
    await (await here.store_secrets()).rotate(["pepper"])
    tokens.append(await create(here))
    assert isinstance(await here.authenticate(bearer(tokens[1])), Allow)

    async def redis_knows() -> bool:
        return len(await here._redis.keys()) == len(tokens)

    await wait_until(redis_knows)  # it is written in the background
    caplog.clear()

    async def fail(stored: str, token: Token) -> Any:
        raise HashingFailed("Redis must save the hash, says the test")

    monkeypatch.setattr(there.hasher, "verify", fail)
    for token in tokens:
        assert isinstance(await there.authenticate(bearer(token)), Allow)
    assert caplog.records == []


# A pepper from outside of the store


@pytest.fixture
def secret_file(tmp_path: Path) -> Callable[..., str]:
    """A new file with these secrets, the newest first."""

    def write(*secrets: str) -> str:
        path = tmp_path / f"pepper-{'-'.join(secrets)}"
        path.write_text("\n".join(secret * 32 for secret in secrets))
        path.chmod(0o600)
        return str(path)

    return write


class Processes:
    """Processes that share a store and a Redis, each with a pepper file of its own or none."""

    def __init__(self, make_engine: MakeEngine) -> None:
        self._make_engine = make_engine
        self._server = FakeServer()
        self.engines: list[Engine] = []

    def new(self, pepper_file: str = "") -> Engine:
        redis = FakeAsyncRedis(server=self._server)
        self.engines.append(self._make_engine(redis=redis, pepper_file=pepper_file))
        return self.engines[-1]

    async def let_values_expire(self) -> None:
        """What Redis holds lives for five minutes."""
        await FakeAsyncRedis(server=self._server).flushall()

    async def values(self) -> int:
        """How many Redis holds."""
        return int(await FakeAsyncRedis(server=self._server).dbsize())

    async def check(self, pepper_file: str, token: Token) -> tuple[bool, int]:
        """Whether a new process lets a token in, and how many values it took for forged."""
        engine = self.new(pepper_file)
        decision = await engine.authenticate(bearer(token))
        assert engine._opened is not None
        assert engine._opened.shared_cache is not None
        forged = engine._opened.shared_cache.forged.value
        await engine.stop()
        return isinstance(decision, Allow), forged


@pytest.fixture
def processes(make_engine: MakeEngine) -> Processes:
    return Processes(make_engine)


@pytest.mark.anyio
async def test_processes_with_other_pepper_files_read_nothing_of_each_other(
    processes: Processes, secret_file: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """They refuse no key; what they find in Redis is counted, and the log names the cause."""
    creator = processes.new(secret_file("a"))
    token = await create(creator)
    assert isinstance(await creator.authenticate(bearer(token)), Allow)
    await creator.stop()
    assert await processes.check(secret_file("a"), token) == (True, 0)
    for other in (secret_file("b"), "", secret_file("c", "b")):
        assert await processes.check(other, token) == (True, 1)
        assert await processes.check(secret_file("a"), token) == (True, 1)
    assert "KEYLATCH_PEPPER_FILE" in caplog.text


@pytest.mark.anyio
async def test_a_pepper_file_rotates(processes: Processes, secret_file: Callable[..., str]) -> None:
    """The first line writes and all of them read, so a new secret is added below, and then goes to
    the top: processes of one step read what those of the step before or after it write."""
    steps = [secret_file(*step) for step in ("a", "ab", "ba", "b")]
    token = await create(processes.new(steps[0]))
    for before, after in itertools.pairwise(steps):
        for writer, reader in ((before, after), (after, before)):
            await processes.let_values_expire()
            assert await processes.check(writer, token) == (True, 0)
            assert await processes.check(reader, token) == (True, 0)
            assert await processes.values() == 1
    for engine in processes.engines:
        await engine.stop()


@pytest.mark.anyio
async def test_the_store_alone_signs_nothing_where_there_is_a_pepper_file(
    processes: Processes, secret_file: Callable[..., str], store_url: str
) -> None:
    """Neither values nor notices; the store's peppers continue to rotate."""
    process = processes.new(secret_file("a"))
    token = await create(process)
    read = await (stolen := Store(store_url)).open(NOW)
    kept = await process.store.secrets.load()
    assert set(read.peppers).isdisjoint(kept.peppers)
    changes = await process.store.invalidations.since(0)
    signed = Signer(read.peppers).sign(Notice(0, changes))
    assert Signer(kept.peppers).verify(signed) is None
    assert Signer(read.peppers).verify(signed) is not None, "the twin without a file"
    await (await process.store_secrets()).rotate(["pepper"])
    assert len((await process.store.secrets.load()).peppers) == 2
    assert isinstance(await process.authenticate(bearer(token)), Allow)
    await stolen.close()
    await process.stop()


@pytest.mark.anyio
async def test_a_process_with_old_secrets_refuses_no_key(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that only a newer key can have made: it reads them first, or it is unavailable."""
    here, there = engines
    await (await here.store_secrets()).rotate()
    new = await create(here)

    async def fail() -> Any:
        raise StoreUnavailable("broken by the test")

    assert isinstance(there.authenticator.check_token_cached(new), CacheMiss)
    monkeypatch.setattr(there.store.secrets, "load", fail)
    assert await there.authenticate(bearer(new)) == Deny(Reason.UNAVAILABLE)
    monkeypatch.undo()
    assert isinstance(await there.authenticate(bearer(new)), Allow)


@pytest.mark.anyio
async def test_a_herd_reads_the_secrets_once(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred unknown tokens after a rotation cause one reload, and none before the next."""
    here, there = engines
    await (await here.store_secrets()).rotate()
    requests = 0
    load = there.store.secrets.load

    async def counted() -> Any:
        nonlocal requests
        requests += 1
        return await load()

    monkeypatch.setattr(there.store.secrets, "load", counted)
    unknown = [MacKeys([b"s" * 32]).mint("kl", "live") for _ in range(100)]
    for _ in range(2):
        verdicts = await asyncio.gather(*(there.authenticate(bearer(token)) for token in unknown))
        assert set(verdicts) == {Deny(Reason.FORGED)}
    assert requests == 1


@pytest.mark.anyio
async def test_a_retired_mac_key_ends_its_tokens(engine: Engine, clock: Clock) -> None:
    """It is deleted when it was replaced long enough ago; then its tokens are forged ones."""
    old = await create(engine)
    store_secrets = await engine.store_secrets()
    first = next(each.id for each in await store_secrets.list() if each.kind == "mac")
    with pytest.raises(SecretInUse, match="everything new"):
        await store_secrets.retire(first)
    clock.tick(1)
    await store_secrets.rotate()
    clock.tick(SHARED_CACHE_SECONDS - 1)
    with pytest.raises(SecretInUse, match="less than 300 seconds"):
        await store_secrets.retire(first)
    clock.tick(1)
    new = await create(engine)
    assert await store_secrets.count_dependent_keys(first) == 1
    await store_secrets.retire(first)
    with pytest.raises(SecretInUse, match="no such secret"):
        await store_secrets.retire(first)
    assert await engine.authenticate(bearer(old)) == Deny(Reason.FORGED)
    assert isinstance(await engine.authenticate(bearer(new)), Allow)


@pytest.mark.long
def test_the_command_line_rotates_and_retires(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output lists secrets, never their values; a MAC key is deleted only with --yes."""
    old = operator.create()["token"]
    assert operator.run("secrets", "rotate", "--pepper").stderr.startswith(
        "Rotated pepper: in force"
    )
    assert operator.run("secrets", "rotate").exit_code == 0
    listed = json.loads(operator.run("secrets", "list", "--json").stdout)
    roles = [(each["kind"], each["status"]) for each in listed]
    assert roles.count(("pepper", "enabled")) == 2
    assert roles.count(("mac", "enabled")) == 1
    assert set(listed[0]) == {"id", "kind", "since", "status"}
    table = operator.run("secrets", "list").stdout
    assert table.count("accepted") == 3
    retired = {each["kind"]: str(each["id"]) for each in listed if each["status"] == "enabled"}
    assert (
        "less than 300 seconds ago" in operator.run("secrets", "retire", retired["pepper"]).stderr
    )
    monkeypatch.setattr("keylatch.management.store_secrets.SHARED_CACHE_SECONDS", 0)
    assert operator.run("secrets", "retire", retired["pepper"]).exit_code == 0
    refused = operator.run("secrets", "retire", retired["mac"])
    assert (refused.exit_code, "1 live keys are older" in refused.stderr) == (1, True)
    assert operator.run("verify", stdin=old).exit_code == 0
    assert operator.run("secrets", "retire", retired["mac"], "--yes").exit_code == 0
    assert operator.run("verify", stdin=old).exit_code == 1
    assert operator.run("secrets", "retire", "999").exit_code == 1
    audit = operator.run("audit").stdout
    assert (audit.count("secrets.rotate"), audit.count("secrets.retire")) == (2, 2)


# Under load, in two processes


Rotate = Callable[[str, str], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Run:
    """What two processes made of their checks."""

    outcomes: dict[str, int]
    made_with: list[list[int]]


def run(
    folder: Path,
    store_url: str,
    redis: Sequence[str],
    kinds: Sequence[str],
    rotate: Rotate,
) -> Run:
    """Two processes tell each other the tokens they make, while `rotate` runs."""
    logs = [folder / f"{number}.json" for number in range(2)]
    ends = [os.pipe() for _ in range(2)]  # what each of them reads from the other
    worker = Path(__file__).parents[1] / "support/worker_secrets.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(log), kind, store_url, *redis],
            stdin=ends[number][0],
            stdout=ends[1 - number][1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, (log, kind) in enumerate(zip(logs, kinds, strict=True))
    ]
    for end in [*ends[0], *ends[1]]:
        os.close(end)
    with ended(processes):
        for process in processes:
            assert process.stderr is not None
            assert process.stderr.readline() == "ready\n"
        asyncio.run(rotate(store_url, redis[0]))
    reports = [json.loads(log.read_text()) for log in logs]
    outcomes: dict[str, int] = {}
    for each in reports:
        for name, count in each["outcomes"].items():
            outcomes[name] = outcomes.get(name, 0) + count
    return Run(outcomes, [each["made with"] for each in reports])


@contextlib.contextmanager
def ended(processes: Sequence["subprocess.Popen[str]"]) -> Iterator[None]:
    """Ends them when the block ends."""
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.communicate(timeout=60)


def rotations(count: int) -> Rotate:
    """Both secrets so often, at intervals in which the processes get to work."""

    async def rotate(url: str, redis: str) -> None:
        engine = Engine(Settings.load(store=url, redis=redis, hasher="sha256", lease=2))
        store_secrets = await engine.store_secrets()
        for _ in range(count):
            await store_secrets.rotate()
            await asyncio.sleep(0.3)
        await engine.stop()

    return rotate


async def rotate_in_one_step(url: str, redis: str) -> None:
    """A broken twin: new secrets are used before every process has loaded them."""
    engine = Engine(Settings.load(store=url, redis=redis, hasher="sha256", lease=2))
    await engine.store_secrets()
    for _ in range(5):  # now and then the other one happens to look just then
        await engine.store.secrets.add_pending(KINDS, NOW)
        await engine.store.secrets.promote(KINDS, NOW)
        assert engine._opened is not None
        assert engine._opened.notifier is not None
        await engine._opened.notifier.publish(None)
        await asyncio.sleep(0.6)
    await engine.stop()


SOUND = ("sound", "sound")


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest, store_url: str) -> str:
    if request.param == "sqlite":
        return store_url
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.mark.timeout(900)
def test_both_secrets_rotate_under_load(
    tmp_path: Path, shared_url: str, redis_server: RedisServer, times: Times
) -> None:
    """Two processes create keys and check each other's all the while, warm and cold: none is
    refused, none is unavailable, and in the end both make their tokens with the newest secret."""
    url = redis_server.url
    kinds = ("sound", "without-notifier") if shared_url.startswith("postgresql") else SOUND
    count = times(2, 50)
    result = run(tmp_path, shared_url, [url], kinds, rotations(count))
    print(f"{count} rotations: {result.outcomes}")
    assert result.outcomes.keys() == {"ALLOWED"}, result.outcomes
    assert result.outcomes["ALLOWED"] > 100
    assert result.made_with == [[count, 0], [count, 0]]


def test_the_twin_that_never_reads_its_secrets_again_refuses_good_keys(
    tmp_path: Path, shared_url: str, redis_server: RedisServer
) -> None:
    """The same test catches a process that acknowledges what it does not act upon."""
    url = redis_server.url
    result = run(tmp_path, shared_url, [url], ("sound", "never-reloads"), rotations(2))
    assert result.outcomes["FORGED"] > 0


def test_the_twin_that_rotates_in_one_step_refuses_good_keys(
    tmp_path: Path, postgres: PostgresServer, redis_server: RedisServer
) -> None:
    """Where processes hold leases, one that missed the notice does not know the secret.
    (On SQLite every check sees every commit.)"""
    store_url, url = postgres.new_database(), redis_server.url
    result = run(tmp_path, store_url, [url], ("sound", "without-notifier"), rotate_in_one_step)
    assert result.outcomes["FORGED"] > 0
