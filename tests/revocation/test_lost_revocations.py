"""A store that loses its last changes: what they revoked is refused, and revoked again."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, delete, select

from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Created, Keyring
from keylatch.revocation.invalidations import Break, Invalidations
from keylatch.storage.invalidation_log import Position
from keylatch.storage.schema import audit, invalidations, keys, meta, organizations
from keylatch.storage.store import Found, Invalidation, InvalidationBatch, Store
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio
TABLES = (organizations, keys, invalidations, audit, meta)


class Snapshot:
    """The state of a store, which it is set back to: what was committed since is lost."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def take(self) -> None:
        def work(connection: Connection) -> list[list[dict[str, object]]]:
            return [
                [dict(row._mapping) for row in connection.execute(select(table))]
                for table in TABLES
            ]

        self._rows = await self._store._database.read(work)

    async def restore(self) -> None:
        def work(connection: Connection) -> None:
            for table in reversed(TABLES):
                connection.execute(delete(table))
            for table, rows in zip(TABLES, self._rows, strict=True):
                if rows:
                    connection.execute(table.insert(), rows)

        await self._store._database.write(work)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def store_url(request: pytest.FixtureRequest, store_url: str) -> str:
    if request.param == "sqlite":
        return store_url
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.fixture
async def engine(make_engine: MakeEngine, store_url: str) -> Engine:
    engine = make_engine(store=Store(store_url))
    await engine.start()
    return engine


async def decision_of(engine: Engine, key: Created) -> object:
    return await engine.authenticator.check_token(key.token)


def engine_time(engine: Engine, seconds: float) -> datetime:
    return datetime.fromtimestamp(engine.now_ms() / 1000 + seconds, UTC)


async def repeated(engine: Engine) -> None:
    """Return when the process has asked the store what it has lost."""
    await engine._freshness.poll()
    await asyncio.sleep(0)
    assert engine._opened is not None
    while not engine._opened.lost_revocations.has_repeated_all:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def give_out_numbers(keyring: Keyring, engine: Engine, seq: int) -> None:
    """Other changes until the store is at a sequence number again."""
    while (await engine.store.invalidations.since(2**62)).seq < seq:
        await keyring.create("rival", "other")


@pytest.mark.parametrize("overtaken", [False, True])
async def test_lost_revocations_are_repeated(
    engine: Engine, overtaken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Deletions, and all else that took something away: the key is disabled then, because the
    process does not know more. Also where the lost numbers were given out again. It is audited."""
    keyring = await engine.keyring()
    names = ("deleted", "disabled", "narrowed", "expiring", "rotated", "renamed", "kept")
    made = {name: await keyring.create("acme", name) for name in names}
    snapshot = Snapshot(engine.store)
    await snapshot.take()
    await keyring.delete("acme", made["deleted"].record.id)
    await keyring.change("acme", made["disabled"].record.id, active=False)
    await keyring.change("acme", made["narrowed"].record.id, permission="SENDING")
    await keyring.change("acme", made["expiring"].record.id, expires_at=engine_time(engine, 3600))
    await keyring.rotate("acme", made["rotated"].record.id)
    await keyring.change("acme", made["renamed"].record.id, name="new")
    await engine._freshness.poll()
    seq = engine._invalidations.seq
    await snapshot.restore()
    if overtaken:
        await give_out_numbers(keyring, engine, seq + 1)
    await repeated(engine)
    found = {name: await decision_of(engine, key) for name, key in made.items()}
    assert found["deleted"] == Deny(Reason.REVOKED)
    for name in ("disabled", "narrowed", "expiring", "rotated"):
        assert found[name] == Deny(Reason.DISABLED), name
    for name in ("renamed", "kept"):
        assert isinstance(found[name], Allow), name
    for name in ("deleted", "disabled", "narrowed", "expiring", "rotated"):
        assert f"lost a revocation of key {made[name].record.id}" in caplog.text
    [event] = await keyring.events("acme", 1, key_id=made["deleted"].record.id)
    assert (event.actor, event.action) == ("keylatch", "key.delete")
    await engine.stop()


async def test_lost_revocations_of_organizations_are_repeated(engine: Engine) -> None:
    """Disabled, and all keys revoked; keys that were created since then are none of those."""
    keyring = await engine.keyring()
    disabled, revoked = await keyring.create("acme", "a"), await keyring.create("rival", "b")
    snapshot = Snapshot(engine.store)
    await snapshot.take()
    await keyring.set_organization_active("acme", False)
    await keyring.revoke_all("rival")
    await engine._freshness.poll()
    await snapshot.restore()
    later = keyring.now_ms() + 60_000
    record = replace(revoked.record, id="key_later", created_at=later)
    await engine.store.keys.add(record, "hashed")
    await repeated(engine)
    assert await decision_of(engine, disabled) == Deny(Reason.ORGANIZATION_DISABLED)
    assert await decision_of(engine, revoked) == Deny(Reason.REVOKED)
    found = await engine.store.keys.find("key_later")
    assert isinstance(found, Found)
    assert found.record.deleted_at is None
    await engine.stop()


class Forgets(Invalidations):
    """The broken twin: after a break it believes the store, like any other."""

    def _withhold(self, revocations: Iterable[Invalidation], count: int) -> None:
        return


@pytest.mark.parametrize("kind", [Invalidations, Forgets])
async def test_a_key_is_refused_until_it_is_revoked_again(
    engine: Engine, kind: type[Invalidations], caplog: pytest.LogCaptureFixture
) -> None:
    """Also for as long as the store takes no changes: then with 503, and it is said once."""
    engine._invalidations.__class__ = kind
    keyring = await engine.keyring()
    revoked, kept = await keyring.create("acme", "a"), await keyring.create("acme", "b")
    snapshot = Snapshot(engine.store)
    await snapshot.take()
    await keyring.delete("acme", revoked.record.id)
    await engine._freshness.poll()
    await snapshot.restore()
    assert engine._opened is not None
    lost = engine._opened.lost_revocations
    change = engine.store.keys.change

    async def refuse(*_: object, **__: object) -> None:
        raise StoreUnavailable("permission denied, says the test")

    engine.store.keys.change = refuse  # type: ignore[method-assign]
    await engine._freshness.poll()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await lost._repair(lost._breaks[0])
        accepted = isinstance(await decision_of(engine, revoked), Allow)
        assert accepted == (kind is Forgets)
    assert isinstance(await decision_of(engine, kept), Allow)
    engine.store.keys.change = change  # type: ignore[method-assign]
    await repeated(engine)
    assert await decision_of(engine, revoked) == Deny(Reason.REVOKED)
    await engine.stop()


async def test_what_the_store_still_has_is_not_refused(engine: Engine) -> None:
    """A key was disabled and enabled again before that: the store decides on it as soon as it has
    said what it lacks, also where this process may repeat nothing."""
    keyring = await engine.keyring()
    enabled, revoked = await keyring.create("acme", "a"), await keyring.create("acme", "b")
    for active in (False, True):
        await keyring.change("acme", enabled.record.id, active=active)
    snapshot = Snapshot(engine.store)
    await snapshot.take()
    await keyring.delete("acme", revoked.record.id)
    await engine._freshness.poll()
    await snapshot.restore()

    async def refuse(*_: object, **__: object) -> None:
        raise StoreUnavailable("permission denied, says the test")

    engine.store.keys.change = refuse  # type: ignore[method-assign]
    await engine._freshness.poll()
    while not isinstance(await decision_of(engine, enabled), Allow):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await decision_of(engine, revoked) == Deny(Reason.UNAVAILABLE)
    await engine.stop()


async def test_two_processes_that_notice_at_once_do_not_collide(
    engine: Engine, make_engine: MakeEngine, store_url: str
) -> None:
    """Both repeat the revocation, one of them changes something; one epoch follows."""
    other = make_engine(store=Store(store_url))
    await other.start()
    keyring = await engine.keyring()
    made = [await keyring.create("acme", f"key {number}") for number in range(5)]
    snapshot = Snapshot(engine.store)
    await snapshot.take()
    epoch = engine._invalidations.epoch
    for key in made:
        await keyring.delete("acme", key.record.id, wait=False)
    for process in (engine, other):
        await process._freshness.poll()
    await snapshot.restore()
    await asyncio.gather(repeated(engine), repeated(other))
    for process in (engine, other):
        await process._freshness.poll()
        for key in made:
            assert await decision_of(process, key) == Deny(Reason.REVOKED)
    assert engine._invalidations.epoch == other._invalidations.epoch != epoch
    events = await keyring.events("acme", 100)
    assert [event.action for event in events].count("key.delete") == 5
    await other.stop()
    await engine.stop()


async def test_a_repetition_counts_in_the_history_of_the_leases_only(engine: Engine) -> None:
    """A server that is not the one whose log the process follows proves nothing: there the key may
    be revoked already."""
    keyring = await engine.keyring()
    key = await keyring.create("acme", "a")
    await keyring.delete("acme", key.record.id)
    await engine._freshness.poll()
    assert engine._opened is not None
    known = engine._invalidations.position
    engine._invalidations.position = Position(known.seq, known.row_id + 1)
    engine._invalidations._positions.clear()
    revocation = Invalidation(known.seq, key.record.id, None, known.row_id, "delete")
    with pytest.raises(StoreUnavailable, match="another server"):
        await engine._opened.lost_revocations._repair(
            Break((revocation,), engine._invalidations.epoch, known.seq)
        )
    engine._invalidations.position = known
    await engine.stop()


class Unlocked(Invalidations):
    """The broken twin: a break may come in the middle of a release."""

    def clear(self) -> None:
        super().clear()
        self._lock = contextlib.nullcontext()  # type: ignore[assignment]


class Interrupted(tuple[Invalidation, ...]):
    """Another thread notices a break when these are read for the last time."""

    reads = 0
    thread: threading.Thread

    def __iter__(self) -> Iterator[Invalidation]:
        self.reads += 1
        if self.reads == 2:
            self.thread.start()
            self.thread.join(0.2)  # it is over then, or it waits
        return super().__iter__()


@pytest.mark.parametrize("kind", [Invalidations, Unlocked])
def test_a_break_in_the_middle_of_a_release_forgets_nothing(kind: type[Invalidations]) -> None:
    """On SQLite a thread of a WSGI server may notice the next break while the event loop releases
    what the last one withheld."""
    breaks: list[Break] = []
    known = kind(breaks.append)
    row = Invalidation(2, "key_a", None, 7, "delete")
    known.begin(InvalidationBatch(1, "epoch", True, row_id=6))
    known.apply(InvalidationBatch(2, "epoch", True, (row,), row_id=7, since_row_id=6))
    known.apply(InvalidationBatch(1, "epoch", True, row_id=6))
    rows = Interrupted(breaks[0].revocations)
    restored = InvalidationBatch(0, "epoch", True)
    rows.thread = threading.Thread(target=lambda: known.apply(restored))
    assert known.release(rows, known.history)
    rows.thread.join()
    is_remembered = breaks[1].revocations == (row,)
    assert is_remembered == (not known.accepts("key_a", "acme", 9)) == (kind is Invalidations)


def test_what_another_history_has_is_not_released() -> None:
    """The store lost changes once more while it was asked: its answer was of the history before."""
    known = Invalidations(lambda found: None)
    row = Invalidation(2, "key_a", None, 7, "delete")
    known.begin(InvalidationBatch(1, "epoch", True, row_id=6))
    known.apply(InvalidationBatch(2, "epoch", True, (row,), row_id=7, since_row_id=6))
    known.apply(InvalidationBatch(1, "epoch", True, row_id=6))
    history = known.history
    known.apply(InvalidationBatch(0, "epoch", True))
    assert not known.release((row,), history)
    assert not known.accepts("key_a", "acme", 9)
    assert known.release((row,), known.history)
    assert known.accepts("key_a", "acme", 9)
