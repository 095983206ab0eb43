"""The WSGI middleware: the same name, arguments and answers as the ASGI one, over the same engine.

    app.wsgi_app = APIKeyMiddleware(app.wsgi_app, store="sqlite:///keys.db", public=["/healthz"])

What this process knows is answered in the calling thread; the rest is asked through the portal.
"""

import socket
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from http import HTTPStatus
from typing import Any, Final
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from starlette.authentication import UnauthenticatedUser

from keylatch.gate import Gate
from keylatch.identity import Peer, ProxyGate
from keylatch.model import ANY_KEY, Deny, Unsettled, Verdict, Wanted
from keylatch.portal import Portal
from keylatch.refusals import Refusal
from keylatch.routing import WSGIRouter
from keylatch.telemetry.trail import Trail, following, timed
from keylatch.tokens import Token

PRINCIPAL: Final = "keylatch.principal"
"""Where in `environ` the principal is: PEP 3333 lets a middleware add keys of its own name."""
REFUSALS: Final = "keylatch.refusals"
"""Where in `environ` a view that asks for more finds the answers to refuse with."""

_FOLLOWED: Final = "keylatch.followed"
_IDENTITY: Final = "HTTP_X_KEYLATCH_"
_STATUS: Final = {int(status): f"{int(status)} {status.phrase}" for status in HTTPStatus}


class APIKeyMiddleware(Gate[WSGIApplication]):
    """Lets a request pass if it carries a good key, as `environ["keylatch.principal"]`.

    The arguments are those of `keylatch.gate.Gate`, as for ASGI.
    """

    def _prepare(self) -> None:
        self._portal = Portal.of(self.engine)
        # Not through the portal: amid real requests each call in between costs.
        self._glance = self._check_timed if self._is_followed else self.engine.glance

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self._is_followed and _FOLLOWED not in environ:
            return self._leave_trail(environ, start_response)
        strip_identity(environ)
        environ[REFUSALS] = self._refusals
        method, path = environ["REQUEST_METHOD"], path_of(environ)
        wanted = self._policy.asked(method, path, environ, self._router)
        if wanted is None:
            environ[PRINCIPAL] = UnauthenticatedUser()
            return self._app(environ, start_response)
        verdict = self._glance(authorization(environ), wanted)
        if isinstance(verdict, Token):
            verdict = self._portal.resolve(verdict, wanted)
        if isinstance(verdict, Unsettled):
            wanted = self._policy.settled(method, path, environ, self._router)
            verdict = timed(partial(verdict.settle, wanted))
        if isinstance(verdict, Deny):
            refusal = self._refusals.refuse(verdict, partial(caller_of, environ))
            return refuse(refusal, environ, start_response)
        environ[PRINCIPAL] = verdict.principal
        if self.engine.sees_clients:
            self.engine.see(verdict.principal.key_id, partial(caller_of, environ))
        return self._app(environ, start_response)

    def _router_of(self, app: WSGIApplication) -> WSGIRouter:
        return WSGIRouter(app)

    def _check_timed(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict:
        return timed(lambda: self._portal.check(values, wanted))

    def _leave_trail(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        environ[_FOLLOWED] = True
        with trail_of(environ) as trail:
            if self.engine.settings.timing == "on":
                start_response = _telling(trail, start_response)
            return self(environ, start_response)

    def close(self) -> None:
        """Store what was used and let go of everything, until the next request comes."""
        self._portal.close()


class ProxyIdentityMiddleware(ProxyGate[WSGIApplication]):
    """For an app behind a proxy that asks the sidecar: the same principal, from its headers.

    The arguments are those of `keylatch.identity.ProxyGate`. Servers fold look-alike spellings
    into one name and join their values with commas, which no identity holds: both are refused.
    """

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        headers = [
            (name[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in environ.items()
            if name.startswith(_IDENTITY)
        ]
        method, path = environ["REQUEST_METHOD"], path_of(environ)
        verdict = self.judge(peer_of(environ), headers, method, path, environ)
        strip_identity(environ)
        environ[REFUSALS] = self._refusals
        if isinstance(verdict, Deny):
            return refuse(self._refusals.of(verdict), environ, start_response)
        environ[PRINCIPAL] = UnauthenticatedUser() if verdict is None else verdict.principal
        return self._app(environ, start_response)

    def _router_of(self, app: WSGIApplication) -> WSGIRouter:
        return WSGIRouter(app)


def strip_identity(environ: WSGIEnvironment) -> None:
    """Drop headers that pose as keylatch's; servers have folded their names already (RFC 3875
    section 4.1.18)."""
    if _IDENTITY in "\0".join(environ):  # one search and no loop: nearly nobody sends them
        for name in [name for name in environ if name.startswith(_IDENTITY)]:
            del environ[name]


def authorization(environ: WSGIEnvironment) -> tuple[bytes, ...]:
    """The value of `Authorization`, if there is one; several came joined by commas."""
    value = environ.get("HTTP_AUTHORIZATION")
    return () if value is None else (value.encode("latin-1", "replace"),)


def peer_of(environ: WSGIEnvironment) -> str | Peer:
    """The address at the other end; without one, a Unix socket if the server says that it is."""
    address: str = environ.get("REMOTE_ADDR") or ""
    if _came_over_unix(environ, address):
        return Peer.UNIX_SOCKET
    return address or Peer.UNKNOWN


def _came_over_unix(environ: WSGIEnvironment, address: str) -> bool:
    # PEP 3333 has no word for it, so each server has its own. gunicorn's SERVER_NAME and
    # SERVER_PORT are what the client says in `Host`.
    if "gunicorn.socket" in environ:
        return not address and environ["gunicorn.socket"].family == socket.AF_UNIX
    name, port = str(environ.get("SERVER_NAME", "")), str(environ.get("SERVER_PORT", ""))
    if environ.get("SERVER_SOFTWARE") == "Granian":
        return not address and "/" in name and port == "0"
    if "waitress.client_disconnected" in environ:
        return address == "localhost" and "/" in port
    return False


def caller_of(environ: WSGIEnvironment) -> tuple[str | None, str | None]:
    """Address and user agent."""
    return environ.get("REMOTE_ADDR"), environ.get("HTTP_USER_AGENT")


def trail_of(environ: WSGIEnvironment) -> AbstractContextManager[Trail]:
    """The trail of the request, until the end of the block."""
    given = environ.get("HTTP_X_REQUEST_ID", "").encode("latin-1", "replace")
    return following([(b"x-request-id", given)])


def path_of(environ: WSGIEnvironment) -> str:
    """The path as the app's own router sees it; WSGI carries its UTF-8 bytes as Latin-1."""
    path: str = environ.get("PATH_INFO", "")
    return path if path.isascii() else path.encode("latin-1").decode("utf-8", "replace")


def _telling(trail: Trail, start_response: StartResponse) -> StartResponse:
    """The callable, with what the trail tells among the headers."""

    def told(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
        more = [(name.decode(), value.decode()) for name, value in trail.headers()]
        return start_response(status, [*headers, *more], *error)

    return told


def refuse(
    refusal: Refusal, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    """Answer with a refusal."""
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in refusal.headers]
    start_response(_STATUS[refusal.status], headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [refusal.body]
