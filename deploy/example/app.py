"""FastAPI: the key is a dependency, and a route's permission is declared at the route.

    keylatch keys create --name me
    uvicorn --lifespan on --app-dir deploy/example app:app

http://127.0.0.1:8000/docs shows what each route needs, and has a button to authorize.
"""

from typing import Annotated

from fastapi import FastAPI, Security

from keylatch import Principal
from keylatch.fastapi import APIKey, APIKeyMiddleware, permissions_of

app = FastAPI(title="Example")
api_key = APIKey()
app.add_middleware(
    APIKeyMiddleware,  # the store comes from KEYLATCH_STORE
    public=["/healthz", "/docs", "/openapi.json"],
    permissions=permissions_of(app),
)


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Needs no key."""
    return {"status": "ok"}


@app.get("/v1/me")
async def me(key: Annotated[Principal, Security(api_key)]) -> dict[str, str]:
    """Needs a key with FULL."""
    return {"key": key.key_id, "name": key.key_name}


@app.post("/v1/emails")
async def send_email(
    key: Annotated[Principal, Security(api_key, scopes=["SENDING"])],
) -> dict[str, str]:
    """Needs a key with FULL or SENDING."""
    return {"sent by": key.key_name}
