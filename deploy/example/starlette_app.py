"""Starlette: `request.user`, `request.auth.scopes` and `@requires`, as with any authentication.

    keylatch keys create --name me
    uvicorn --lifespan on --app-dir deploy/example starlette_app:app

The rules say what a key may call at all; `@requires` says it once more where the route is.
"""

from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from keylatch.asgi import APIKeyMiddleware


async def healthz(request: Request) -> JSONResponse:
    """Needs no key."""
    return JSONResponse({"status": "ok"})


async def me(request: Request) -> JSONResponse:
    """Needs a key with FULL, because no rule names it for another permission."""
    return JSONResponse({"key": request.user.key_id, "name": request.user.key_name})


@requires("SENDING")
async def send_email(request: Request) -> JSONResponse:
    """Needs a key with FULL or SENDING: a FULL key's `request.auth.scopes` contain every scope."""
    return JSONResponse({"sent by": request.user.key_name})


app = Starlette(
    routes=[
        Route("/healthz", healthz),
        Route("/v1/me", me),
        Route("/v1/emails", send_email, methods=["POST"]),
    ],
    middleware=[
        Middleware(
            APIKeyMiddleware,  # the store comes from KEYLATCH_STORE
            public=["/healthz"],
            permissions={"SENDING": ["POST /v1/emails"]},
        )
    ],
)
