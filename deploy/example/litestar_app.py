"""Litestar: the middleware is wrapped around the whole app.

    keylatch keys create --name me
    uvicorn --lifespan on --app-dir deploy/example litestar_app:app

In Litestar's own `middleware=[…]` it would be built for each route and hear no lifespan events.
"""

from typing import Any

from litestar import Litestar, Request, get, post

from keylatch import Principal
from keylatch.asgi import APIKeyMiddleware

KeyRequest = Request[Principal, Any, Any]


@get("/healthz")
async def healthz() -> dict[str, str]:
    """Needs no key."""
    return {"status": "ok"}


@get("/v1/me")
async def me(request: KeyRequest) -> dict[str, str]:
    """Needs a key with FULL."""
    return {"key": request.user.key_id, "name": request.user.key_name}


@post("/v1/emails", status_code=200)
async def send_email(request: KeyRequest) -> dict[str, str]:
    """Needs a key with FULL or SENDING."""
    return {"sent by": request.user.key_name}


app = APIKeyMiddleware(
    Litestar([healthz, me, send_email]),  # type: ignore[arg-type] # its own types of ASGI
    public=["/healthz"],
    permissions={"SENDING": ["POST /v1/emails"]},
)  # the store comes from KEYLATCH_STORE
