"""What users write, for type checkers: nothing here runs, everything here must be understood."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import keylatch.wsgi
from keylatch import (
    Changed,
    ConfigurationError,
    Created,
    Engine,
    Principal,
    Rotated,
    Settings,
    SyncKeyring,
)
from keylatch.asgi import APIKeyMiddleware
from keylatch.testing import Key, Keys


@requires("SENDING")
async def send(request: Request) -> JSONResponse:
    """A view that knows its caller."""
    caller: Principal = request.user
    return JSONResponse({"by": caller.key_name, "for": caller.organization_id})


app = Starlette(
    routes=[Route("/v1/emails", send, methods=["POST"])],
    middleware=[
        Middleware(
            APIKeyMiddleware,
            store="sqlite:///keys.db",
            redis=None,
            public=["/healthz"],
            permissions={"SENDING": ["POST /v1/emails", "POST /v1/emails/batch"]},
        )
    ],
)

later = Starlette()
later.add_middleware(APIKeyMiddleware, store="sqlite:///keys.db", public=("/healthz",))


def hello(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    """A plain WSGI app."""
    caller: Principal = environ["keylatch.principal"]
    start_response("200 OK", [("content-type", "text/plain")])
    return [caller.display_name.encode()]


wsgi = keylatch.wsgi.APIKeyMiddleware(hello, store="sqlite:///keys.db", lease=1.5)


async def manage() -> str:
    """A program that makes a key and revokes it."""
    engine = Engine(Settings.load(store="sqlite:///keys.db", redis=""))
    await engine.start()
    keyring = await engine.keyring()
    created: Created = await keyring.create("acme", "ci", permission="SENDING")
    gone = await keyring.delete("acme", created.key.id)
    assert gone is not None
    await engine.stop()
    return f"{gone.key.deleted_at} {gone.receipt.seq} {created.secret}"


def manage_in_a_thread() -> str:
    """The same in a script, and what else a keyring does."""
    with SyncKeyring(Settings.load(store="sqlite:///keys.db")) as keyring:
        ends: datetime = datetime.now(UTC) + timedelta(days=1)
        created: Created = keyring.create("acme", "ci", expires_at=ends, metadata={"team": "a"})
        changed: Changed | None = keyring.change("acme", created.key.id, expires_at=None)
        rotated: Rotated | None = keyring.rotate("acme", created.key.id, grace=timedelta(hours=1))
        names: list[str] = [each.name for page in keyring.pages("acme") for each in page.keys]
        assert changed is not None
        assert rotated is not None
        return f"{rotated.secret} {changed.key.expires_at} {names}"


def settings() -> list[tuple[str, str]]:
    """What is wrong, and what to do."""
    try:
        Settings.load(store="mysql://nowhere")
    except ConfigurationError as error:
        return list(error.mistakes)
    return []


def test_me(api_keys: Keys) -> None:
    """A test with the fixture."""
    with api_keys.behind(app):
        key: Key = api_keys.create(permission="SENDING", expires_in=60)
        headers: dict[str, str] = key.headers
        api_keys.clock.tick(61)
        assert headers
