"""Live and ready; and a store that cannot be reached is never the key's fault."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import Clock, Sidecar, sidecar_on
from keylatch.keyring import Created
from servers import PostgresServer, free_port

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
def waiting(down: Sidecar, boss: Created) -> Iterator[httpx.Client]:
    """HTTP with a key that is good, if only somebody could look it up."""
    with down.client(boss) as client:
        yield client


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_sidecar_with_a_store_is_live_and_ready(sidecar: Sidecar, path: str) -> None:
    """200 without a key, for probes."""
    with sidecar.client() as probe:
        answer = probe.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert answer.headers["Cache-Control"] == "no-store"
        assert probe.head(path).status_code == 200
        assert probe.post(path).status_code == 405


def test_without_its_store_it_is_live_but_not_ready(waiting: httpx.Client) -> None:
    """Restarting it would not help (live), and sending it requests would not either (ready)."""
    assert waiting.get("/healthz").status_code == 200
    answer = waiting.get("/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "unavailable"})
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


@pytest.mark.parametrize("path", [UNSENT, SENDOOK])
def test_requests_alone_make_it_recover(tmp_path: Path, clock: Clock, path: str) -> None:
    """Nobody has to ask for readiness; a second later a request tries the store again."""
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
