"""The ASGI middleware: one line around an app, one decision for each request.

    app.add_middleware(APIKeyMiddleware, store="sqlite:///keys.db", public=["/healthz"])

It spells what `credentials`, `engine`, `policy` and `refusals` decide in terms of ASGI, and
nothing else. Scopes are copied, never written on.
"""

from functools import partial
from typing import Any, Final

from starlette.authentication import AuthCredentials, UnauthenticatedUser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keylatch.adapters.middleware import BaseMiddleware
from keylatch.adapters.proxy_identity import Peer, ProxyIdentity
from keylatch.adapters.routing import ASGIRouter
from keylatch.adapters.websocket import run_until
from keylatch.core import credentials
from keylatch.core.credentials import is_identity_header
from keylatch.core.decisions import DeferredDeny, Deny
from keylatch.core.policy import route_path
from keylatch.core.refusals import Refusal
from keylatch.core.rules import WEBSOCKET
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import KeylatchError, Refused
from keylatch.telemetry.request_trace import RequestTrace, time_check, tracing_request

_TRACED: Final = "keylatch.traced"
_RESPONSE_STARTS: Final = (
    "http.response.start",
    "websocket.accept",
    "websocket.http.response.start",
)


class APIKeyMiddleware(BaseMiddleware[ASGIApp]):
    __doc__ = (
        f"""`scope["user"]`: principal, `scope["auth"]`: its scopes. {BaseMiddleware.__doc__}"""
    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            if scope["type"] == "lifespan":
                await _run_lifespan(self._app, self.engine, scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        if self._traces_requests and _TRACED not in scope:  # one test is all that a hit pays
            await self._call_traced(scope, receive, send)
            return
        values, has_identity_headers = credentials.scan_headers(scope["headers"])
        method, path = scope.get("method", WEBSOCKET), route_path(scope)
        requirement = self._policy.requirement_for(method, path, scope, self._router)
        scope = _copy(scope, has_identity_headers)
        if requirement is None:
            scope["user"], scope["auth"] = UnauthenticatedUser(), AuthCredentials()
        else:
            decision = self._authenticator.check_cached(values, requirement)
            if isinstance(decision, Token):
                decision = await self._authenticator.check(decision, requirement)
            if isinstance(decision, Deny):
                if isinstance(decision, DeferredDeny):
                    requirement = self._policy.routed_requirement(method, path, scope, self._router)
                    decision = time_check(partial(decision.decide, requirement))
                if isinstance(decision, Deny):
                    refusal = self._refusals.refuse(decision, partial(client_info_of, scope))
                    await refuse(refusal, scope, receive, send)
                    return
            scope["user"] = decision.principal
            scope["auth"] = decision.credentials
            if self.engine.records_clients:
                self.engine.record_client(decision.principal.key_id, partial(client_info_of, scope))
        try:
            if requirement is not None and scope["type"] == "websocket":
                if not requirement.is_final:  # a key with FULL may be given less meanwhile
                    requirement = self._policy.routed_requirement(method, path, scope, self._router)
                with self.engine.revocation_event(values, requirement) as ended:
                    await run_until(ended, self._app, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except Refused as refused:
            refusal = self._refusals.refuse(refused.deny, partial(client_info_of, scope))
            await refuse(refusal, scope, receive, send)

    def _make_router(self, app: ASGIApp) -> ASGIRouter:
        return ASGIRouter(app, _is_keylatch_middleware)

    async def _call_traced(self, scope: Scope, receive: Receive, send: Send) -> None:
        adds_headers = self.engine.settings.timing == "on"
        with tracing_request(scope["headers"]) as trace:
            traced_send = with_headers(trace, send) if adds_headers else send
            await self({**scope, _TRACED: True}, receive, traced_send)


class ProxyIdentityMiddleware(ProxyIdentity[ASGIApp]):
    """For an app behind a proxy that asks the sidecar: the same principal, from its headers.

    The arguments are those of `keylatch.adapters.proxy_identity.ProxyIdentity`. Start uvicorn with
    `--no-proxy-headers`: otherwise the peer is the address in `X-Forwarded-For`.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        method = scope.get("method", WEBSOCKET)
        path = route_path(scope)
        decision = self.evaluate(peer_of(scope), scope["headers"], method, path, scope)
        if isinstance(decision, Deny):
            await refuse(self._refusals.refusal_for(decision), scope, receive, send)
            return
        scope = _copy(scope, has_identity_headers=True)
        if decision is None:
            scope["user"], scope["auth"] = UnauthenticatedUser(), AuthCredentials()
        else:
            scope["user"] = decision.principal
            scope["auth"] = decision.credentials
        try:
            await self._app(scope, receive, send)
        except Refused as refused:
            await refuse(self._refusals.refusal_for(refused.deny), scope, receive, send)

    def _make_router(self, app: ASGIApp) -> ASGIRouter:
        return ASGIRouter(app, _is_keylatch_middleware)


def _is_keylatch_middleware(listed: object) -> bool:
    """Whether one of Starlette's list of middlewares is keylatch's."""
    cls = getattr(listed, "cls", None)
    return isinstance(cls, type) and issubclass(cls, BaseMiddleware | ProxyIdentity)


def peer_of(scope: Scope) -> str | Peer:
    """The address at the other end; without one, a Unix socket if the server says that it is one.

    It says so in `server`: the socket's path, and no port (ASGI specification, HTTP connection
    scope; granian: port "0"). hypercorn and daphne say nothing there.
    """
    client, server = scope.get("client"), scope.get("server")
    if client and client[0]:
        return str(client[0])
    if server and "/" in str(server[0]) and server[1] in (None, "0"):
        return Peer.UNIX_SOCKET
    return Peer.UNKNOWN


def client_info_of(scope: Scope) -> tuple[str | None, str | None]:
    """Address and user agent."""
    client = scope.get("client")
    agents = [value for name, value in scope["headers"] if name == b"user-agent"]
    return client and client[0], agents[0].decode("latin-1") if agents else None


def _copy(scope: Scope, has_identity_headers: bool) -> dict[str, Any]:
    """A copy of the scope, without headers that pose as keylatch's."""
    copy = dict(scope)
    # A list of our own in any case: uvicorn on httptools appends trailers to the one it gave away.
    copy["headers"] = [*scope["headers"]]
    if has_identity_headers:
        copy["headers"] = [each for each in copy["headers"] if not is_identity_header(each[0])]
    return copy


def with_headers(trace: RequestTrace, send: Send) -> Send:
    """Send, with what the trail tells among the headers."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] in _RESPONSE_STARTS:
            message = {**message, "headers": [*message.get("headers", ()), *trace.headers()]}
        await send(message)

    return send_with_headers


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a refusal over HTTP, or over a WebSocket handshake as far as the server can."""
    kind = "http"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await receive()  # websocket.connect; closing before accepting is a 403 (ASGI spec)
            await send({"type": "websocket.close", "code": 1008})
            return
        kind = "websocket.http"
    headers = list(refusal.headers)
    body = b"" if scope.get("method") == "HEAD" else refusal.body
    await send({"type": f"{kind}.response.start", "status": refusal.status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body})


async def _run_lifespan(
    app: ASGIApp, engine: Engine, scope: Scope, receive: Receive, send: Send
) -> None:
    """Start the engine before the app starts and stop it after the app has stopped.

    An app that does not know lifespan events is spared them; the engine still gets its own.
    """
    received = sent = ""

    async def receive_and_start() -> Message:
        nonlocal received
        message = await receive()
        received = message["type"]
        if received == "lifespan.startup":
            await _start(engine, send_and_stop)
        return message

    async def send_and_stop(message: Message) -> None:
        nonlocal sent
        sent = message["type"]
        if sent != "lifespan.startup.complete":
            await engine.stop()
        await send(message)

    try:
        await app(scope, receive_and_start, send_and_stop)
    except Exception:
        if received:
            await engine.stop()
            raise
    await _finish_lifespan(engine, receive, send, received, sent)


async def _finish_lifespan(
    engine: Engine, receive: Receive, send: Send, received: str, sent: str
) -> None:
    """Take the events that the app left, and give the answers that it owes."""
    if not received:
        await receive()  # lifespan.startup
        await _start(engine, send)
    if not sent:
        await send({"type": "lifespan.startup.complete"})
    if sent in ("", "lifespan.startup.complete"):
        if received != "lifespan.shutdown":
            await receive()
        await engine.stop()
        await send({"type": "lifespan.shutdown.complete"})


async def _start(engine: Engine, send: Send) -> None:
    try:
        await engine.start()
    except KeylatchError as error:
        # Said this way, because servers take a mere exception for "knows no lifespan events"
        # and serve on.
        message = f"error: {error.message}\nhint: {error.hint}"
        await send({"type": "lifespan.startup.failed", "message": message})
        raise
