"""keylatch: the middleware and the dependency on FastAPI; the store comes from KEYLATCH_STORE."""

from typing import Annotated

from fastapi import FastAPI, Security

from keylatch import Principal
from keylatch.fastapi import APIKey, APIKeyMiddleware, permissions_of

unguarded, guarded = FastAPI(), FastAPI()
api_key = APIKey()
guarded.add_middleware(APIKeyMiddleware, permissions=permissions_of(guarded))


@unguarded.get("/open")
async def open_() -> str:
    return "hello"


@guarded.get("/protected")
async def protected(key: Annotated[Principal, Security(api_key)]) -> str:
    return "hello"


async def app(scope, receive, send):
    """The open route meets no middleware."""
    chosen = unguarded if scope.get("path") == "/open" else guarded
    await chosen(scope, receive, send)
