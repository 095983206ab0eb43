"""The ASGI middleware: one line around an app, one decision for each request.

    app.add_middleware(APIKeyMiddleware, store="sqlite:///keys.db", public=["/healthz"])

It spells what `credentials`, `engine`, `policy` and `refusals` decide in terms of ASGI, and
nothing else. Scopes are copied, never written on.
"""

from functools import partial
from typing import Any, Final

from starlette.authentication import AuthCredentials, UnauthenticatedUser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keylatch import credentials
from keylatch.credentials import is_identity_header
from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.gate import Gate
from keylatch.identity import Peer, ProxyGate
from keylatch.model import Deny, Unsettled
from keylatch.policy import path_of
from keylatch.refusals import Refusal
from keylatch.routing import ASGIRouter
from keylatch.rules import WEBSOCKET
from keylatch.telemetry.trail import Trail, following, timed
from keylatch.tokens import Token
from keylatch.websocket import run_until

_FOLLOWED: Final = "keylatch.followed"
_STARTS: Final = ("http.response.start", "websocket.accept", "websocket.http.response.start")


class Refused(Exception):
    """Raised inside the app, before it has begun to answer: the middleware answers with a refusal.

    Args:
        deny: why, and what would have sufficed.
    """

    def __init__(self, deny: Deny) -> None:
        super().__init__(deny.reason.value)
        self.deny = deny


class APIKeyMiddleware(Gate[ASGIApp]):
    __doc__ = (
        f"""The principal is `scope["user"]`, what it may do `scope["auth"]`. {Gate.__doc__}"""
    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            if scope["type"] == "lifespan":
                await _with_lifespan(self._app, self.engine, scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        if self._is_followed and _FOLLOWED not in scope:  # one test is all that a hit pays
            await self._leave_trail(scope, receive, send)
            return
        values, is_posing = credentials.among(scope["headers"])
        method, path = scope.get("method", WEBSOCKET), path_of(scope)
        wanted = self._policy.asked(method, path, scope, self._router)
        scope = _copy(scope, is_posing)
        if wanted is None:
            scope["user"], scope["auth"] = UnauthenticatedUser(), AuthCredentials()
        else:
            verdict = self._checks.glance(values, wanted)
            if isinstance(verdict, Token):
                verdict = await self._checks.resolve(verdict, wanted)
            if isinstance(verdict, Deny):
                if isinstance(verdict, Unsettled):
                    wanted = self._policy.settled(method, path, scope, self._router)
                    verdict = timed(partial(verdict.settle, wanted))
                if isinstance(verdict, Deny):
                    refusal = self._refusals.refuse(verdict, partial(caller_of, scope))
                    await refuse(refusal, scope, receive, send)
                    return
            scope["user"] = verdict.principal
            scope["auth"] = verdict.credentials
            if self.engine.sees_clients:
                self.engine.see(verdict.principal.key_id, partial(caller_of, scope))
        try:
            if wanted is not None and scope["type"] == "websocket":
                if not wanted.is_final:  # a key with FULL may be given less meanwhile
                    wanted = self._policy.settled(method, path, scope, self._router)
                with self.engine.watching(values, wanted) as ended:
                    await run_until(ended, self._app, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except Refused as refused:
            refusal = self._refusals.refuse(refused.deny, partial(caller_of, scope))
            await refuse(refusal, scope, receive, send)

    def _router_of(self, app: ASGIApp) -> ASGIRouter:
        return ASGIRouter(app, _is_ours)

    async def _leave_trail(self, scope: Scope, receive: Receive, send: Send) -> None:
        tells = self.engine.settings.timing == "on"
        with following(scope["headers"]) as trail:
            told = telling(trail, send) if tells else send
            await self({**scope, _FOLLOWED: True}, receive, told)


class ProxyIdentityMiddleware(ProxyGate[ASGIApp]):
    """For an app behind a proxy that asks the sidecar: the same principal, from its headers.

    The arguments are those of `keylatch.identity.ProxyGate`. Run uvicorn with `--no-proxy-headers`,
    or the peer is whom `X-Forwarded-For` names.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        method = scope.get("method", WEBSOCKET)
        path = path_of(scope)
        verdict = self.judge(peer_of(scope), scope["headers"], method, path, scope)
        if isinstance(verdict, Deny):
            await refuse(self._refusals.of(verdict), scope, receive, send)
            return
        scope = _copy(scope, is_posing=True)
        if verdict is None:
            scope["user"], scope["auth"] = UnauthenticatedUser(), AuthCredentials()
        else:
            scope["user"] = verdict.principal
            scope["auth"] = verdict.credentials
        try:
            await self._app(scope, receive, send)
        except Refused as refused:
            await refuse(self._refusals.of(refused.deny), scope, receive, send)

    def _router_of(self, app: ASGIApp) -> ASGIRouter:
        return ASGIRouter(app, _is_ours)


def _is_ours(listed: object) -> bool:
    """Whether one of Starlette's list of middlewares is keylatch's."""
    cls = getattr(listed, "cls", None)
    return isinstance(cls, type) and issubclass(cls, Gate | ProxyGate)


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


def caller_of(scope: Scope) -> tuple[str | None, str | None]:
    """Address and user agent."""
    client = scope.get("client")
    agents = [value for name, value in scope["headers"] if name == b"user-agent"]
    return client and client[0], agents[0].decode("latin-1") if agents else None


def _copy(scope: Scope, is_posing: bool) -> dict[str, Any]:
    """A copy of the scope, without headers that pose as keylatch's."""
    copy = dict(scope)
    # A list of our own in any case: uvicorn on httptools appends trailers to the one it gave away.
    copy["headers"] = [*scope["headers"]]
    if is_posing:
        copy["headers"] = [each for each in copy["headers"] if not is_identity_header(each[0])]
    return copy


def telling(trail: Trail, send: Send) -> Send:
    """Send, with what the trail tells among the headers."""

    async def told(message: Message) -> None:
        if message["type"] in _STARTS:
            message = {**message, "headers": [*message.get("headers", ()), *trail.headers()]}
        await send(message)

    return told


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


async def _with_lifespan(
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
