"""Every change that the keyring can make is true in another process when its call returns.

The other process is a real one and has the key in its cache. A change that is added to the keyring
needs a scenario here: what that process said before, and what it says right after.
"""

import hashlib
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Connection, update

from keylatch.core.decisions import principal_of, secret_version_of
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.validation import NewKey
from keylatch.engine import Engine
from keylatch.management.keyring import Created, Keyring
from keylatch.settings import Settings
from keylatch.storage.schema import keys
from tests.support import worker_decisions
from tests.support.servers import PostgresServer

pytestmark = pytest.mark.anyio
READS = {"list", "page", "get", "events", "find_imported", "analyze", "usage"}
GOOD = "ALLOW FULL ci"
UNHEARD_OF = "FORGED"  # while the store has no imported key


class OtherProcess:
    """A process that checks keys, and caches them."""

    def __init__(self, store: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, worker_decisions.__file__, store],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def decision(self, token: str) -> str:
        """What it makes of a token now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{token}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def end(self) -> None:
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('mutations')}/keys.db"
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.fixture(scope="module")
def other(url: str) -> Iterator[OtherProcess]:
    other = OtherProcess(url)
    yield other
    other.end()


@dataclass(frozen=True)
class Scene:
    """The scene of a test: a key that the other process has cached."""

    engine: Engine
    keyring: Keyring
    other: OtherProcess
    key: Created

    @property
    def place(self) -> tuple[str, str]:
        return self.key.record.organization_id, self.key.record.id

    def decision(self) -> str:
        return self.other.decision(self.key.token.reveal())


@pytest.fixture
async def scene(url: str, other: OtherProcess) -> AsyncIterator[Scene]:
    engine = Engine(Settings.load(store=url, redis="", hasher="sha256"))
    await engine.start()
    keyring = await engine.keyring()
    scene = Scene(engine, keyring, other, await keyring.create(uuid4().hex, "ci"))
    assert [scene.decision(), scene.decision()] == [GOOD, GOOD], "and from its cache"
    yield scene
    await engine.stop()


Scenario = Callable[[Scene], Awaitable[None]]


async def create(scene: Scene) -> None:
    created = await scene.keyring.create(scene.place[0], "another")
    assert scene.other.decision(created.token.reveal()) == "ALLOW FULL another"


async def create_many(scene: Scene) -> None:
    [created] = await scene.keyring.create_many([NewKey(scene.place[0], "another")])
    assert scene.other.decision(created.token.reveal()) == "ALLOW FULL another"


async def import_many(scene: Scene) -> None:
    token = f"elsewhere-{uuid4().hex}"
    assert [scene.other.decision(token), scene.other.decision(token)] == [UNHEARD_OF] * 2
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    made = ImportedToken(f"sha256:{sha256}", "...", f"$sha256${sha256}")
    await scene.keyring.import_many([(NewKey(scene.place[0], "old"), made)])
    assert scene.other.decision(token) == "ALLOW FULL old"


async def disable(scene: Scene) -> None:
    await scene.keyring.change(*scene.place, active=False)
    assert scene.decision() == "DISABLED"
    await scene.keyring.change(*scene.place, active=True)
    assert scene.decision() == GOOD


async def narrow(scene: Scene) -> None:
    await scene.keyring.change(*scene.place, permission="SENDING")
    assert scene.decision() == "ALLOW SENDING ci"


async def rename(scene: Scene) -> None:
    await scene.keyring.change(*scene.place, name="CD")
    assert scene.decision() == "ALLOW FULL CD"


async def revoke(scene: Scene) -> None:
    await scene.keyring.delete(*scene.place, reason="a drill")
    assert scene.decision() == "REVOKED"


async def revoke_a_family(scene: Scene) -> None:
    by = principal_of(scene.key.record)
    child = await scene.keyring.create(scene.place[0], "child", by=by)
    assert scene.other.decision(child.token.reveal()) == "ALLOW FULL child"
    await scene.keyring.delete(*scene.place, descendants=True)
    assert [scene.decision(), scene.other.decision(child.token.reveal())] == ["REVOKED"] * 2


async def revoke_secrets(scene: Scene) -> None:
    """The one before a rotation, and then the present one."""
    rotated = await scene.keyring.rotate(*scene.place, grace=timedelta(seconds=3_600))
    assert rotated is not None
    record, new = rotated.record, rotated.token.reveal()
    assert [scene.decision(), scene.other.decision(new)] == [GOOD, GOOD]
    await scene.keyring.revoke_secret(record, secret_version_of(record, is_previous=True))
    assert [scene.decision(), scene.other.decision(new)] == ["WRONG_SECRET", GOOD]
    await scene.keyring.revoke_secret(record, secret_version_of(record))
    assert [scene.decision(), scene.other.decision(new)] == ["REVOKED", "REVOKED"]


async def revoke_own_secret(scene: Scene) -> None:
    await scene.keyring.revoke_own_secret(principal_of(scene.key.record))
    assert scene.decision() == "REVOKED"


async def rotate(scene: Scene) -> None:
    rotated = await scene.keyring.rotate(*scene.place, grace=timedelta(seconds=0))
    assert rotated is not None
    assert scene.decision() == "WRONG_SECRET"
    assert scene.other.decision(rotated.token.reveal()) == GOOD


async def rotate_with_grace(scene: Scene) -> None:
    rotated = await scene.keyring.rotate(*scene.place, grace=timedelta(seconds=3_600))
    assert rotated is not None
    assert [scene.decision(), scene.other.decision(rotated.token.reveal())] == [GOOD, GOOD]
    again = await scene.keyring.rotate(*scene.place, grace=timedelta(seconds=3_600))
    assert again is not None
    assert scene.decision() == "WRONG_SECRET", "the one before the last rotation, and no other"
    assert scene.other.decision(rotated.token.reveal()) == GOOD


async def cancel_rotation(scene: Scene) -> None:
    rotated = await scene.keyring.rotate(*scene.place, grace=timedelta(seconds=3_600))
    assert rotated is not None
    assert [scene.decision(), scene.other.decision(rotated.token.reveal())] == [GOOD, GOOD]
    await scene.keyring.cancel_rotation(*scene.place)
    assert [scene.decision(), scene.other.decision(rotated.token.reveal())] == [
        GOOD,
        "WRONG_SECRET",
    ]


async def finish_rotation(scene: Scene) -> None:
    rotated = await scene.keyring.rotate(*scene.place, grace=timedelta(seconds=3_600))
    assert rotated is not None
    assert [scene.decision(), scene.other.decision(rotated.token.reveal())] == [GOOD, GOOD]
    await scene.keyring.finish_rotation(*scene.place)
    assert [scene.decision(), scene.other.decision(rotated.token.reveal())] == [
        "WRONG_SECRET",
        GOOD,
    ]


async def revoke_all(scene: Scene) -> None:
    await scene.keyring.revoke_all(scene.place[0])
    assert scene.decision() == "REVOKED"


async def disable_organization(scene: Scene) -> None:
    await scene.keyring.set_organization_active(scene.place[0], False)
    assert scene.decision() == "ORGANIZATION_DISABLED"
    await scene.keyring.set_organization_active(scene.place[0], True)
    assert scene.decision() == GOOD


SCENARIOS: dict[str, list[Scenario]] = {
    "create": [create],
    "create_many": [create_many],
    "import_many": [import_many],
    "change": [disable, narrow, rename],
    "delete": [revoke, revoke_a_family],
    "revoke_secret": [revoke_secrets],
    "revoke_own_secret": [revoke_own_secret],
    "rotate": [rotate, rotate_with_grace],
    "cancel_rotation": [cancel_rotation],
    "finish_rotation": [finish_rotation],
    "revoke_all": [revoke_all],
    "set_organization_active": [disable_organization],
}


def test_every_change_has_a_story() -> None:
    """Each method of the keyring reads, or has a case here."""
    public = {
        name
        for name, _ in inspect.getmembers(Keyring, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    assert public - READS == SCENARIOS.keys()


@pytest.mark.long
@pytest.mark.parametrize(
    "scenario",
    [scenario for scenarios in SCENARIOS.values() for scenario in scenarios],
    ids=lambda s: s.__name__,
)
async def test_it_is_true_elsewhere_when_the_call_returns(scene: Scene, scenario: Scenario) -> None:
    """The process that had the key in its cache decides by the change."""
    await scenario(scene)


async def without_invalidation(scene: Scene) -> None:
    """The broken twin of a change: it writes no invalidation."""

    def write(connection: Connection) -> None:
        connection.execute(update(keys).where(keys.c.id == scene.place[1]).values(active=False))

    await scene.engine.store._database.write(write)
    assert scene.decision() == "DISABLED"


async def test_a_change_without_an_invalidation_is_caught(scene: Scene) -> None:
    """So the tests above can fail."""
    with pytest.raises(AssertionError, match="DISABLED"):
        await without_invalidation(scene)
    assert scene.decision() == GOOD
