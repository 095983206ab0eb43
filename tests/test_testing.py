"""`keylatch.testing`: an app's tests get real keys, no hashing cost, and a clock that they move."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import Principal
from keylatch.testing import Clock, Keys
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from tests.support.raw_http import asgi_request

RULES = {"SENDING": ["POST /v1/emails"]}


async def me(request: Request) -> Response:
    return JSONResponse({"name": request.user.display_name})


def starlette_app() -> Starlette:
    app = Starlette(routes=[Route("/v1/me", me), Route("/v1/emails", me, methods=["POST"])])
    app.add_middleware(APIKeyMiddleware, store="sqlite:////nowhere/keys.db", permissions=RULES)
    return app


def flask_app() -> Flask:
    app = Flask("app_under_test", root_path="/")

    @app.get("/v1/me")
    def name() -> dict[str, str]:
        return {"name": request.environ["keylatch.principal"].display_name}

    app.post("/v1/emails")(name)
    app.wsgi_app = WSGIMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, store="sqlite:////nowhere/keys.db", permissions=RULES
    )
    return app


class Caller:
    """Calls an app of either kind."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def status(self, path: str = "/v1/me", method: str = "GET", **headers: str) -> int:
        if isinstance(self._app, Flask):
            return self._app.test_client().open(path, method=method, headers=headers).status_code
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        return asyncio.run(asgi_request(self._app, path, raw, method=method)).status


@pytest.fixture(params=[starlette_app, flask_app])
def app(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def keys() -> Keys:
    return Keys()


def test_a_rotated_key_has_two_secrets_until_the_clock_says(app: Any, keys: Keys) -> None:
    """What a client meets that learns of it late."""
    caller = Caller(app)
    with keys.behind(app):
        old = keys.create()
        new = keys.rotate(old, grace=60)
        assert new.id == old.id
        assert [caller.status(**key.headers) for key in (old, new)] == [200, 200]
        keys.clock.tick(60)
        assert [caller.status(**key.headers) for key in (old, new)] == [401, 200]


def test_the_apps_own_middleware_accepts_minted_keys(app: Any, keys: Keys) -> None:
    """Rules, revokes and refusals are the real ones; afterwards the app is as it was."""
    caller = Caller(app)
    assert caller.status(Authorization="Bearer kl_x") == 503  # its own store is nowhere
    with keys.behind(app):
        admin_key, sender = keys.create(), keys.create(permission="SENDING")
        assert caller.status() == 401
        assert caller.status(**admin_key.headers) == 200
        assert caller.status(**sender.headers) == 403
        assert caller.status("/v1/emails", "POST", **sender.headers) == 200
        keys.revoke(admin_key)
        assert caller.status(**admin_key.headers) == 401
        keys.change(sender, active=False)
        assert caller.status("/v1/emails", "POST", **sender.headers) == 401
    assert caller.status(Authorization="Bearer kl_x") == 503


def test_time_passes_on_demand(app: Any, keys: Keys) -> None:
    """A key that expires in an hour is good for an hour of the test's clock."""
    with keys.behind(app):
        key = keys.create(expires_in=3600)
        assert Caller(app).status(**key.headers) == 200
        keys.clock.tick(3601)
        assert Caller(app).status(**key.headers) == 401


def test_every_request_may_have_a_principal(app: Any, keys: Keys) -> None:
    """Without any key, as the principal that the test wants; rules still hold."""
    caller = Caller(app)
    sender = Principal("key_x", "newsletter", "acme", "SENDING", "live")
    with keys.behind(app):
        with keys.everyone_is():
            assert caller.status() == 200
        with keys.everyone_is(sender) as principal:
            assert principal is sender
            assert caller.status("/v1/emails", "POST") == 200
            assert caller.status() == 403
        assert caller.status() == 401


def test_an_app_without_the_middleware_is_an_error(keys: Keys) -> None:
    """A test that would protect nothing fails."""
    with pytest.raises(LookupError, match="Starlette"), keys.behind(Starlette()):
        pass


def test_a_key_shows_no_token(keys: Keys) -> None:
    """Also test logs are logs."""
    key = keys.create()
    assert key.token not in repr(key)
    assert key.headers == {"Authorization": f"Bearer {key.token}"}
    assert [record.id for record in keys.records()] == [key.id]


def test_keys_are_made_from_an_async_test_too(keys: Keys) -> None:
    """A running loop is no obstacle, and one set of keys knows nothing of another."""

    async def inside() -> str:
        return keys.create().id

    assert asyncio.run(inside()) == keys.records()[0].id
    assert Keys().records() == []


def test_an_error_arrives_from_an_async_test_too(keys: Keys) -> None:
    """It is not lost with the thread."""

    async def inside() -> None:
        keys.create(permission="NONSENSE")

    with pytest.raises(ValueError, match="permission"):
        asyncio.run(inside())


def test_the_clock_is_a_clock() -> None:
    """It stands still, and moves on demand."""
    clock = Clock(5)
    clock.tick(2.5)
    assert clock() == 7.5


def test_threads_share_the_store_in_memory(keys: Keys) -> None:
    """Apps under test are served from threads."""
    threads = [threading.Thread(target=keys.create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys.records()) == 8


@pytest.mark.long
def test_it_works_without_pytest() -> None:
    """unittest is enough."""
    program = (
        "import sys; sys.modules['pytest'] = None\n"
        "from keylatch.testing import Keys\n"
        "print(Keys().create().id[:4])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"key_\n"


@pytest.mark.long
def test_the_fixture_is_a_plugin(tmp_path: Path) -> None:
    """`pytest_plugins = ["keylatch.testing"]` is all that a conftest.py needs."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["keylatch.testing"]\n')
    test = "def test_it(api_keys):\n    assert api_keys.create().headers\n"
    (tmp_path / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 0
