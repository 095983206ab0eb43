"""`SyncKeyring`, the keyring for threads: every method is that of `Keyring`, on another thread."""

import inspect
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from keylatch import Keyring, NewKey, Settings, StoreUnavailable, SyncKeyring
from keylatch.flask import api_key
from keylatch.testing import Keys
from keylatch.wsgi import APIKeyMiddleware
from tests.support.engines import MakeEngine

OWN_PROGRAMS_ONLY = {"analyze", "find_imported", "import_many", "now_ms", "revoke_secret"}


def methods(keyring: type[Any]) -> dict[str, inspect.Signature]:
    functions = inspect.getmembers(keyring, inspect.isfunction)
    return {name: inspect.signature(each) for name, each in functions if name[0] != "_"}


def parameters(signature: inspect.Signature) -> list[inspect.Parameter]:
    return list(signature.parameters.values())[1:]


def test_the_page_of_the_public_api_lists_the_methods() -> None:
    """All that both keyrings have."""
    page = (Path(__file__).parents[2] / "docs/public-api.md").read_text()
    table = page.partition("| method |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == methods(SyncKeyring).keys() - {"close"}


@pytest.fixture
def settings(store_url: str) -> Settings:
    return Settings.load(store=store_url, redis="", hasher="sha256")


def test_both_keyrings_have_the_same_methods_and_arguments() -> None:
    """Except for the few that only keylatch's own programs call, and `close`."""
    asynchronous, synchronous = methods(Keyring), methods(SyncKeyring)
    assert asynchronous.keys() - OWN_PROGRAMS_ONLY == synchronous.keys() - {"close"}
    for name in asynchronous.keys() - OWN_PROGRAMS_ONLY:
        assert parameters(synchronous[name]) == parameters(asynchronous[name]), name
        assert not inspect.iscoroutinefunction(getattr(SyncKeyring, name))


def test_a_script_manages_keys(settings: Settings) -> None:
    """From the creation of a key to its end, with the values that `Keyring` returns."""
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    with SyncKeyring(settings) as keyring:
        created = keyring.create("acme", "ci", expires_at=tomorrow, metadata={"team": "a"})
        found = keyring.get("acme", created.key.id)
        assert found == created.key
        assert (found.expires_at, dict(found.metadata)) == (tomorrow, {"team": "a"})
        changed = keyring.change("acme", found.id, name="deploy", expires_at=None)
        assert changed is not None
        assert (changed.key.name, changed.key.expires_at) == ("deploy", None)
        rotated = keyring.rotate("acme", found.id, grace=timedelta(minutes=5))
        assert rotated is not None
        assert rotated.secret != created.secret
        previous = rotated.key.previous
        assert previous is not None
        assert rotated.key.rotated_at is not None
        assert previous.expires_at == rotated.key.rotated_at + timedelta(minutes=5)
        assert keyring.finish_rotation("acme", found.id) is not None
        deleted = keyring.delete("acme", found.id)
        assert deleted is not None
        assert deleted.key.deleted_at is not None
        assert keyring.list("acme") == []
        assert keyring.revoke_all("acme").count == 0


def test_pages_are_an_iterator(settings: Settings) -> None:
    """All keys, also where there is more than one page; a loop may be left early."""
    with SyncKeyring(settings) as keyring:
        keyring.create_many([NewKey("acme", f"key {n}") for n in range(600)])
        sizes = [len(page.keys) for page in keyring.pages("acme")]
        assert (len(sizes), sum(sizes)) == (2, 600)
        for page in keyring.pages("acme", newest_first=False):
            assert page.keys[0].name == "key 0"
            break
        assert keyring.list("acme")


def test_the_audit_log_names_the_operator(settings: Settings) -> None:
    """The one that `as_operator` is given, and only for the keyring that it returns."""
    with SyncKeyring(settings) as keyring:
        keyring.as_operator("script:alice").create("acme", "ci")
        keyring.create("acme", "ci")
        assert [each.actor for each in keyring.events("acme", 9)] == ["operator", "script:alice"]
        assert keyring.events("acme", 1)[0].at <= datetime.now(UTC)


def test_many_threads_share_one_keyring(settings: Settings) -> None:
    """Their calls run on one event loop."""
    with SyncKeyring(settings) as keyring:
        calls = [("acme", f"key {n}") for n in range(8)]
        threads = [threading.Thread(target=keyring.create, args=each) for each in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {key.name for key in keyring.list("acme")} == {name for _, name in calls}


def test_errors_are_the_keyrings_own(settings: Settings) -> None:
    """A mistake is an `InvalidValue`, a missing store `StoreUnavailable`."""
    with SyncKeyring(settings) as keyring:
        with pytest.raises(ValueError, match="permission"):
            keyring.create("acme", "ci", permission="NONSENSE")
        assert [error.field for error in keyring.validate(NewKey("acme", ""))] == ["name"]
    missing = Settings.load(store="sqlite:////nowhere/keys.db", redis="")
    with SyncKeyring(missing) as keyring, pytest.raises(StoreUnavailable):
        keyring.list("acme")


def test_a_keyring_of_an_app_leaves_its_engine_running(make_engine: MakeEngine) -> None:
    """The end of a `with` block stops only an engine that the keyring made itself."""
    engine = make_engine()
    with SyncKeyring(engine=engine) as keyring:
        keyring.create("acme", "ci")
    assert engine._opened is not None
    keyring._portal.close()
    assert engine._opened is None


def test_a_flask_view_creates_and_revokes_keys() -> None:
    """`middleware.keyring` and the requests of the app use the same engine."""
    app, keys = Flask("app"), Keys()
    middleware = APIKeyMiddleware(app.wsgi_app, engine=keys.engine())
    app.wsgi_app = middleware  # type: ignore[method-assign]

    @app.post("/keys")
    def create() -> dict[str, str]:
        created = middleware.keyring.create(api_key.organization_id, "new", by=api_key)
        return {"id": created.key.id, "secret": created.secret}

    @app.delete("/keys/<key_id>")
    def delete(key_id: str) -> dict[str, bool]:
        done = middleware.keyring.delete(api_key.organization_id, key_id, by=api_key)
        return {"found": done is not None}

    client = app.test_client()
    new = client.post("/keys", headers=keys.create().headers).json
    assert new is not None
    headers = {"Authorization": f"Bearer {new['secret']}"}
    assert client.post("/keys", headers=headers).status_code == 200
    assert client.delete(f"/keys/{new['id']}", headers=headers).json == {"found": True}
    assert client.post("/keys", headers=headers).status_code == 401
    middleware.close()
