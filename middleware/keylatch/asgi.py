"""The ASGI middleware: decides on each request before the app is called.

    app.add_middleware(APIKeyMiddleware, store="sqlite:///keys.db", public=["/healthz"])

It translates between ASGI and `credentials`, `policy`, the engine and `refusals`, and decides
nothing itself. It copies scopes and never changes the server's.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from starlette.authentication import AuthCredentials, UnauthenticatedUser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keylatch.adapters.middleware import BaseMiddleware
from keylatch.adapters.proxy_identity import Peer, ProxyIdentity
from keylatch.adapters.routing import ASGIRouter
from keylatch.adapters.websocket import run_until
from keylatch.authentication.authenticator import CacheMiss
from keylatch.core import credentials
from keylatch.core.credentials import is_identity_header
from keylatch.core.decisions import DeferredDeny, Deny
from keylatch.core.policy import route_path
from keylatch.core.refusals import Refusal
from keylatch.core.rules import WEBSOCKET
from keylatch.errors import KeylatchError, Refused
from keylatch.telemetry.request_trace import RequestTrace, time_check, tracing_request

if TYPE_CHECKING:
    from keylatch.engine import Engine

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
        if self._traces_requests and _TRACED not in scope:  # costs a hit one test
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
            if isinstance(decision, CacheMiss):
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
                if not requirement.is_final:  # the key's permission can change while it is open
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
        adds_headers = self.engine.settings.timing
        with tracing_request(scope["headers"]) as trace:
            traced_send = with_headers(trace, send) if adds_headers else send
            await self({**scope, _TRACED: True}, receive, traced_send)


class ProxyIdentityMiddleware(ProxyIdentity[ASGIApp]):
    """For an app behind a proxy that asks the sidecar: the principal, from the proxy's headers.

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
    """Whether an entry of Starlette's `user_middleware` is keylatch's."""
    cls = getattr(listed, "cls", None)
    return isinstance(cls, type) and issubclass(cls, BaseMiddleware | ProxyIdentity)


def peer_of(scope: Scope) -> str | Peer:
    """The peer's address; without one, a Unix socket if the server reports one.

    The server reports it in `server`: the socket's path and no port (ASGI specification, HTTP
    connection scope; granian: port "0"). hypercorn and daphne report nothing.
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
    """A copy of the scope without identity headers."""
    copy = dict(scope)
    # Always a new list: uvicorn on httptools appends trailers to the one in the scope.
    copy["headers"] = [*scope["headers"]]
    if has_identity_headers:
        copy["headers"] = [each for each in copy["headers"] if not is_identity_header(each[0])]
    return copy


def with_headers(trace: RequestTrace, send: Send) -> Send:
    """A `send` that adds the trace's headers to the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] in _RESPONSE_STARTS:
            message = {**message, "headers": [*message.get("headers", ()), *trace.headers()]}
        await send(message)

    return send_with_headers


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a refusal, over a WebSocket handshake with status and body if the server supports it."""
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
    app: ASGIApp, engine: "Engine", scope: Scope, receive: Receive, send: Send
) -> None:
    """Start the engine before the app and stop it after the app.

    If the app does not support lifespan events, the middleware answers them itself.
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
    engine: "Engine", receive: Receive, send: Send, received: str, sent: str
) -> None:
    """Receive the events that the app did not receive, and send the answers it did not send."""
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


async def _start(engine: "Engine", send: Send) -> None:
    try:
        await engine.start()
    except KeylatchError as error:
        # Servers treat an exception alone as "no lifespan support" and keep serving.
        message = f"error: {error.message}\nhint: {error.hint}"
        await send({"type": "lifespan.startup.failed", "message": message})
        raise
