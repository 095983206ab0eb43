"""Behind a proxy that asks the sidecar: identity comes in headers, and only from the proxy.

    keylatch keys create --name me
    uvicorn --no-proxy-headers --app-dir deploy/example proxied_app:app

It needs no store and sees no key. Without `--no-proxy-headers` uvicorn
takes the peer's address from X-Forwarded-For.
"""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from keylatch.asgi import ProxyIdentityMiddleware


async def healthz(request: Request) -> JSONResponse:
    """Needs no key."""
    return JSONResponse({"status": "ok"})


async def me(request: Request) -> JSONResponse:
    """Needs a key with FULL."""
    return JSONResponse({"key": request.user.key_id, "name": request.user.key_name})


async def send_email(request: Request) -> JSONResponse:
    """Needs a key with FULL or SENDING."""
    return JSONResponse({"sent by": request.user.key_name})


app = Starlette(
    routes=[
        Route("/healthz", healthz),
        Route("/v1/me", me),
        Route("/v1/emails", send_email, methods=["POST"]),
    ],
    middleware=[
        Middleware(
            ProxyIdentityMiddleware,
            trusted=["127.0.0.1"],
            public=["/healthz"],
            permissions={"SENDING": ["POST /v1/emails"]},  # once more, if the proxy cannot say it
        )
    ],
)
