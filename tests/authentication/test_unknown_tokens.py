"""Forged tokens change nothing of what a process has cached, whatever they look like.

An attacker may know the id of each key, which is public, and all of a token but its secret. The
MAC of a native token cannot be forged, and a token of another shape proves nothing by what
it contains.
"""

import asyncio
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.authentication.lookup import Lookup
from keylatch.caches.local_cache import Entry, LocalCache, NegativeEntry
from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.management.keyring import NewKey
from keylatch.settings import Settings
from keylatch_sidecar.importing import external_keys
from tests.caches.test_caches import RECORD
from tests.support import other_systems
from tests.support.clock import Clock

LETTERS = string.ascii_letters + string.digits
TAIL = 41  # what follows the id and its separator in a native token
LOCATED = other_systems.django_pbkdf2()
DIGESTED = other_systems.sha256()


@dataclass(frozen=True)
class Scene:
    """A process that knows some keys, and their tokens."""

    runner: asyncio.Runner
    engine: Engine
    tokens: list[str]

    @property
    def known(self) -> dict[str, Entry]:
        return dict(self.engine._l1._entries._entries)

    def check(self, token: str) -> Allow | Deny:
        return self.runner.run(self.engine.authenticate([b"Bearer " + token.encode()]))

    def warm(self) -> None:
        assert all(isinstance(self.check(token), Allow) for token in self.tokens)


async def _filled(engine: Engine) -> list[str]:
    """Keys of every kind: native, rotated with a grace, found by a public part, by a digest."""
    keyring = await engine.keyring()
    created = [await keyring.create("acme", "ci") for _ in range(2)]
    rotated = await keyring.rotate("acme", created[0].record.id, grace=timedelta(seconds=3_600))
    assert rotated is not None
    taken = [
        external_keys.parse(each.import_fields, frozenset())[1] for each in (LOCATED, DIGESTED)
    ]
    await keyring.import_many([(NewKey("acme", "old"), each) for each in taken])
    native = [*(each.token for each in created), rotated.token]
    return [*(token.reveal() for token in native), LOCATED.token, DIGESTED.token]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with asyncio.Runner() as runner:
        settings = Settings.load(store=f"sqlite:///{tmp_path_factory.mktemp('l1')}/k.db", redis="")
        clock = Clock()
        hasher = Hasher("argon2id", CHEAPEST)
        engine = Engine(settings, clock=clock, timer=clock, hasher=hasher)
        made = Scene(runner, engine, runner.run(_filled(engine)))
        made.warm()
        yield made
        runner.run(engine.stop())


def texts(least: int, most: int, alphabet: str = LETTERS) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=least, max_size=most)


@st.composite
def forgeries(draw: st.DrawFn) -> tuple[str, int, str, str]:
    """Which kind, of which key, and what it is filled with."""
    kind = draw(st.sampled_from(["holds the id", "native", "another end", "cut", "any"]))
    return (
        kind,
        draw(st.integers(0, 4)),
        draw(texts(TAIL, TAIL)),
        draw(texts(1, 30, LETTERS + "._-")),
    )


def forged(scene: Scene, kind: str, which: int, tail: str, head: str) -> str:
    """A token that can be made from public ids and public parts alone."""
    token = scene.tokens[which]
    key_id = scene.tokens[which % 3].split("_")[2]
    return {
        "holds the id": f"{head}{head[0]}{key_id}.{tail}",
        "native": f"kl_live_{key_id}_{tail}",
        "another end": token[:-4] + tail[:4],
        "cut": token[: 1 + len(head)],
        "any": head,
    }[kind]


@hypothesis_settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(forgeries(), min_size=1, max_size=6))
def test_no_forged_token_changes_the_cache(
    scene: Scene, sent: list[tuple[str, int, str, str]]
) -> None:
    """Of whatever shape and in whatever order: each entry is the one that was there before."""
    known = scene.known
    assert len(known) == 5
    for each in sent:
        token = forged(scene, *each)
        if token not in scene.tokens:
            assert isinstance(scene.check(token), Deny)
    assert scene.known == known
    check = scene.engine.authenticator.check_token_cached
    assert all(isinstance(check(Token(token)), Allow) for token in scene.tokens)


class Naming(Lookup):
    """A broken twin: an absence carries whatever stands at the place of an id."""

    async def fetch(self, token: Token) -> tuple[Entry | NegativeEntry, str]:
        known, tier = await super().fetch(token)
        if isinstance(known, NegativeEntry) and known.reason is Reason.UNKNOWN:
            known = NegativeEntry(known.reason, token.key_id, "", known.as_of)
        return known, tier


def test_a_twin_whose_absences_name_keys_forgets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of another shape with the id in it evicts the key in the twin only."""
    forgotten = {}
    for lookup in (Lookup, Naming):
        monkeypatch.setattr("keylatch.engine.Lookup", lookup)
        settings = Settings.load(store=f"sqlite:///{tmp_path}/{lookup.__name__}.db", redis="")
        with asyncio.Runner() as runner:
            engine = Engine(settings, hasher=Hasher("argon2id", CHEAPEST))
            scene = Scene(runner, engine, runner.run(_filled(engine)))
            scene.warm()
            known = set(scene.known)
            scene.check(forged(scene, "holds the id", 1, "A" * TAIL, "Evil."))
            forgotten[lookup] = len(known - set(scene.known))
            runner.run(engine.stop())
    assert forgotten == {Lookup: 0, Naming: 1}


def test_a_wrong_secret_under_a_known_id_evicts_nothing_and_needs_no_io(scene: Scene) -> None:
    """Without a valid MAC it is refused in the process, without I/O."""
    known = scene.known
    other_store = MacKeys([b"another store's k"])
    for token in scene.tokens[:3]:
        for _ in range(3):
            made_up = other_store.mint("kl", "live", "key_" + token.split("_")[2])
            assert scene.engine.authenticator.check_token_cached(made_up) in (
                Deny(Reason.WRONG_SECRET),
                Deny(Reason.FORGED),  # while the key has two secrets
            )
    assert scene.known == known


def test_an_absence_that_was_long_on_its_way_removes_nothing_newer() -> None:
    """Of a key that was disabled when it was read, and enabled and read again since."""
    cache = LocalCache()
    for as_of, stays in ((4, True), (5, False), (6, False)):
        entry = Entry(b"key_a", replace(RECORD), 5)
        cache.add(entry)
        cache.add_negative(b"other", NegativeEntry(Reason.DISABLED, "key_a", "acme", as_of))
        assert (cache.by_secret_id("key_a") is entry) is stays, as_of


def test_an_absence_without_a_key_removes_nothing() -> None:
    """The empty id is that of no key."""
    cache = LocalCache()
    cache.add(entry := Entry(b"key_a", RECORD, 5))
    cache.add_negative(b"other", NegativeEntry(Reason.UNKNOWN, "", "", 9))
    assert cache.by_secret_id("key_a") is entry
