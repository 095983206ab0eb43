"""An app with one protected route of each kind: what a keylatch user writes."""

from fastapi import FastAPI, Request

from keylatch.asgi import APIKeyMiddleware

app = FastAPI(title="Example")
app.add_middleware(
    APIKeyMiddleware,  # the store comes from KEYLATCH_STORE
    public=["/healthz"],
    permissions={"SENDING": ["POST /v1/emails"]},
)


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Needs no key."""
    return {"status": "ok"}


@app.get("/v1/me")
async def me(request: Request) -> dict[str, str]:
    """Needs a key with FULL."""
    return {"key": request.user.key_id, "name": request.user.key_name}


@app.post("/v1/emails")
async def send_email(request: Request) -> dict[str, str]:
    """Needs a key with FULL or SENDING."""
    return {"sent by": request.user.key_name}
