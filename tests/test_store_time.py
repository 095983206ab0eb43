"""The store's time: expiry, creation, changes, audit events and housekeeping go by it, whatever the
clock of a host says.

These tests set the store's clock, not the host's: PostgreSQL finds a `clock_timestamp()` of ours
before its own. Below the host's clock is an hour ahead of the store's.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import httpx
import psycopg
import pytest

from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch_sidecar.app import create_app
from tests.support.command_line import Operator
from tests.support.servers import PostgresServer, eventually, serving

HOUR = 3_600
DAY = 24 * HOUR
UNSENT, SENDOOK = "/v1/api-keys", "/v1/api_keys"

SETTABLE_CLOCK = """
CREATE SCHEMA settable;
CREATE TABLE settable.offset_ (seconds double precision);
INSERT INTO settable.offset_ VALUES (0);
CREATE FUNCTION settable.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql AS
'SELECT pg_catalog.clock_timestamp() + seconds * interval ''1 second'' FROM settable.offset_';
"""


@dataclass
class StoreClock:
    """The clock of a database."""

    url: str
    seconds: float = 0.0

    def set_offset(self, seconds: float) -> None:
        """Seconds that it is ahead of the host's clock."""
        self.seconds = seconds
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("UPDATE settable.offset_ SET seconds = %s", (seconds,))

    def is_now(self, instant: str) -> bool:
        """Whether this is the store's time, within a minute."""
        here = datetime.now(UTC) + timedelta(seconds=self.seconds)
        return abs(datetime.fromisoformat(instant) - here) < timedelta(minutes=1)


@pytest.fixture
def store_clock(postgres: PostgresServer) -> StoreClock:
    """An empty store whose clock is an hour behind the host's."""
    url = postgres.new_database()
    name = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SETTABLE_CLOCK)
        path = "public, settable, pg_catalog"
        connection.execute(f"ALTER DATABASE {name} SET search_path = {path}")
    clock = StoreClock(url)
    clock.set_offset(-HOUR)
    return clock


def settings_on(clock: StoreClock) -> Settings:
    return Settings.load(store=clock.url, redis="", hasher="sha256")


@pytest.fixture
def client(store_clock: StoreClock) -> Iterator[httpx.Client]:
    """HTTP with an admin key, at a sidecar of that store."""

    async def create() -> str:
        async with Engine(settings_on(store_clock)) as engine:
            return (await (await engine.keyring()).create("acme", "admin")).token.reveal()

    headers = {"Authorization": f"Bearer {asyncio.run(create())}"}
    with (
        serving(create_app(Engine(settings_on(store_clock)))) as url,
        httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client,
    ):
        yield client


def status_of(client: httpx.Client, token: str) -> int:
    return client.get("/verify", headers={"Authorization": f"Bearer {token}"}).status_code


def test_a_key_lives_as_long_as_was_said(client: httpx.Client, store_clock: StoreClock) -> None:
    """`expiresIn` counts from the store's time, and that ends the key."""
    keys = {}
    for duration in ("1m", "10m"):
        answer = client.post(UNSENT, json={"name": "CI", "expiresIn": duration})
        assert answer.status_code == 200, answer.text
        keys[duration] = answer.json()
        assert store_clock.is_now(keys[duration]["createdAt"])
        assert store_clock.is_now(keys[duration]["updatedAt"])
    tokens = {duration: key["token"] for duration, key in keys.items()}
    assert {status_of(client, token) for token in tokens.values()} == {200}
    ends = [datetime.fromisoformat(keys["10m"][name]) for name in ("createdAt", "expiresAt")]
    assert timedelta(minutes=9) < ends[1] - ends[0] <= timedelta(minutes=10)
    store_clock.set_offset(-HOUR + 61)
    eventually(lambda: status_of(client, tokens["1m"]) == 401)
    assert status_of(client, tokens["10m"]) == 200
    store_clock.set_offset(-HOUR + 601)
    eventually(lambda: status_of(client, tokens["10m"]) == 401)


def test_an_instant_is_in_the_future_by_the_stores_time(
    client: httpx.Client, store_clock: StoreClock
) -> None:
    """One that the host's clock has passed is accepted; one that the store's has is not."""
    here = datetime.now(UTC)
    for offset, status in ((-HOUR / 2, 200), (-2 * HOUR, 400)):
        instant = (here + timedelta(seconds=offset)).isoformat()
        answer = client.post(UNSENT, json={"name": "CI", "expiresAt": instant})
        assert answer.status_code == status, answer.text
        key = client.post(UNSENT, json={"name": "CI"}).json()
        changed = client.patch(f"{UNSENT}/{key['id']}", json={"expiresAt": instant})
        assert changed.status_code == status, changed.text


def test_every_time_is_the_stores(client: httpx.Client, store_clock: StoreClock) -> None:
    """Of both dialects, of a rotation and its grace, of a change, and of the audit log."""
    key = client.post(SENDOOK, json={"name": "CI"}).json()
    times = [key["createdAt"], key["updatedAt"]]
    shown = client.get(f"{UNSENT}/{key['id']}").json()
    rotated = client.post(f"{UNSENT}/{key['id']}/rotate", json={"graceSeconds": 1}).json()
    times += [shown["createdAt"], shown["updatedAt"], rotated["rotatedAt"], rotated["updatedAt"]]
    times.append(rotated["previous"]["expiresAt"])
    assert client.delete(f"{UNSENT}/{key['id']}").status_code == 200
    events = client.get("/v1/audit").json()
    assert {event["action"] for event in events} == {"key.create", "key.rotate", "key.delete"}
    times += [event["at"] for event in events]
    assert [instant for instant in times if not store_clock.is_now(instant)] == []
    assert not store_clock.is_now(datetime.now(UTC).isoformat()), "the twin: the host's time"


@pytest.mark.anyio
async def test_a_host_far_ahead_deletes_nothing_too_early(
    store_clock: StoreClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit log is pruned by the store's time. The twin goes by the clock of a host that is two
    years ahead, and deletes new events."""
    monkeypatch.setattr("keylatch.engine._MAINTENANCE_SECONDS", 0.05)
    store_clock.set_offset(-2 * 365 * DAY)
    async with Engine(settings_on(store_clock)) as engine, asyncio.timeout(60):
        engine.store.audit_days = 400
        keyring = await engine.keyring()
        with psycopg.connect(store_clock.url, autocommit=True) as connection:
            old = keyring.now_ms() - 500 * DAY * 1000
            insert = "INSERT INTO keylatch_audit (at, actor, action) VALUES (%s, 'a', 'old')"
            connection.execute(insert, (old,))
        for _ in range(2):
            await keyring.create("acme", "a key")

        async def actions() -> list[str]:
            return [event.action for event in await keyring.events(None, 10)]

        while "old" in await actions():
            pass
        assert await actions() == ["key.create"] * 2
        await engine.store.run_maintenance(int(time.time() * 1000))
        assert await actions() == ["key.create"]  # the newest stays, whatever its age


def test_the_command_line_uses_it_as_well(operator: Operator, store_clock: StoreClock) -> None:
    """To create, to change, to rotate the store's secrets; and `doctor` names the difference."""
    operator.set(STORE=store_clock.url)
    made = operator.create("--expires-in", "60s")
    assert store_clock.is_now(made["createdAt"])
    created, expires = (datetime.fromisoformat(made[name]) for name in ("createdAt", "expiresAt"))
    assert timedelta(seconds=50) < expires - created <= timedelta(seconds=60)
    changed = operator.run("keys", "change", made["id"], "--expires-in", "2m")
    assert changed.exit_code == 0, changed.stderr
    assert operator.run("secrets", "rotate").exit_code == 0
    lines = operator.run("audit", "--json-lines").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert {event["action"] for event in events} >= {"key.create", "key.change", "secrets.rotate"}
    assert [event for event in events if not store_clock.is_now(event["at"])] == []
    store_clock.set_offset(-HOUR + 121)
    assert operator.run("verify", stdin=made["token"]).exit_code != 0
    findings = json.loads(operator.run("doctor", "--json").stdout)["findings"]
    (clocks,) = (each["message"] for each in findings if each["check"] == "clocks")
    assert clocks.startswith("this host's clock and the store's are 34")
