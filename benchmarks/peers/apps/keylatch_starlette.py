"""keylatch: the ASGI middleware on Starlette; the store comes from KEYLATCH_STORE."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from keylatch.asgi import APIKeyMiddleware


async def hello(request: Request) -> PlainTextResponse:
    """The work of both routes."""
    return PlainTextResponse("hello")


routes = [Route("/open", hello), Route("/protected", hello)]
unguarded = Starlette(routes=routes)
guarded = Starlette(routes=routes)
guarded.add_middleware(APIKeyMiddleware)


async def app(scope, receive, send):
    """The open route meets no middleware."""
    chosen = unguarded if scope.get("path") == "/open" else guarded
    await chosen(scope, receive, send)
