"""Quart: the middleware is wrapped around `app.asgi_app`, the principal is in `request.scope`.

    keylatch keys create --name me
    hypercorn deploy/example/quart_app:app

Lifespan events and WebSockets pass through it too.
"""

from quart import Quart, request

from keylatch import Principal
from keylatch.asgi import APIKeyMiddleware

app = Quart(__name__)
app.asgi_app = APIKeyMiddleware(  # type: ignore[assignment]
    app.asgi_app,  # type: ignore[arg-type] # Quart spells the types of ASGI its own way
    public=["/healthz"],
    permissions={"SENDING": ["POST /v1/emails"]},
)  # the store comes from KEYLATCH_STORE


def principal() -> Principal:
    """Who calls."""
    return request.scope["user"]  # type: ignore[typeddict-item, no-any-return]


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Needs no key."""
    return {"status": "ok"}


@app.get("/v1/me")
async def me() -> dict[str, str]:
    """Needs a key with FULL."""
    return {"key": principal().key_id, "name": principal().key_name}


@app.post("/v1/emails")
async def send_email() -> dict[str, str]:
    """Needs a key with FULL or SENDING."""
    return {"sent by": principal().key_name}
