"""A change is judged in its own transaction: what ends the acting key before the commit wins.

`ENDINGS` are what may happen to a key after its call was authenticated, `CHANGES` what the call may
be. Each pair is tried on both stores; over sockets see `test_racing.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import KeyRecord, Principal, Reason, principal_of, secret_version_of
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.timestamps import datetime_of
from keylatch.core.validation import NewKey
from keylatch.engine import Engine
from keylatch.errors import CallerRefused, InvalidKeyState, NotPermitted
from keylatch.management.keyring import Created, Keyring
from keylatch.settings import Settings
from keylatch.storage import authorization
from keylatch.storage.authorization import Actor, Authority
from keylatch.storage.database import Database
from keylatch.storage.key_changes import insert_keys
from keylatch.storage.schema import keys
from keylatch.storage.store import Store
from tests.storage.test_store import record
from tests.support.clock import Clock
from tests.support.engines import MakeEngine
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio

ORG = "acme"
DAY_MS = 86_400_000


class Scene:
    """An organisation, a key that acts, and keys that it may act on."""

    def __init__(self, engine: Engine, keyring: Keyring, clock: Clock) -> None:
        self.engine = engine
        self.keyring = keyring
        self.clock = clock

    async def prepare(self) -> None:
        now_ms = self.keyring.now_ms()
        acting = await self.keyring.create(ORG, "acting", expires_at=datetime_of(now_ms + 60_000))
        self.by = principal_of(acting.record)
        self.other = (
            await self.keyring.create(ORG, "other", expires_at=datetime_of(now_ms + 50_000))
        ).record
        rotated = await self.keyring.create(ORG, "rotated", expires_at=datetime_of(now_ms + 50_000))
        done = await self.keyring.rotate(ORG, rotated.record.id, grace=timedelta(seconds=30))
        assert done is not None
        self.rotated = done.record

    async def snapshot(self) -> list[Any]:
        """All that a refused change must not touch."""
        changes = await self.engine.store.invalidations.since(0)
        return [
            changes.seq,
            await self.engine.store.keys.list(ORG, deleted=True),
            await self.engine.store.audit.events(None, 1_000),
        ]


async def deleted(scene: Scene) -> None:
    assert await scene.keyring.delete(ORG, scene.by.key_id)


async def disabled(scene: Scene) -> None:
    assert await scene.keyring.change(ORG, scene.by.key_id, active=False)


async def demoted(scene: Scene) -> None:
    assert await scene.keyring.change(ORG, scene.by.key_id, permission="SENDING")


async def expired(scene: Scene) -> None:
    """By the store's time, which on PostgreSQL no test moves."""
    now_ms = scene.keyring.now_ms()
    assert await scene.engine.store.keys.change(
        ORG, scene.by.key_id, now_ms, {"expires_at": now_ms - 1}
    )


async def organization_disabled(scene: Scene) -> None:
    assert await scene.keyring.set_organization_active(ORG, False)


async def everything_revoked(scene: Scene) -> None:
    assert await scene.keyring.revoke_all(ORG)


async def rotated_away(scene: Scene) -> None:
    assert await scene.keyring.rotate(ORG, scene.by.key_id)


async def rotated_and_old(scene: Scene) -> None:
    assert await scene.keyring.rotate(ORG, scene.by.key_id, grace=timedelta(seconds=30))


async def rotated_and_cancelled(scene: Scene) -> None:
    """The caller came with the secret that was taken back; another one was made at once."""
    done = await scene.keyring.rotate(ORG, scene.by.key_id, grace=timedelta(seconds=30))
    assert done is not None
    scene.by = principal_of(done.record)
    assert await scene.keyring.cancel_rotation(ORG, scene.by.key_id)
    assert await scene.keyring.rotate(ORG, scene.by.key_id, grace=timedelta(seconds=30))


Ending = Callable[[Scene], Awaitable[None]]
ENDINGS: dict[str, tuple[Ending, Reason | None]] = {
    "deleted": (deleted, Reason.REVOKED),
    "disabled": (disabled, Reason.DISABLED),
    "demoted": (demoted, None),
    "expired": (expired, Reason.EXPIRED),
    "organisation disabled": (organization_disabled, Reason.ORGANIZATION_DISABLED),
    "everything revoked": (everything_revoked, Reason.REVOKED),
    "rotated away": (rotated_away, Reason.WRONG_SECRET),
    "rotated, within the grace": (rotated_and_old, None),
    "rotation cancelled": (rotated_and_cancelled, Reason.WRONG_SECRET),
}
"""What happens, and why the key is refused afterwards; None: it is good, and may not do this."""

RAW = ImportedToken("raw:00", "...abcd", "$sha256$00")

Change = Callable[[Scene], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "create": lambda s: s.keyring.create(ORG, "new", by=s.by),
    "create a lesser one": lambda s: s.keyring.create(ORG, "new", permission="SENDING", by=s.by),
    "create many": lambda s: s.keyring.create_many([NewKey(ORG, "a"), NewKey(ORG, "b")], by=s.by),
    "import": lambda s: s.keyring.import_many([(NewKey(ORG, "old"), RAW)], by=s.by),
    "rename": lambda s: s.keyring.change(ORG, s.other.id, name="new", by=s.by),
    "rename itself": lambda s: s.keyring.change(ORG, s.by.key_id, name="new", by=s.by),
    "change": lambda s: s.keyring.change(ORG, s.other.id, permission="SENDING", by=s.by),
    "disable": lambda s: s.keyring.change(ORG, s.other.id, active=False, by=s.by),
    "delete": lambda s: s.keyring.delete(ORG, s.other.id, by=s.by),
    "delete itself": lambda s: s.keyring.delete(ORG, s.by.key_id, by=s.by),
    "delete a family": lambda s: s.keyring.delete(ORG, s.other.id, descendants=True, by=s.by),
    "rotate": lambda s: s.keyring.rotate(ORG, s.other.id, grace=timedelta(seconds=9), by=s.by),
    "rotate itself": lambda s: s.keyring.rotate(
        ORG, s.by.key_id, grace=timedelta(seconds=9), by=s.by
    ),
    "cancel": lambda s: s.keyring.cancel_rotation(ORG, s.rotated.id, by=s.by),
    "finish": lambda s: s.keyring.finish_rotation(ORG, s.rotated.id, by=s.by),
    "revoke all": lambda s: s.keyring.revoke_all(ORG, by=s.by),
    "disable all": lambda s: s.keyring.set_organization_active(ORG, False, by=s.by),
    "end itself": lambda s: s.keyring.revoke_own_secret(s.by),
}

MAY_STILL = {"end itself": ("demoted", "rotated, within the grace")}
"""What a key may do although it can do nothing else any more."""


class OvertakenContract:
    """What both databases promise."""

    @pytest.fixture
    async def scene(self, make_engine: MakeEngine, url: str, clock: Clock) -> AsyncIterator[Scene]:
        engine = make_engine(store=Store(url), lease=0.2)
        await engine.start()
        scene = Scene(engine, await engine.keyring(), clock)
        await scene.prepare()
        yield scene
        await engine.stop()

    @pytest.mark.parametrize("change", CHANGES)
    async def test_a_key_that_is_good_may(self, scene: Scene, change: str) -> None:
        """Otherwise the refusals below would prove nothing."""
        before = await scene.snapshot()
        assert await CHANGES[change](scene)
        assert await scene.snapshot() != before

    @pytest.mark.long  # all pairs of them
    @pytest.mark.parametrize("ending", ENDINGS)
    @pytest.mark.parametrize("change", CHANGES)
    async def test_a_key_that_ended_meanwhile_changes_nothing(
        self, scene: Scene, change: str, ending: str
    ) -> None:
        """The principal is from before; the transaction finds the key as it is now."""
        end, reason = ENDINGS[ending]
        await end(scene)
        before = await scene.snapshot()
        if ending in MAY_STILL.get(change, ()):
            assert await CHANGES[change](scene)
            return
        with pytest.raises(NotPermitted if reason is None else CallerRefused) as refused:
            await CHANGES[change](scene)
        if isinstance(refused.value, CallerRefused):
            assert refused.value.reason is reason
        assert await scene.snapshot() == before

    @pytest.mark.parametrize("change", CHANGES)
    async def test_a_change_whose_answer_was_lost_is_found_done(
        self, scene: Scene, change: str
    ) -> None:
        """The store repeats the transaction: the acting key may be gone by its own work, and that
        is no refusal. It is written once, and waits for no connection of the leases."""
        store = scene.engine.store
        store._monitored.unmonitored = LosesAnswers(store._database)
        before = len(await scene.engine.store.audit.events(None, 1_000))
        assert await CHANGES[change](scene)
        written = len(await scene.engine.store.audit.events(None, 1_000)) - before
        assert written == (2 if change == "create many" else 1)

    async def test_without_the_second_judgement_a_revoked_key_makes_keys(
        self, scene: Scene, trusting: None
    ) -> None:
        """The twin: it uses what was true when the call began."""
        await deleted(scene)
        created = await scene.keyring.create(ORG, "new", by=scene.by)
        assert (await scene.keyring.get(ORG, created.record.id)) == created.key

    @pytest.mark.long
    async def test_two_keys_that_change_each_other_do_not_deadlock(self, scene: Scene) -> None:
        """Locks are taken in one order for all callers and keys, also while uses are stored."""
        keyring = scene.keyring
        made = [await keyring.create(ORG, f"key {n}") for n in range(6)]
        ids = [each.record.id for each in made]

        async def rename(by: KeyRecord, key_id: str) -> None:
            assert await keyring.change(ORG, key_id, name="new", by=principal_of(by))

        async def use(at: int) -> None:
            await scene.engine.store.usage.record(dict.fromkeys(ids, at))

        for turn in range(5):
            renames = [rename(by.record, key_id) for by in made for key_id in ids]
            families = [
                keyring.delete(ORG, (await keyring.create(ORG, "leaf")).record.id, descendants=True)
                for _ in range(3)
            ]
            await asyncio.gather(*renames, *families, *(use(turn * 9 + n) for n in range(4)))


class LosesAnswers:
    """A database whose commits all lose their response, so that their work is repeated."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def write(self, work: Any, *, is_urgent: bool = False, **options: Any) -> Any:
        assert not is_urgent
        await self._database.write(work, **options)
        return await self._database.write(work, **options)


class TestSQLite(OvertakenContract):
    """On a file."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


@pytest.mark.service("postgres")
@pytest.mark.long
class TestPostgreSQL(OvertakenContract):
    """On a server."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()

    async def test_the_acting_key_is_not_locked(self, scene: Scene, url: str) -> None:
        """Shared locks do not queue: a key whose calls overlap could keep its own DELETE waiting.
        The twin locks the row for reading, as its judgement would."""
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
        actor = Actor(scene.by.key_id, scene.by, scene.keyring.now_ms)
        row = select(keys.c.id).where(keys.c.id == scene.by.key_id)
        with engine.connect() as calling, engine.connect() as revoking:
            made = replace(scene.other, id="key_made", locator=None)
            insert_keys(calling, [(made, "hashed")], actor, "key.create")
            assert revoking.execute(row.with_for_update(nowait=True)).all()
            revoking.rollback()
            calling.execute(row.with_for_update(read=True))
            with pytest.raises(OperationalError):
                revoking.execute(row.with_for_update(nowait=True))
        engine.dispose()

    async def test_expiry_is_judged_by_the_stores_time(
        self, url: str, make_engine: MakeEngine
    ) -> None:
        """Whatever the clock of this host says: by its own, an hour ahead, the key has expired."""
        settings = Settings.load(store=url, redis="")
        engine = Engine(settings, clock=lambda: time.time() + 3_600, hasher=Hasher("sha256"))
        keyring = await engine.keyring()
        assert abs(keyring.now_ms() - time.time() * 1000) < 600_000
        soon = int(time.time() * 1000) + 1_800_000
        by = principal_of((await keyring.create(ORG, "ci", expires_at=datetime_of(soon))).record)
        assert (await keyring.create(ORG, "new", by=by)).record.expires_at == soon
        await engine.stop()


@pytest.mark.service("postgres")
@pytest.mark.long
async def test_keys_are_locked_in_the_order_of_their_bytes(postgres: PostgresServer) -> None:
    """Also in a database that is ordered as English is, where the twin orders them otherwise: two
    transactions that lock the same keys in two orders deadlock."""
    url = postgres.new_database(language="en-US")
    store = Store(url)
    await store.open(0)
    ids = {f"key_{letter}" for letter in "aBcDeF"}
    await store.keys.add_many([(replace(record(each)), "hashed") for each in ids])
    await store.close()
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        assert list(authorization.lock_keys(connection, "acme", ids)) == sorted(ids)
        twin = connection.execute(select(keys.c.id).order_by(keys.c.id)).scalars().all()
        assert list(twin) != sorted(ids)
    engine.dispose()


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken twin: the acting key is what it was."""

    def without_check(*_: Any, **__: Any) -> Authority:
        return Authority()

    monkeypatch.setattr(authorization, "reauthorize", without_check)


class TestWhatAKeyLeavesBehind:
    """Who created a key, and what ends with its creator."""

    @pytest.fixture
    async def keyring(self, engine: Engine) -> Keyring:
        return await engine.keyring()

    async def test_a_key_says_who_created_it(self, keyring: Keyring) -> None:
        """A key's id, or the operator's name as in the audit log."""
        first = (await keyring.as_operator("cli:alice").create(ORG, "first")).record
        second = (await keyring.create(ORG, "second", by=principal_of(first))).record
        assert (first.created_by, second.created_by) == ("cli:alice", first.id)

    async def test_descendants_end_in_one_change(self, engine: Engine, keyring: Keyring) -> None:
        """Children and grandchildren, also of a child that was deleted before; no other key."""
        root = await self._child(keyring, None)
        child, sibling = [await self._child(keyring, root) for _ in range(2)]
        grandchild = await self._child(keyring, child)
        unrelated = await self._child(keyring, None)
        await keyring.delete(ORG, child.id)
        before = (await engine.store.invalidations.since(0)).seq
        changed = await keyring.delete(ORG, root.id, descendants=True, reason="leaked")
        assert changed is not None
        assert (changed.count, changed.record.revoked_reason) == (3, "leaked")
        assert [key.id for key in await keyring.list(ORG)] == [unrelated.id]
        touched = (await engine.store.invalidations.since(before)).invalidations
        assert sorted(row.key_id or "" for row in touched) == sorted(
            (root.id, sibling.id, grandchild.id)
        )
        again = await keyring.delete(ORG, root.id, descendants=True)
        assert again is not None
        assert (again.count, again.record) == (0, changed.record)

    async def test_every_process_refuses_them(
        self, engine: Engine, keyring: Keyring, make_engine: MakeEngine
    ) -> None:
        """Also one that has them in its cache."""
        root = await keyring.create(ORG, "root")
        made = [await keyring.create(ORG, "made", by=principal_of(root.record)) for _ in range(12)]
        other = make_engine()
        for each in (root, *made):
            assert await is_allowed(other, each)
        assert await keyring.delete(ORG, root.record.id, descendants=True)
        assert [await is_allowed(other, each) for each in (root, *made)] == [False] * 13
        await other.stop()

    async def test_another_organisations_keys_are_no_descendants(self, keyring: Keyring) -> None:
        """An operator may have the name of a key."""
        root = await self._child(keyring, None)
        other = await keyring.as_operator(root.id).create("other", "theirs")
        assert await keyring.delete(ORG, root.id, descendants=True)
        assert await keyring.list("other") == [other.key]

    @staticmethod
    async def _child(keyring: Keyring, parent: KeyRecord | None) -> KeyRecord:
        by = None if parent is None else principal_of(parent)
        return (await keyring.create(ORG, "key", by=by)).record


class TestAnEnd:
    """A key that expires gives no rights that outlast it."""

    @pytest.fixture
    async def scene(self, engine: Engine, clock: Clock) -> Scene:
        scene = Scene(engine, await engine.keyring(), clock)
        await scene.prepare()
        self.lasting = (await scene.keyring.create(ORG, "for ever")).record
        return scene

    async def test_what_it_creates_ends_with_it(self, scene: Scene) -> None:
        """Where no end is given, and where a later one is, nothing is made."""
        end = scene.keyring.now_ms() + 60_000
        created = await scene.keyring.create(ORG, "new", by=scene.by)
        assert created.record.expires_at == end
        assert await scene.keyring.get(ORG, created.record.id) == created.key
        sooner = await scene.keyring.create(
            ORG, "new", expires_at=datetime_of(end - 1), by=scene.by
        )
        assert sooner.record.expires_at == end - 1
        many = await scene.keyring.create_many([NewKey(ORG, "a"), NewKey(ORG, "b")], by=scene.by)
        assert [each.record.expires_at for each in many] == [end, end]
        before = await scene.snapshot()
        with pytest.raises(NotPermitted):
            await scene.keyring.create(ORG, "new", expires_at=datetime_of(end + 1), by=scene.by)
        new_keys = [NewKey(ORG, "a"), NewKey(ORG, "b", expires_at=datetime_of(end + 1))]
        with pytest.raises(NotPermitted):
            await scene.keyring.create_many(new_keys, by=scene.by)
        assert await scene.snapshot() == before

    async def test_it_moves_no_end_beyond_its_own(self, scene: Scene) -> None:
        """Not that of another key, not its own, and no expired key is re-activated or extended."""
        end = scene.keyring.now_ms() + 60_000
        assert await scene.keyring.change(ORG, self.lasting.id, active=False)
        for key_id, values in (
            (scene.by.key_id, {"expires_at": None}),
            (scene.by.key_id, {"expires_at": datetime_of(end + 1)}),
            (scene.other.id, {"expires_at": None}),
            (scene.other.id, {"expires_at": datetime_of(end + DAY_MS)}),
            (self.lasting.id, {"active": True}),
            (self.lasting.id, {"permission": "SENDING"}),
        ):
            with pytest.raises(NotPermitted):
                await scene.keyring.change(ORG, key_id, by=scene.by, **values)
        with pytest.raises(NotPermitted):
            await scene.keyring.rotate(ORG, self.lasting.id, by=scene.by)
        assert await scene.keyring.change(ORG, self.lasting.id, active=True)
        assert await scene.keyring.rotate(ORG, self.lasting.id, grace=timedelta(seconds=60))
        with pytest.raises(NotPermitted):
            await scene.keyring.cancel_rotation(ORG, self.lasting.id, by=scene.by)
        assert await scene.keyring.finish_rotation(ORG, self.lasting.id, by=scene.by)

    async def test_it_takes_rights_away(self, scene: Scene) -> None:
        """Ends may be moved to the front, and keys that last longer may be disabled and deleted."""
        end = scene.keyring.now_ms() + 60_000
        for key_id, values in (
            (scene.other.id, {"expires_at": datetime_of(end)}),
            (self.lasting.id, {"active": False}),
            (self.lasting.id, {"name": "renamed"}),
            (self.lasting.id, {"expires_at": datetime_of(end)}),
            (scene.by.key_id, {"expires_at": datetime_of(end - 1)}),
        ):
            assert await scene.keyring.change(ORG, key_id, by=scene.by, **values)
        assert await scene.keyring.delete(ORG, self.lasting.id, by=scene.by)


class TestAnOldSecret:
    """While the grace of a rotation runs, the old secret may end itself and nothing else."""

    async def test_it_ends_itself_alone(self, engine: Engine, clock: Clock) -> None:
        """The key and its new secret stay; the old one is refused by all."""
        keyring = await engine.keyring()
        key = await keyring.create(ORG, "ci")
        old = principal_of(key.record)
        rotated = await keyring.rotate(ORG, key.record.id, grace=timedelta(seconds=60))
        assert rotated is not None
        assert old.secret_version == secret_version_of(rotated.record, is_previous=True)
        new = Created(rotated.record, rotated.token)
        assert [await is_allowed(engine, each) for each in (key, new)] == [True, True]
        changed = await keyring.revoke_own_secret(old)
        assert changed is not None
        assert changed.record.deleted_at is None
        assert [await is_allowed(engine, each) for each in (key, new)] == [False, True]
        with pytest.raises(CallerRefused):
            await keyring.revoke_own_secret(old)

    async def test_a_report_ends_the_secret_that_was_reported(self, engine: Engine) -> None:
        """A key that was rotated between the look-up of a leaked token and its revocation stays."""
        keyring = await engine.keyring()
        key = await keyring.create(ORG, "ci")
        owner = await engine.authenticator.identify(key.token)
        assert owner is not None
        rotated = await keyring.rotate(ORG, key.record.id)
        assert rotated is not None
        with pytest.raises(InvalidKeyState):
            await keyring.revoke_secret(owner.record, owner.secret)
        assert await is_allowed(engine, Created(rotated.record, rotated.token))
        assert await engine.authenticator.identify(key.token) is None

    async def test_each_check_says_by_which_secret_it_was(self, engine: Engine) -> None:
        """From the store, from this process's cache, and after a rotation was cancelled."""
        keyring = await engine.keyring()
        key = await keyring.create(ORG, "ci")
        assert {await secret(engine, key) for _ in range(2)} == {0}
        rotated = await keyring.rotate(ORG, key.record.id, grace=timedelta(seconds=60))
        assert rotated is not None
        new = Created(rotated.record, rotated.token)
        for _ in range(2):
            assert await secret(engine, key) == 0
            assert await secret(engine, new) == rotated.record.rotated_at
        await keyring.cancel_rotation(ORG, key.record.id)
        assert await secret(engine, key) == 0
        again = await keyring.rotate(ORG, key.record.id, grace=timedelta(seconds=60))
        assert again is not None
        assert again.record.rotated_at not in (None, rotated.record.rotated_at)


async def test_an_identity_without_a_secret_manages_nothing(engine: Engine) -> None:
    """A proxy's headers say who calls; they do not prove that a key was presented."""
    keyring = await engine.keyring()
    key = (await keyring.create(ORG, "ci")).record
    vouched = Principal(key.id, key.name, ORG, "FULL", "live")
    with pytest.raises(NotPermitted, match="presented the key"):
        await keyring.create(ORG, "new", by=vouched)


async def test_a_key_manages_its_own_organisation_only(engine: Engine) -> None:
    """Whatever organisation an app names beside the caller."""
    keyring = await engine.keyring()
    by = principal_of((await keyring.create(ORG, "ci")).record)
    theirs = (await keyring.create("other", "theirs")).key
    assert await keyring.delete("other", theirs.id, by=by) is None
    assert await keyring.change("other", theirs.id, name="mine", by=by) is None
    assert await keyring.delete("other", theirs.id, descendants=True, by=by) is None
    for change in (
        keyring.create("other", "new", by=by),
        keyring.create_many([NewKey(ORG, "a"), NewKey("other", "b")], by=by),
        keyring.create_many([NewKey("other", "b"), NewKey(ORG, "a")], by=by),
        keyring.revoke_all("other", by=by),
        keyring.set_organization_active("other", False, by=by),
    ):
        with pytest.raises(NotPermitted):
            await change
    assert await keyring.list("other") == [theirs]


async def is_allowed(engine: Engine, key: Created) -> bool:
    return await secret(engine, key) is not None


async def secret(engine: Engine, key: Created) -> int | None:
    """The secret by which a token is accepted; None: it is refused."""
    decision = await engine.authenticate([b"Bearer " + key.token.reveal().encode()])
    return getattr(getattr(decision, "principal", None), "secret_version", None)
