"""The tests of the example app, as its author would write them: no server, no hash, no waiting."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app import app
from keylatch.testing import Keys


@pytest.fixture
def keys() -> Iterator[Keys]:
    """Keys that the app accepts, for one test."""
    with Keys().behind(app) as keys:
        yield keys


@pytest.fixture
def client(keys: Keys) -> Iterator[TestClient]:
    """Calls the app."""
    with TestClient(app) as client:
        yield client


def test_requests_without_a_valid_key_are_refused(client: TestClient) -> None:
    """Without a key there is nothing to see but the health check."""
    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/me").status_code == 401


def test_a_caller_sees_itself(client: TestClient, keys: Keys) -> None:
    """The app knows its caller by the key's name."""
    key = keys.create("ci")
    assert client.get("/v1/me", headers=key.headers).json() == {"key": key.id, "name": "ci"}


def test_a_newsletter_may_only_send(client: TestClient, keys: Keys) -> None:
    """SENDING opens the one route that is named for it."""
    sender = keys.create(permission="SENDING").headers
    assert client.post("/v1/emails", headers=sender).status_code == 200
    assert client.get("/v1/me", headers=sender).status_code == 403


def test_a_trial_key_ends(client: TestClient, keys: Keys) -> None:
    """After its day, it is as good as none; the test does not wait for it."""
    trial = keys.create(expires_in=86_400)
    assert client.get("/v1/me", headers=trial.headers).status_code == 200
    keys.clock.tick(86_400)
    assert client.get("/v1/me", headers=trial.headers).status_code == 401


def test_a_revoked_key_is_gone_at_once(client: TestClient, keys: Keys) -> None:
    """As in production."""
    key = keys.create()
    assert client.get("/v1/me", headers=key.headers).status_code == 200
    keys.revoke(key)
    assert client.get("/v1/me", headers=key.headers).status_code == 401


def test_what_the_app_does_and_not_who_may(client: TestClient, keys: Keys) -> None:
    """Where a test is not about keys, every request has a principal."""
    with keys.everyone_is() as somebody:
        assert client.get("/v1/me").json()["key"] == somebody.key_id
