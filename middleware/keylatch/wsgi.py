"""The WSGI middleware: the same name, arguments, responses and engine as the ASGI middleware.

    app.wsgi_app = APIKeyMiddleware(app.wsgi_app, store="sqlite:///keys.db", public=["/healthz"])

A hit is decided in the calling thread; for a miss the thread waits for the portal's event loop.
"""

import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from starlette.authentication import UnauthenticatedUser

from keylatch.adapters.environ import PRINCIPAL, REFUSALS, client_info_of
from keylatch.adapters.middleware import BaseMiddleware
from keylatch.adapters.portal import Portal
from keylatch.adapters.proxy_identity import Peer, ProxyIdentity
from keylatch.adapters.routing import WSGIRouter
from keylatch.authentication.authenticator import CacheMiss
from keylatch.core.decisions import Decision, DeferredDeny, Deny, Requirement
from keylatch.core.refusals import Refusal
from keylatch.telemetry.request_trace import RequestTrace, time_check, tracing_request

if TYPE_CHECKING:
    from keylatch.adapters.sync_keyring import SyncKeyring

_TRACED: Final = "keylatch.traced"
_IDENTITY: Final = "HTTP_X_KEYLATCH_"
_STATUS: Final = {int(status): f"{int(status)} {status.phrase}" for status in HTTPStatus}


class APIKeyMiddleware(BaseMiddleware[WSGIApplication]):
    """Passes a request to the app if it carries a valid key: `environ["keylatch.principal"]`.

    The arguments are those of `keylatch.adapters.middleware.BaseMiddleware`, as for ASGI.
    """

    def _on_engine_bound(self) -> None:
        self._portal = Portal.for_engine(self.engine)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if self._traces_requests and _TRACED not in environ:
            return self._call_traced(environ, start_response)
        strip_identity_headers(environ)
        environ[REFUSALS] = self._refusals
        method, path = environ["REQUEST_METHOD"], path_of(environ)
        requirement = self._policy.requirement_for(method, path, environ, self._router)
        if requirement is None:
            environ[PRINCIPAL] = UnauthenticatedUser()
            return self._app(environ, start_response)
        decision = self._authenticator.check_cached(authorization(environ), requirement)
        if isinstance(decision, CacheMiss):
            decision = self._check_miss(decision, requirement)
        if isinstance(decision, DeferredDeny):
            requirement = self._policy.routed_requirement(method, path, environ, self._router)
            decision = time_check(partial(decision.decide, requirement))
        if isinstance(decision, Deny):
            refusal = self._refusals.refuse(decision, partial(client_info_of, environ))
            return refuse(refusal, environ, start_response)
        environ[PRINCIPAL] = decision.principal
        if self.engine.records_clients:
            self.engine.record_client(decision.principal.key_id, partial(client_info_of, environ))
        return self._app(environ, start_response)

    def _make_router(self, app: WSGIApplication) -> WSGIRouter:
        return WSGIRouter(app)

    def _check_miss(self, miss: CacheMiss, requirement: Requirement) -> Decision:
        return time_check(lambda: self._portal.check(miss, requirement))

    def _call_traced(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        environ[_TRACED] = True
        with request_trace_of(environ) as trace:
            if self.engine.settings.timing:
                start_response = _with_headers(trace, start_response)
            return self(environ, start_response)

    @property
    def keyring(self) -> "SyncKeyring":
        """Creates, changes and revokes keys, in views and scripts."""
        from keylatch.adapters.sync_keyring import SyncKeyring

        return SyncKeyring(engine=self.engine)

    def close(self) -> None:
        """Store the usage counts and stop the engine; the next request starts it again."""
        self._portal.close()


class ProxyIdentityMiddleware(ProxyIdentity[WSGIApplication]):
    """For an app behind a proxy that asks the sidecar: the principal, from the proxy's headers.

    The arguments are those of `keylatch.adapters.proxy_identity.ProxyIdentity`. Servers map
    similar header names to one name and join their values with commas. No identity contains a
    comma, so such requests are refused.
    """

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        headers = [
            (name[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in environ.items()
            if name.startswith(_IDENTITY)
        ]
        method, path = environ["REQUEST_METHOD"], path_of(environ)
        decision = self.evaluate(peer_of(environ), headers, method, path, environ)
        strip_identity_headers(environ)
        environ[REFUSALS] = self._refusals
        if isinstance(decision, Deny):
            return refuse(self._refusals.refusal_for(decision), environ, start_response)
        environ[PRINCIPAL] = UnauthenticatedUser() if decision is None else decision.principal
        return self._app(environ, start_response)

    def _make_router(self, app: WSGIApplication) -> WSGIRouter:
        return WSGIRouter(app)


def strip_identity_headers(environ: WSGIEnvironment) -> None:
    """Remove identity headers of the client; servers have already mapped their names (RFC 3875
    section 4.1.18)."""
    if _IDENTITY in "\0".join(environ):  # one search instead of a loop: they are rare
        for name in [name for name in environ if name.startswith(_IDENTITY)]:
            del environ[name]


def authorization(environ: WSGIEnvironment) -> tuple[bytes, ...]:
    """The value of `Authorization`; servers join several with commas."""
    value = environ.get("HTTP_AUTHORIZATION")
    return () if value is None else (value.encode("latin-1", "replace"),)


def peer_of(environ: WSGIEnvironment) -> str | Peer:
    """The peer's address; without one, a Unix socket if the server reports one."""
    address: str = environ.get("REMOTE_ADDR") or ""
    if _is_unix_socket(environ, address):
        return Peer.UNIX_SOCKET
    return address or Peer.UNKNOWN


def _is_unix_socket(environ: WSGIEnvironment, address: str) -> bool:
    # PEP 3333 does not define this, so each server does it differently. gunicorn takes SERVER_NAME
    # and SERVER_PORT from the client's `Host`.
    if "gunicorn.socket" in environ:
        return not address and environ["gunicorn.socket"].family == socket.AF_UNIX
    name, port = str(environ.get("SERVER_NAME", "")), str(environ.get("SERVER_PORT", ""))
    if environ.get("SERVER_SOFTWARE") == "Granian":
        return not address and "/" in name and port == "0"
    if "waitress.client_disconnected" in environ:
        return address == "localhost" and "/" in port
    return False


def request_trace_of(environ: WSGIEnvironment) -> AbstractContextManager[RequestTrace]:
    """Traces the request until the end of the block."""
    given = environ.get("HTTP_X_REQUEST_ID", "").encode("latin-1", "replace")
    return tracing_request([(b"x-request-id", given)])


def path_of(environ: WSGIEnvironment) -> str:
    """The path as the app's own router sees it; WSGI carries its UTF-8 bytes as Latin-1."""
    path: str = environ.get("PATH_INFO", "")
    return path if path.isascii() else path.encode("latin-1").decode("utf-8", "replace")


def _with_headers(trace: RequestTrace, start_response: StartResponse) -> StartResponse:
    """A `start_response` that adds the trace's headers."""

    def start_with_headers(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
        more = [(name.decode(), value.decode()) for name, value in trace.headers()]
        return start_response(status, [*headers, *more], *error)

    return start_with_headers


def refuse(
    refusal: Refusal, environ: WSGIEnvironment, start_response: StartResponse
) -> Iterable[bytes]:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in refusal.headers]
    start_response(_STATUS[refusal.status], headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [refusal.body]
