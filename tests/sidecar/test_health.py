"""Live and ready; and a store that cannot be reached is never the key's fault."""

import json
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from keylatch.management.keyring import Created
from keylatch.telemetry.health import Health
from tests.support.clock import Clock
from tests.support.servers import PostgresServer, RedisServer, eventually, free_port
from tests.support.sidecars import Sidecar, sidecar_on

UNSENT, SENDOOK = "/v1/api-keys", "/v1/api_keys"
CALLS = [
    *(("GET", UNSENT), ("POST", UNSENT), ("GET", f"{UNSENT}/key_1")),
    *(("PATCH", f"{UNSENT}/key_1"), ("DELETE", f"{UNSENT}/key_1")),
    *(("GET", SENDOOK), ("POST", SENDOOK), ("GET", f"{SENDOOK}/key_1")),
    ("DELETE", f"{SENDOOK}/key_1"),
]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def down(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sidecar]:
    """A sidecar whose store cannot be reached: a folder that is not there, a closed port."""
    url = f"sqlite:///{tmp_path_factory.mktemp('store')}/missing/keys.db"
    if request.param == "postgresql":
        url = f"postgresql://keylatch@127.0.0.1:{free_port()}/keys"
    with sidecar_on(url, Clock()) as sidecar:
        yield sidecar


@pytest.fixture
def watching(down: Sidecar) -> Iterator[httpx.Client]:
    """HTTP at the listener for metrics, where the components are public."""
    with down.probe() as probe:
        yield probe


@pytest.fixture
def waiting(down: Sidecar, admin_key: Created) -> Iterator[httpx.Client]:
    """HTTP with a key that is valid, while the store cannot be reached."""
    with down.client(admin_key) as client:
        yield client


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_sidecar_with_a_store_is_live_and_ready(sidecar: Sidecar, path: str) -> None:
    """200 without a key, for probes."""
    with sidecar.client() as probe:
        answer = probe.get(path)
        assert (answer.status_code, answer.json()["status"]) == (200, "ok")
        assert answer.headers["Cache-Control"] == "no-store"
        assert probe.head(path).status_code == 200
        assert probe.post(path).status_code == 405


def test_without_its_store_it_is_live_but_not_ready(waiting: httpx.Client) -> None:
    """Restarting it would not help (live), and sending it requests would not either (ready)."""
    assert waiting.get("/healthz").status_code == 200
    answer = waiting.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_without_the_store_management_is_unavailable(
    waiting: httpx.Client, method: str, path: str
) -> None:
    """503 with `Retry-After` in the dialect's shape, never 401: the key may well be good."""
    answer = waiting.request(method, path)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Keylatch-Error"] == "unavailable"
    assert "WWW-Authenticate" not in answer.headers
    message = "The API key could not be checked; try again in a moment"
    detail = {"code": "UNAVAILABLE", "message": message}
    shape = {"error": message} if path.startswith(SENDOOK) else {"error": detail}
    assert answer.json() == shape | detail


def test_without_the_store_a_keyless_caller_still_gets_401(down: Sidecar) -> None:
    """That no key was sent is known without any store."""
    with down.client() as anonymous:
        assert anonymous.get(UNSENT).status_code == 401
        assert anonymous.get(SENDOOK).status_code == 401


def test_it_recovers_once_the_store_appears(tmp_path: Path, clock: Clock) -> None:
    """A sidecar that started before its store works as soon as the store is there."""
    folder = tmp_path / "late"
    with sidecar_on(f"sqlite:///{folder}/keys.db", clock) as sidecar:
        with sidecar.client() as probe:
            assert probe.get("/readyz").status_code == 503
            folder.mkdir()
            assert probe.get("/readyz").status_code == 200
        with sidecar.client(sidecar.create()) as client:
            assert client.get(UNSENT).status_code == 200
            assert client.post(SENDOOK, json={"name": "CI"}).status_code == 200


@pytest.mark.long
@pytest.mark.parametrize("path", [UNSENT, SENDOOK])
def test_requests_alone_make_it_recover(tmp_path: Path, clock: Clock, path: str) -> None:
    """Without a request for readiness: a second later a check tries the store again."""
    folder = tmp_path / "late"
    with (
        sidecar_on(f"sqlite:///{tmp_path}/keys.db", clock) as elsewhere,
        sidecar_on(f"sqlite:///{folder}/keys.db", clock) as sidecar,
        sidecar.client(elsewhere.create()) as client,
    ):
        assert client.get(path).status_code == 503
        folder.mkdir()
        source, copy = (sqlite3.connect(place / "keys.db") for place in (tmp_path, folder))
        source.backup(copy)
        source.close()
        copy.close()
        clock.tick(1)
        assert client.get(path).status_code == 200


def test_a_store_that_goes_away_and_comes_back(postgres: PostgresServer, clock: Clock) -> None:
    """503 while PostgreSQL is down, 200 when it is up again, 401 never; a NUL is no outage."""
    url = postgres.new_database()
    with sidecar_on(url, clock) as sidecar, sidecar.client(sidecar.create()) as client:
        key = client.post(UNSENT, json={"name": "CI"}).json()
        assert client.get(f"{UNSENT}/%00").status_code == 404
        assert client.get(f"{SENDOOK}/%00").status_code == 404
        postgres.kill()
        try:
            seen = [client.get(path).status_code for path in ("/healthz", "/readyz")]
            clock.tick(10)  # no lease lasts as long
            seen += [client.request(method, path).status_code for method, path in CALLS]
        finally:
            postgres.start()
        assert seen == [200] + [503] * (len(CALLS) + 1)
        assert client.get("/readyz").status_code == 200
        assert client.get(UNSENT).json()[0]["id"] == key["id"]
        assert client.delete(f"{SENDOOK}/{key['id']}").json()["active"] is False


# Which part


def components(probe: httpx.Client) -> dict[str, str]:
    """The components and their states."""
    return {name: part["state"] for name, part in probe.get("/readyz").json()["components"].items()}


HEALTHY = {
    "store": "ok",
    "lease": "off",
    "redis": "off",
    "notifier": "off",
    "hashing": "ok",
    "usage": "ok",
}


def test_components_are_reported_to_operators_only(sidecar: Sidecar, admin_key: Created) -> None:
    """On the main listener no key, a revoked one and one without FULL get the status alone."""
    small = sidecar.create(admin_key.record.organization_id, "small", permission="SENDING")
    dead = sidecar.create()
    with sidecar.client(dead) as client:
        assert client.delete("/v1/api-keys/self").status_code == 200
    for key in (None, dead, small):
        with sidecar.client(key) as client:
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    with sidecar.client(admin_key) as client:
        assert components(client) == HEALTHY


def test_a_probe_is_no_failed_check(sidecar: Sidecar) -> None:
    """A request for readiness without a key is not counted as one whose key is missing."""

    def missing() -> str:
        with sidecar.probe() as probe:
            page = probe.get("/metrics").text
        [line] = [each for each in page.splitlines() if 'decision="missing"' in each]
        return line

    before = missing()
    with sidecar.client() as anonymous:
        assert anonymous.get("/readyz").status_code == 200
    assert missing() == before


def test_all_components_are_reported(sidecar: Sidecar) -> None:
    """Each with a state; what there is not is `off`."""
    with sidecar.probe() as probe:
        assert components(probe) == HEALTHY
        reported = probe.get("/readyz").json()["components"]
    assert reported["redis"] == {"state": "off", "since": None, "reason": ""}
    assert datetime.fromisoformat(reported["store"]["since"]).tzinfo is not None


def test_a_store_that_was_never_there_is_reported(watching: httpx.Client) -> None:
    """The words are ours: a driver's may hold hosts, users and paths."""
    component = watching.get("/readyz").json()["components"]["store"]
    assert (component["state"], component["reason"]) == ("unavailable", "the store does not answer")


def said(caplog: pytest.LogCaptureFixture, words: str) -> int:
    """How many lines of the log begin so."""
    return sum(record.message.startswith(words) for record in caplog.records)


def test_a_redis_that_dies_is_reported_and_not_needed(
    generous_redis_timeouts: None,
    store_url: str,
    redis_server: RedisServer,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ready all the same; one line when it goes and one when it is back, whatever the requests."""
    with (
        sidecar_on(store_url, clock, redis=redis_server.url) as sidecar,
        sidecar.probe() as probe,
    ):
        keys = [sidecar.create() for _ in range(12)]

        def use(key: Created) -> int:
            with sidecar.client(key) as client:
                return client.get("/verify").status_code

        assert use(keys[0]) == 200
        assert components(probe) == HEALTHY | {"redis": "ok"}
        redis_server.kill()
        clock.tick(60)
        for key in keys[1:9]:
            assert use(key) == 200
            clock.tick(1)
        answer = probe.get("/readyz")
        component = answer.json()["components"]["redis"]
        assert (answer.status_code, component["state"]) == (200, "degraded")
        assert component["reason"] == "Redis does not answer"
        assert abs(datetime.fromisoformat(component["since"]).timestamp() - clock() + 8) < 1
        assert "keylatch_redis_breaker_open 1.0" in probe.get("/metrics").text
        redis_server.start()
        for key in keys[9:]:
            clock.tick(6)
            assert use(key) == 200
        assert components(probe) == HEALTHY | {"redis": "ok"}
    assert said(caplog, "Redis does not answer") == 1
    assert said(caplog, "Redis answers again") == 1


def test_a_postgresql_that_stops_is_reported(
    postgres: PostgresServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Store and lease with their hour; a flood of refused requests adds no line to the log."""
    with sidecar_on(postgres.new_database(), clock) as sidecar, sidecar.probe() as probe:
        known, cold = sidecar.create(), sidecar.create()
        with sidecar.client(known) as client, sidecar.client(cold) as other:
            assert client.get("/verify").status_code == 200
            assert components(probe) == HEALTHY | {"lease": "ok", "notifier": "ok"}
            clock.tick(60)
            assert client.get("/verify").status_code == 200
            postgres.kill()
            clock.tick(30)
            try:
                seen = {each.get("/verify").status_code for each in (client, other) * 10}
                answer = probe.get("/readyz")
                # The lease is renewed four times a second by the wall clock.
                eventually(lambda: said(caplog, "lease not renewed") == 1)
            finally:
                postgres.start()
            assert seen == {503}
            assert answer.status_code == 503
            reported = answer.json()["components"]
            assert reported["store"]["state"] == reported["lease"]["state"] == "unavailable"
            begun = datetime.fromisoformat(reported["lease"]["since"]).timestamp()
            assert clock() - 31 < begun < clock() - 28, "when its lease was over"
            clock.tick(6)
            eventually(lambda: client.get("/verify").status_code == 200)
            clock.tick(6)
            assert other.get("/verify").status_code == 200
            # Uses are stored again with the next flush, in five seconds of real time, and a
            # lease is renewed four times a second.
            eventually(
                lambda: (
                    components(probe) | {"usage": "ok"}
                    == HEALTHY | {"lease": "ok", "notifier": "ok"}
                )
            )
    for words in ("the store does not answer", "checks are refused with 503", "lease not renewed"):
        assert said(caplog, words) == 1, words
    for words in ("the store answers again", "checks are answered again"):
        assert said(caplog, words) == 1, words


def test_a_condition_says_each_change_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It waits until it is calm, where good and bad take turns; some pass by themselves."""
    shaky = Health("it is down", "it is up", recovery_seconds=5, clock=clock)
    for _ in range(20):
        shaky.record_failure("why", "what to do")
        shaky.record_success()
        clock.tick(1)
    assert (shaky.is_healthy, clock() - shaky.since) == (False, 20)
    clock.tick(5)
    assert not shaky.is_healthy, "no attempt was made"
    shaky.record_success()
    assert (shaky.is_healthy, clock() - shaky.since) == (True, 0)
    assert [record.message for record in caplog.records] == [
        "it is down: why; what to do",
        "it is up, after 25 s",
    ]
    passing = Health("full", "free", recovery_seconds=5, recovers_by_time=True, clock=clock)
    passing.record_failure("why")
    clock.tick(6)
    assert (passing.is_healthy, clock() - passing.since) == (True, 1)
    assert passing.failures.value == 1


def test_the_readme_shows_what_is_answered(sidecar: Sidecar) -> None:
    """Its example has the components, the fields and the words of a real answer."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = json.loads(readme.partition("and since when:\n\n```\n")[2].partition("```")[0])
    with sidecar.probe() as probe:
        real = probe.get("/readyz").json()
    assert shown.keys() == real.keys()
    assert {name: part.keys() for name, part in shown["components"].items()} == {
        name: part.keys() for name, part in real["components"].items()
    }
