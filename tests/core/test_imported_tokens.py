"""Imported keys: their formats, what a check of one costs, and that revoked ones are refused."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from hypothesis import given
from hypothesis import strategies as st

from keylatch.authentication.hashing import CHEAPEST, Cost, Hasher, VerifyResult
from keylatch.core import imported_tokens
from keylatch.core.decisions import Allow, Decision, Deny, Reason
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.tokens import MacKeys, Token, is_native
from keylatch.engine import Engine
from keylatch.errors import HashingBusy, HashingFailed, StoreUnavailable
from keylatch.management.keyring import Imported, NewKey
from keylatch.revocation.invalidations import Invalidations
from keylatch.storage.store import Found, NotFound, Store
from keylatch_sidecar.importing import external_keys
from tests.support import other_systems
from tests.support.clock import Clock
from tests.support.command_line import Operator
from tests.support.engines import MakeEngine
from tests.support.other_systems import MAKERS, ExternalKey
from tests.support.servers import PostgresServer, eventually
from tests.support.sidecars import Sidecar, sidecar_on
from tests.support.stores import StoreTests

pytestmark = pytest.mark.anyio


def origin_of(key: ExternalKey) -> ImportedToken:
    """What an import learns from the key's line."""
    return external_keys.parse(key.import_fields, frozenset())[1]


async def import_keys(engine: Engine, *keys: ExternalKey, **values: Any) -> list[Imported]:
    keyring = await engine.keyring()
    new_keys = [NewKey("acme", "old", **values) for _ in keys]
    origins = [origin_of(key) for key in keys]
    return list(await keyring.import_many(list(zip(new_keys, origins, strict=True))))


def bearer(token: str) -> list[bytes]:
    return [b"Bearer " + token.encode()]


# Formats

VECTORS = {
    "seam": (  # the tests of seamapi/prefixed-api-key
        imported_tokens.SEAM + "d70d981d87b449c107327c2a2afbf00d4b58070d6ba571aac35d7ea3e7c79f37",
        "mycompany_BRTRKFsL_51FwqftsmMDHHbJAMEXXHCgG",
    ),
    "django 1.8": (  # Django's own tests, as are the next two
        "pbkdf2_sha256$20000$seasalt$oBSd886ysm3AqYun62DOdin8YcfbU1z9cksZSuLP9r0=",
        "lètmein",
    ),
    "django 1.11": (
        "pbkdf2_sha256$36000$seasalt$mEUPPFJkT/xtwDU8rB7Q+puHRZnR07WRjerTkt/3HI0=",
        "lètmein",
    ),
    "django 2.1": (
        "pbkdf2_sha256$120000$seasalt$fsgWMpOXin7ZAmi4j+7XjKCZ4JCvxJTGiwwDrawRqSc=",
        "lètmein",
    ),
    "argon2": (  # the tests of P-H-C/phc-winner-argon2
        "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
        "password",
    ),
    "sha256": (  # FIPS 180-2, appendix B
        "$sha256$ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "abc",
    ),
    "sha512": (  # FIPS 180-2, appendix C
        imported_tokens.SHA512 + "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "abc",
    ),
    "knox 5": (
        imported_tokens.KNOX + "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "abc",
    ),
    "knox 4": (
        imported_tokens.KNOX + "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "616263",
    ),
    "sanctum": (
        imported_tokens.SANCTUM
        + "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "17|abc",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", VECTORS)
async def test_published_vectors_fit(name: str) -> None:
    """What those systems' own tests and standards say is a hash of a token is one here."""
    stored, token = VECTORS[name]
    hasher = Hasher("argon2id", CHEAPEST)
    assert await hasher.verify(stored, Token(token))
    for other in {f"{token}x", token[:-1], token.upper(), "", "|", "_", "us_"} - {token}:
        assert not await hasher.verify(stored, Token(other))
    hasher.close()


@pytest.mark.parametrize("name", MAKERS)
async def test_every_schemes_token_finds_its_key_and_fits_its_hash(name: str) -> None:
    """By one of its locators; and another secret behind the same public part does not fit."""
    key = MAKERS[name]()
    origin = origin_of(key)
    hasher = Hasher("sha256")
    token = Token(key.token)
    assert not is_native(token)
    assert origin.locator in imported_tokens.locators(token)
    stored = origin.hash or await hasher.hash(token)
    lengths = len(stored), len(origin.locator), len(origin.partial)
    assert all(length <= most for length, most in zip(lengths, (255, 160, 32), strict=True))
    assert await hasher.verify(stored, token)
    assert not await hasher.verify(stored, Token(key.with_wrong_secret))
    assert key.secret not in f"{origin!r} {origin.locator} {origin.partial} {stored}"
    hasher.close()


TEXTS = (
    st.text(max_size=100)
    | st.text("us_0a.|-~+/=", max_size=60)
    | st.from_regex(
        r"us_[0-9a-z]{10}_[0-9a-f]{32}|[0-9]{1,20}\|[A-Za-z0-9]{40,64}|\w{3,8}[._]\w{3,8}[._]\w{20}",
        fullmatch=True,
    )
)


@pytest.mark.long
@given(TEXTS)
def test_any_text_has_locators(text: str) -> None:
    """Few, distinct where they matter, of few characters, each of a scheme; and nothing raises."""
    found = imported_tokens.locators(Token(text))
    assert 2 <= len(found) <= imported_tokens.MAX_LOCATORS
    schemes = {"sha256", "sha512", "sanctum", "usesend", "django", "seam", "argon2"}
    for locator in found:
        assert locator.partition(":")[0] in schemes
        assert len(locator) <= 160
        assert "\0" not in locator
    assert found == imported_tokens.locators(Token(text))


@given(TEXTS, st.sampled_from(sorted(VECTORS)))
def test_any_text_fits_a_hash_or_does_not(text: str, name: str) -> None:
    """The quick schemes; the others are the same functions behind more work."""
    stored, _ = VECTORS[name]
    if imported_tokens.is_imported_hash(stored) and imported_tokens.is_fast(stored):
        assert imported_tokens.verify(stored, Token(text)) in (True, False)


async def test_a_damaged_hash_refuses_no_other_key() -> None:
    """It is a failure of the store, which does not mean an unknown key: 503 and no 401."""
    hasher = Hasher("sha256")
    for stored in ("pbkdf2_sha256$x$y$z", "pbkdf2_sha256$1$y", "$argon2id$", "$unheard-of$1"):
        with pytest.raises(HashingFailed):
            await hasher.verify(stored, Token("a.b"))
    hasher.close()


async def test_imported_tokens_wait_in_a_queue_of_their_own() -> None:
    """Who floods it with the public part of one delays no token of keylatch's own."""
    hasher = Hasher("argon2id", CHEAPEST, workers=1, queue=0)
    own = MacKeys([b"k" * 32]).mint("kl", "live")
    stored = await hasher.hash(own)
    slow = Hasher("argon2id", Cost(64 * 1024, 3))
    dear = await slow.hash(Token("a.b"))
    waiting = [asyncio.create_task(hasher.verify(dear, Token("a.c"))) for _ in range(5)]
    await asyncio.sleep(0)
    assert await hasher.verify(stored, own)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert outcomes[0] is False
    assert sum(isinstance(outcome, HashingBusy) for outcome in outcomes) == 4
    hasher.close()
    slow.close()


# Costs


class CountingStore(Store):
    """A store that counts its look-ups of keys."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.queries = 0
        self._find, self._find_by_locator = self.keys.find, self.keys.find_by_locator
        self.keys.find = self.find  # type: ignore[method-assign]
        self.keys.find_by_locator = self.find_by_locator  # type: ignore[method-assign]

    async def find(self, key_id: str, anchor: int = 0) -> Found | NotFound:
        self.queries += 1
        return await self._find(key_id, anchor)

    async def find_by_locator(self, locators: Any, anchor: int = 0) -> Found | NotFound:
        self.queries += 1
        return await self._find_by_locator(locators, anchor)


class CountingHasher(Hasher):
    """A hasher that counts what it verifies."""

    def __init__(self) -> None:
        super().__init__("sha256")
        self.verified = 0

    async def verify(self, stored: str, token: Token) -> VerifyResult:
        self.verified += 1
        return await super().verify(stored, token)


class ForeignContract(StoreTests):
    """What both databases promise of imported keys."""

    @pytest.fixture
    def store(self, url: str) -> CountingStore:
        return CountingStore(url)

    @pytest.fixture
    def hasher(self) -> CountingHasher:
        return CountingHasher()

    @pytest.fixture
    async def engine(
        self, store: CountingStore, hasher: CountingHasher, make_engine: MakeEngine
    ) -> AsyncIterator[Engine]:
        """The process that checks."""
        engine = make_engine(store=store, hasher=hasher)
        await engine.start()
        yield engine
        await engine.stop()

    @pytest.fixture
    async def other(self, url: str, make_engine: MakeEngine) -> AsyncIterator[Engine]:
        """The process that imports and revokes."""
        other = make_engine(store=Store(url), hasher=Hasher("sha256"))
        await other.start()
        yield other
        await other.stop()

    async def test_unknown_tokens_cost_nothing_where_nothing_was_imported(
        self, engine: Engine, store: CountingStore, hasher: CountingHasher
    ) -> None:
        """Not one query to the store, whatever shape they have; a pipe stays malformed."""
        await (await engine.keyring()).create("acme", "own")
        for maker in MAKERS.values():
            key = maker()
            expected = Reason.MALFORMED if "|" in key.token else Reason.FORGED
            assert await engine.authenticate(bearer(key.token)) == Deny(expected)
        assert (store.queries, hasher.verified) == (0, 0)

    async def test_an_import_is_known_at_once_where_nothing_was_imported_before(
        self, engine: Engine, other: Engine
    ) -> None:
        """A process that has just refused the token accepts it when the import has returned."""
        assert await self._is_known_at_once(engine, other)

    async def test_invalidations_without_the_first_import_would_refuse(
        self, engine: Engine, other: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The broken twin: what is learned at the start is all that it ever knows."""
        apply = Invalidations.apply
        monkeypatch.setattr(
            Invalidations,
            "apply",
            lambda invalidations, changes, *reached: apply(
                invalidations, replace(changes, has_imported_keys=False), *reached
            ),
        )
        assert not await self._is_known_at_once(engine, other)

    async def _is_known_at_once(self, engine: Engine, other: Engine) -> bool:
        key = other_systems.sanctum()
        assert await engine.authenticate(bearer(key.token)) == Deny(Reason.MALFORMED)
        await import_keys(other, key)
        return isinstance(await engine.authenticate(bearer(key.token)), Allow)

    async def test_a_later_import_is_known_by_who_remembers_that_there_was_no_such_key(
        self, engine: Engine, other: Engine
    ) -> None:
        """The negative cache is no reason to refuse it."""
        await import_keys(other, other_systems.sha256())
        key = other_systems.usesend()
        assert await engine.authenticate(bearer(key.token)) == Deny(Reason.UNKNOWN)
        await import_keys(other, key)
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)

    async def test_a_cold_token_costs_one_look_up_and_one_hash_and_then_nothing(
        self, engine: Engine, other: Engine, store: CountingStore, hasher: CountingHasher
    ) -> None:
        """As keylatch's own do; a hundred cold requests at once are one flight."""
        key = other_systems.usesend()
        await import_keys(other, key)
        decisions = await asyncio.gather(
            *(engine.authenticate(bearer(key.token)) for _ in range(100))
        )
        assert all(isinstance(decision, Allow) for decision in decisions)
        assert (store.queries, hasher.verified) == (1, 1)
        assert isinstance(engine.authenticator.check_cached(bearer(key.token)), Allow)
        assert isinstance(engine.authenticator.check_token_cached(Token(key.token)), Allow)

    async def test_made_up_tokens_cost_no_hash(
        self, engine: Engine, other: Engine, store: CountingStore, hasher: CountingHasher
    ) -> None:
        """One look-up each, and none for one that was refused a moment ago."""
        await import_keys(other, other_systems.usesend(), other_systems.django_pbkdf2())
        for _ in range(2):
            for made_up in ("us_0123456789_" + "0" * 32, "abcdefgh.0123", "x" * 500):
                assert await engine.authenticate(bearer(made_up)) == Deny(Reason.UNKNOWN)
        assert (store.queries, hasher.verified) == (3, 0)

    async def test_a_forged_token_of_our_own_shape_costs_nothing(
        self, engine: Engine, other: Engine, store: CountingStore
    ) -> None:
        """Imported keys change nothing for what has keylatch's shape, be its checks wrong."""
        await import_keys(other, other_systems.usesend())
        forged = MacKeys([b"s" * 32]).mint("kl", "live").reveal()
        for token in (forged, forged[:-1] + ("b" if forged[-1] == "a" else "a")):
            assert await engine.authenticate(bearer(token)) == Deny(Reason.FORGED)
        assert store.queries == 0

    async def test_a_flood_of_made_up_tokens_is_bounded(
        self, engine: Engine, other: Engine, store: CountingStore
    ) -> None:
        """Some are looked up, the others are refused as BUSY; a native key is accepted."""
        decisions = await self._flooded(engine, other, store)
        assert set(decisions) == {Deny(Reason.UNKNOWN), Deny(Reason.BUSY)}
        assert store.queries < 100

    async def test_a_flood_without_the_bound_would_reach_the_store(
        self,
        engine: Engine,
        other: Engine,
        store: CountingStore,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The broken twin: every one of them is a query."""
        monkeypatch.setattr("keylatch.authentication.lookup._MAX_IMPORTED_LOOKUPS", 10_000)
        assert set(await self._flooded(engine, other, store)) == {Deny(Reason.UNKNOWN)}
        assert store.queries == 201

    async def _flooded(self, engine: Engine, other: Engine, store: CountingStore) -> list[Decision]:
        await import_keys(other, other_systems.usesend())
        own = await (await engine.keyring()).create("acme", "own")
        store.queries = 0
        made_up = [engine.authenticate(bearer(f"made-up-{number}")) for number in range(200)]
        mine, *decisions = await asyncio.gather(
            engine.authenticate(bearer(own.token.reveal())), *made_up
        )
        assert isinstance(mine, Allow)
        return decisions

    async def test_a_revoked_key_is_refused_by_a_process_that_has_it_cached(
        self, engine: Engine, other: Engine
    ) -> None:
        """As soon as the revoke has returned; and so are disabled ones and their organisation's."""
        revoked, disabled, last = (
            other_systems.usesend(),
            other_systems.seam(),
            other_systems.sanctum(),
        )
        ids = [each.key_id for each in await import_keys(other, revoked, disabled, last)]
        for key in (revoked, disabled, last):
            assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        keyring = await other.keyring()
        assert await keyring.delete("acme", ids[0])
        assert await engine.authenticate(bearer(revoked.token)) == Deny(Reason.REVOKED)
        await keyring.change("acme", ids[1], active=False)
        assert await engine.authenticate(bearer(disabled.token)) == Deny(Reason.DISABLED)
        await keyring.change("acme", ids[1], active=True)
        assert isinstance(await engine.authenticate(bearer(disabled.token)), Allow)
        await keyring.set_organization_active("acme", False)
        assert await engine.authenticate(bearer(last.token)) == Deny(Reason.ORGANIZATION_DISABLED)

    async def test_invalidations_without_tombstones_would_accept_a_revoked_key(
        self, engine: Engine, other: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The broken twin: entries are used for as long as they are there."""
        key = other_systems.usesend()
        [imported] = await import_keys(other, key)
        await engine.authenticate(bearer(key.token))
        monkeypatch.setattr(Invalidations, "accepts", lambda *arguments: True)
        assert await (await other.keyring()).delete("acme", imported.key_id)
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)

    async def test_a_wrong_secret_is_refused_and_the_right_one_stays_good(
        self, engine: Engine, other: Engine
    ) -> None:
        """Behind the same public part."""
        for maker in (other_systems.usesend, other_systems.django_sha512, other_systems.seam):
            key = maker()
            await import_keys(other, key)
            assert await engine.authenticate(bearer(key.with_wrong_secret)) == Deny(
                Reason.WRONG_SECRET
            )
            assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
            assert await engine.authenticate(bearer(key.with_wrong_secret)) == Deny(
                Reason.WRONG_SECRET
            )

    async def test_what_is_imported_twice_is_there_once(
        self, engine: Engine, other: Engine
    ) -> None:
        """The rest of the batch is taken in; and a revoked key does not come back to life."""
        first, second = other_systems.usesend(), other_systems.knox()
        [before] = await import_keys(other, first)
        again, fresh = await import_keys(other, first, second)
        assert again == Imported(before.key_id, is_new=False)
        assert fresh.is_new
        await (await other.keyring()).delete("acme", before.key_id)
        [revoked] = await import_keys(other, first)
        assert revoked == Imported(before.key_id, is_new=False, is_deleted=True)
        assert await engine.authenticate(bearer(first.token)) == Deny(Reason.REVOKED)
        assert len(await other.store.keys.list("acme", deleted=True)) == 2

    async def test_an_import_whose_answer_was_lost_may_be_repeated(self, other: Engine) -> None:
        """It finds its own work done, and makes no second change."""
        record = (await (await other.keyring()).create("acme", "own")).record
        made = [(replace(record, id="key_imported", locator="seam:a_b"), imported_tokens.SEAM)]
        seq, held = await other.store.keys.import_many(made)
        assert held == {}
        assert await other.store.keys.import_many(made) == (
            seq,
            {"seam:a_b": ("key_imported", False)},
        )

    async def test_environments_count(
        self, engine: Engine, other: Engine, url: str, make_engine: MakeEngine
    ) -> None:
        """As for every key."""
        key = other_systems.better_auth()
        await import_keys(other, key, environment="test")
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        live = make_engine(store=Store(url), environment="live")
        assert await live.authenticate(bearer(key.token)) == Deny(Reason.WRONG_ENVIRONMENT)
        await live.stop()

    async def test_an_end_counts(self, engine: Engine, other: Engine) -> None:
        """As for every key."""
        key = other_systems.better_auth()
        [imported] = await import_keys(other, key)
        await other.store.keys.change("acme", imported.key_id, 0, {"expires_at": 1})
        assert await engine.authenticate(bearer(key.token)) == Deny(Reason.EXPIRED)

    async def test_the_old_token_outlives_a_rotation_by_its_grace(
        self, engine: Engine, other: Engine
    ) -> None:
        """So its holder moves to a token of keylatch's own, of the same key."""
        key = other_systems.usesend()
        [imported] = await import_keys(other, key)
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        keyring = await other.keyring()
        rotated = await keyring.rotate("acme", imported.key_id, grace=timedelta(seconds=3_600))
        assert rotated
        for token in (key.token, rotated.token.reveal(), key.token):
            decision = await engine.authenticate(bearer(token))
            assert isinstance(decision, Allow)
            assert decision.principal.key_id == imported.key_id
        assert await engine.authenticate(bearer(key.with_wrong_secret)) == Deny(Reason.WRONG_SECRET)
        await keyring.rotate("acme", imported.key_id, grace=timedelta(seconds=0))
        for token in (key.token, rotated.token.reveal()):
            assert await engine.authenticate(bearer(token)) == Deny(Reason.WRONG_SECRET)

    async def test_a_token_that_fits_several_keys_is_the_one_of_its_digest(
        self, engine: Engine, other: Engine
    ) -> None:
        """Another organisation's key may have a public part that looks the same."""
        exact = other_systems.sha256()
        head = exact.token[:8]
        posing = other_systems.argon2()
        posing.import_fields["prefix"] = head
        _, imported = await import_keys(other, posing, exact)
        decision = await engine.authenticate(bearer(exact.token))
        assert isinstance(decision, Allow)
        assert decision.principal.key_id == imported.key_id

    async def test_an_outage_is_no_refusal(
        self, engine: Engine, other: Engine, store: CountingStore
    ) -> None:
        """An uncached imported token is 503 while the store does not answer."""
        key = other_systems.usesend()
        await import_keys(other, key)

        async def broken(locators: Any, anchor: int = 0) -> Found:
            raise StoreUnavailable("broken by the test")

        store.keys.find_by_locator = broken  # type: ignore[method-assign]
        assert await engine.authenticate(bearer(key.token)) == Deny(Reason.UNAVAILABLE)
        del store.keys.find_by_locator
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)

    async def test_an_open_connection_ends_with_its_key(
        self, engine: Engine, other: Engine
    ) -> None:
        """Also for a connection that an imported token opened."""
        key = other_systems.sanctum()
        [imported] = await import_keys(other, key)
        assert isinstance(await engine.authenticate(bearer(key.token)), Allow)
        with engine.revocation_event(bearer(key.token)) as ended:
            await (await other.keyring()).delete("acme", imported.key_id)
            assert await engine.authenticate(bearer(key.token)) == Deny(Reason.REVOKED)
            await asyncio.wait_for(ended.wait(), 5)


class TestSQLite(ForeignContract):
    """On a file."""

    @pytest.fixture
    def url(self, store_url: str) -> str:
        return store_url


class TestPostgreSQL(ForeignContract):
    """On a real PostgreSQL."""

    @pytest.fixture
    def url(self, postgres: PostgresServer) -> str:
        return postgres.new_database()


async def test_redis_gets_nothing_of_imported_tokens(make_engine: MakeEngine) -> None:
    """And is not read for them; it has native keys only. A new process verifies for itself."""
    redis, hasher = FakeServer(), CountingHasher()
    engine = make_engine(redis=FakeAsyncRedis(server=redis))
    new = make_engine(redis=FakeAsyncRedis(server=redis), hasher=hasher)
    key, own = other_systems.seam(), await (await engine.keyring()).create("acme", "own")
    [imported] = await import_keys(engine, key)
    for token in (key.token, own.token.reveal()):
        assert isinstance(await engine.authenticate(bearer(token)), Allow)
    await engine.stop()
    names = str(await FakeAsyncRedis(server=redis).keys("*"))
    assert own.record.id in names
    assert imported.key_id not in names
    for token in (key.token, own.token.reveal()):
        assert isinstance(await new.authenticate(bearer(token)), Allow)
    assert hasher.verified == 1
    await new.stop()


# Over HTTP, from the file to the refusal


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere") / "keys.db"


@pytest.fixture(scope="module")
def running(database: Path) -> Iterator[Sidecar]:
    """A sidecar that runs while others import."""
    with sidecar_on(f"sqlite:///{database}", Clock()) as running:
        yield running


def stored_hash(database: Path, key_id: str) -> str:
    with closing(sqlite3.connect(database)) as raw:
        row = raw.execute("SELECT hash FROM keylatch_keys WHERE id = ?", (key_id,)).fetchone()
        return str(row[0])


@pytest.mark.long
@pytest.mark.parametrize("name", MAKERS)
def test_an_imported_key_from_its_file_to_its_revocation(
    name: str, running: Sidecar, database: Path, operator: Operator
) -> None:
    """Imported by the command, good over HTTP at once, hashed as keylatch's own when it was used,
    still good, refused with another secret, and refused once it is revoked."""
    operator.set(STORE=f"sqlite:///{database}")
    key = MAKERS[name]()
    url = f"{running.url}/v1/api-keys"

    def status(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.get(url, headers=headers, trust_env=False).status_code

    line = {"name": name, "organization": name.replace("_", "-")} | key.import_fields
    outcome = operator.run("keys", "import", "-", stdin=json.dumps(line))
    assert (outcome.exit_code, outcome.stderr) == (0, "Imported 1 keys.\n")
    [report] = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert report["outcome"] == "imported"
    assert "token" not in report
    assert key.secret not in outcome.stdout
    before = stored_hash(database, report["id"])
    assert status(key.with_wrong_secret) == 401
    assert status(key.token) == 200
    if key.import_fields["scheme"] != "raw":
        eventually(lambda: stored_hash(database, report["id"]) != before)
    if not before.startswith("$sha256$"):
        assert stored_hash(database, report["id"]).startswith("$argon2id$")
    assert status(key.token) == 200
    assert status(key.with_wrong_secret) == 401
    revoked = operator.run("keys", "revoke", report["id"])
    assert revoked.exit_code == 0
    assert status(key.token) == 401
