"""A PostgreSQL that falls silent: no answer, no reset, and later a network that is sound again."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Connection

from keylatch.core.decisions import KeyRecord
from keylatch.errors import StoreUnavailable
from keylatch.storage.authorization import Actor
from keylatch.storage.blockers import Blockers
from keylatch.storage.store import NotFound, Store
from keylatch.storage.usage import ALLOWED, DAY_MS, Client, UsageBatch
from proxy import Proxy
from tests.storage.test_store import NOW, record
from tests.support.servers import PostgresServer

pytestmark = [pytest.mark.anyio, pytest.mark.long]
MORE_THAN_THE_POOL = 20
AT_ONCE = 5
TODAY = NOW // DAY_MS


@pytest.fixture
async def network(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    """The network between the store and its server."""
    network = Proxy(postgres.port)
    await network.start()
    yield network
    await network.stop()


@pytest.fixture
def parameters() -> str:
    """The query string of the store's URL."""
    return ""


@pytest.fixture
def url(postgres: PostgresServer, network: Proxy, parameters: str) -> str:
    return postgres.new_database().replace(str(postgres.port), str(network.port)) + parameters


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url)
    await store.open(0)
    await store.leases.join("member", 0, seconds=5)
    yield store
    await store.close()


async def test_a_query_to_a_silent_server_fails_in_time(store: Store, network: Proxy) -> None:
    """Every query ends as unavailable, and none of them keeps a place in the pool: when the
    network works again, so does the store."""
    assert (await store.leases.poll("member", 0, seconds=5)).is_member
    with network.blackholing():
        for _ in range(MORE_THAN_THE_POOL // AT_ONCE):
            answers = await asyncio.gather(
                *(store.leases.poll("member", 0, seconds=0.1) for _ in range(AT_ONCE)),
                return_exceptions=True,
            )
            assert [type(answer) for answer in answers] == [StoreUnavailable] * AT_ONCE
    assert (await store.leases.poll("member", 0, seconds=5)).is_member
    assert isinstance(await store.keys.find("key_unknown"), NotFound)


async def test_connecting_to_a_silent_server_keeps_no_place(store: Store, network: Proxy) -> None:
    """More attempts than the pool has places, one after the other, each given up in time: when the
    network is sound again, the next one is answered at once."""
    network.reset_connections()
    with network.blackholing():
        for _ in range(MORE_THAN_THE_POOL):
            with pytest.raises(StoreUnavailable):
                await store.leases.poll("member", 0, seconds=0.05)
    assert (await store.leases.poll("member", 0, seconds=0.5)).is_member


async def test_a_lease_does_not_queue_behind_look_ups(store: Store, network: Proxy) -> None:
    """Look-ups that fell into the silence wait it out; the lease is renewed, or the process joins
    again, as soon as it ends."""
    await store.keys.find("key_unknown")
    with network.blackholing():
        stuck = [
            asyncio.create_task(store.keys.find("key_unknown")) for _ in range(MORE_THAN_THE_POOL)
        ]
        with pytest.raises(StoreUnavailable):
            await store.leases.poll("member", 0, seconds=0.3)
        with pytest.raises(StoreUnavailable):
            await store.leases.join("another", 0, seconds=0.3)
    assert (await store.leases.poll("member", 0, seconds=0.5)).is_member
    assert not all(task.done() for task in stuck)
    await asyncio.gather(*stuck, return_exceptions=True)


async def test_connections_that_died_meanwhile_do_not_show(
    store: Store, network: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that was restarted costs a second attempt and no refusal, however many idle
    connections died with it; and no library fills the log with tracebacks."""
    for _ in range(3):
        known = await asyncio.gather(*(store.keys.find("key_unknown") for _ in range(AT_ONCE)))
        assert [type(one) for one in known] == [NotFound] * AT_ONCE
        network.reset_connections()
        assert isinstance(await store.keys.find("key_unknown"), NotFound)
        network.reset_connections()
        assert (await store.leases.poll("member", 0, seconds=5)).is_member
        network.reset_connections()
    assert caplog.records == []


async def test_a_silent_client_does_not_keep_a_lock(
    store: Store, sound: Store, network: Proxy
) -> None:
    """All writers lock the row of the sequence number: a process that is cut off in the middle of
    a change releases it in two seconds, not when the server gives the connection up."""
    with ExitStack() as silence:

        def change_and_fall_silent(connection: Connection) -> None:
            connection.exec_driver_sql("UPDATE keylatch_meta SET seq = seq + 1")
            silence.enter_context(network.blackholing())

        with pytest.raises(StoreUnavailable, match="in time"):
            await store._database.write(change_and_fall_silent, seconds=0.2)
        await sound.invalidations.start_new_epoch(
            (await sound.invalidations.since(0)).epoch, 1, 0
        )  # it needs the row


@pytest.fixture
async def sound(
    store: Store, postgres: PostgresServer, url: str, network: Proxy
) -> AsyncIterator[Store]:
    """Another process on the same store, whose network is well."""
    sound = Store(url.replace(str(network.port), str(postgres.port)))
    await sound.open(0)
    yield sound
    await sound.close()


async def record_uses(store: Store, number: int, keys: list[str]) -> None:
    counts = {(key_id, TODAY, ALLOWED): 1 for key_id in keys}
    seen = {key_id: Client("192.0.2.0/24", "curl", NOW) for key_id in keys}
    await store.usage.record(
        dict.fromkeys(keys, NOW), UsageBatch("a process", number, TODAY, counts, seen)
    )


async def import_keys(store: Store, number: int, keys: list[str]) -> None:
    await store.keys.add_many([(record(f"{key_id}_{number}"), "hashed") for key_id in keys])


KEYS = [f"key_{n:03}" for n in range(200)]
Say = Callable[[Store, int, list[str]], Coroutine[Any, Any, None]]


async def revoke_while(
    say: Say, eighths: int, store: Store, sound: Store, network: Proxy
) -> tuple[KeyRecord, int] | None:
    """Revoke a key after another process has said only so many eighths of something."""
    before = network.forwarded_bytes
    await say(store, 2 * eighths - 1, KEYS)
    length = network.forwarded_bytes - before
    with network.blackholing(after=length * eighths // 8):
        saying = asyncio.create_task(say(store, 2 * eighths, KEYS))
        while not (network.is_blackholing or saying.done()):  # noqa: ASYNC110 - a network has no events
            await asyncio.sleep(0.001)
        assert network.is_blackholing
        try:
            return await sound.keys.change(
                "acme", KEYS[eighths], NOW, {"deleted_at": NOW}, by=Actor("me")
            )
        finally:
            network.reset_connections()
            saying.cancel()
            await asyncio.wait({saying})


@pytest.fixture
async def keys(store: Store, sound: Store) -> None:
    """Keys to use and to revoke."""
    await sound.keys.add_many([(record(key_id), "hashed") for key_id in KEYS])
    await record_uses(store, 0, KEYS)  # whatever has to be learned once


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("say", [record_uses, import_keys])
async def test_wherever_a_process_falls_silent_a_key_can_be_revoked(
    say: Say, store: Store, sound: Store, network: Proxy
) -> None:
    """It may have sent anything from nothing to nearly all, and hold the locks that it has by then.
    A writer that waits for one of them terminates its session."""
    for eighths in range(1, 8, 2):
        assert await revoke_while(say, eighths, store, sound, network) is not None


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("parameters", ["?application_name=shop"])
async def test_processes_that_are_named_by_their_url_know_each_other(
    store: Store, sound: Store, network: Proxy
) -> None:
    """A writer terminates sessions of keylatch's name and of its own, never those of others."""
    assert await revoke_while(import_keys, 4, store, sound, network) is not None


@pytest.mark.usefixtures("keys")
async def test_a_server_alone_does_not_see_who_fell_silent(
    store: Store, sound: Store, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it waits for is no idle transaction: without its neighbours' help, no key is revoked."""

    async def look_on(self: Blockers, pids: list[int]) -> None:
        pass

    monkeypatch.setattr(Blockers, "_terminate", look_on)
    with pytest.raises(StoreUnavailable, match="in time"):
        await revoke_while(import_keys, 4, store, sound, network)
