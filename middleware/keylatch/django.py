"""Django: a middleware, a setting, and `request.api_key` as the principal of the request.

    MIDDLEWARE = ["keylatch.django.APIKeyMiddleware", ...]
    KEYLATCH = {"store": "sqlite:///keys.db", "public": ["/healthz"]}

    @requires("SENDING")
    def send_email(request): ...

Under ASGI a cache miss goes through the portal and never blocks an event loop: Django may run
several loops. Use `get_asgi_application` from this module: Django's own does not support lifespan
events, so under uvicorn the last usage counts would be lost when the server stops.
"""

import asyncio
import functools
import inspect
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

try:
    from asgiref.sync import iscoroutinefunction, markcoroutinefunction
    from django.conf import settings
    from django.core import asgi
    from django.http import HttpRequest, HttpResponse
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("asgiref", "django"):
        raise
    raise ImportError("keylatch.django needs the package Django: pip install Django") from error

from starlette.authentication import UnauthenticatedUser
from starlette.types import Receive, Scope, Send

from keylatch.adapters.django_urlconf import ResolvedURLconf, URLconf, undeclared_routes
from keylatch.adapters.environ import PRINCIPAL, REFUSALS, client_info_of
from keylatch.adapters.middleware import BaseMiddleware
from keylatch.adapters.portal import Portal, close_all
from keylatch.adapters.view_permissions import all_of, any_of, refusal_of
from keylatch.core.decisions import (
    FULL,
    Decision,
    DeferredDeny,
    Deny,
    Principal,
    Requirement,
    missing_scope,
)
from keylatch.core.refusals import Refusal
from keylatch.core.rules import declare
from keylatch.errors import ConfigurationError
from keylatch.telemetry.request_trace import RequestTrace, time_awaited_check, time_check
from keylatch.wsgi import (
    authorization,
    request_trace_of,
    strip_identity_headers,
)

if TYPE_CHECKING:
    from keylatch.adapters.sync_keyring import SyncKeyring
    from keylatch.engine import Engine

View = TypeVar("View", bound=Callable[..., Any])

_RESOLVED_URLCONF: Final = ResolvedURLconf()
_SETTING_NAMES: Final = tuple(
    name for name in inspect.signature(BaseMiddleware).parameters if name != "app"
)


class APIKeyMiddleware(BaseMiddleware[Callable[[HttpRequest], Any]]):
    """Passes a request to the view if it carries a valid key: `request.api_key` is its principal.

    KEYLATCH has the arguments of `keylatch.adapters.middleware.BaseMiddleware`. A key without FULL
    can call the routes that `permissions` names for it, and views with `requires`.

    Name this middleware first: a middleware before it sees requests that are not yet checked. Only
    a middleware that sets `request.urlconf` belongs before it, because the view is looked up there.
    If a later middleware changes the path, the method, the language or the URLconf, that can close
    a view but never open one: the request is decided again for the view that Django has chosen.

    Raises:
        ConfigurationError: names every wrong setting and rule, and every view that declares
            nothing and that a public path with parameters opens without spelling its route.
    """

    sync_capable = async_capable = True
    _views_decide = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        given = dict(getattr(settings, "KEYLATCH", {}))
        unknown = [name for name in given if name not in _SETTING_NAMES]
        mistakes = [
            (f"KEYLATCH[{name!r}]", f"is none of {', '.join(_SETTING_NAMES)}") for name in unknown
        ]
        for name in unknown:
            del given[name]
        try:
            super().__init__(get_response, **given)
        except ConfigurationError as error:
            mistakes += error.mistakes
        else:
            methods = sorted({rule.method for rule in self._policy.public_patterns})
            if methods:  # otherwise the first request imports the URLconf, not the start
                mistakes += self._policy.find_exposed(undeclared_routes(methods))
        if mistakes:
            raise ConfigurationError(mistakes)
        self._is_async = iscoroutinefunction(get_response)
        self.process_view = self._check_view_async if self._is_async else self._check_view
        if self._is_async:
            markcoroutinefunction(self)

    def _make_router(self, app: Any) -> "URLconf":
        return URLconf()

    def _on_engine_bound(self) -> None:
        global _engine
        _engine = weakref.ref(self.engine)
        portal = self._portal = Portal.for_engine(self.engine)
        self._authenticate, self._authenticate_from_loop = (
            portal.authenticate,
            portal.authenticate_from_loop,
        )
        if self._traces_requests:
            self._authenticate = lambda *args: time_check(lambda: portal.authenticate(*args))
            self._authenticate_from_loop = lambda *args: time_awaited_check(
                portal.authenticate_from_loop(*args)
            )

    def __call__(self, request: HttpRequest) -> Any:
        if self._is_async:
            return (
                self._call_async_traced(request)
                if self._traces_requests
                else self._call_async(request)
            )
        return (
            self._call_sync_traced(request) if self._traces_requests else self._call_sync(request)
        )

    def _call_sync(self, request: HttpRequest) -> Any:
        refusal = None
        requirement = self._requirement_for(request)
        if requirement is not None:
            decision = self._authenticate(authorization(request.META), requirement)
            refusal = self._admit_or_refuse(request, decision)
        return refusal or self._app(request)

    async def _call_async(self, request: HttpRequest) -> Any:
        refusal = None
        requirement = self._requirement_for(request)
        if requirement is not None:
            decision = await self._authenticate_from_loop(authorization(request.META), requirement)
            refusal = self._admit_or_refuse(request, decision)
        return refusal or await self._app(request)

    def _check_view(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        """Decide again, now that Django has resolved the path."""
        user = request.META[PRINCIPAL]
        permission = user.permission if isinstance(user, Principal) else ""
        if permission == FULL:
            return None
        request_args = (request.method, request.path_info, request, _RESOLVED_URLCONF)
        requirement = self._policy.requirement_for(*request_args)
        if requirement is not None and permission and missing_scope(permission, requirement):
            requirement = self._policy.routed_requirement(*request_args)
        refusal = None if requirement is None else refusal_of(request.META, requirement)
        return None if refusal is None else refuse(refusal, request)

    async def _check_view_async(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        return self._check_view(request)  # Django would run the sync method in a thread

    def _call_sync_traced(self, request: HttpRequest) -> Any:
        with request_trace_of(request.META) as trace:
            return self._with_headers(trace, self._call_sync(request))

    async def _call_async_traced(self, request: HttpRequest) -> Any:
        with request_trace_of(request.META) as trace:
            return self._with_headers(trace, await self._call_async(request))

    def _with_headers(self, trace: RequestTrace, response: Any) -> Any:
        if self.engine.settings.timing:
            for name, value in trace.headers():
                _append_header(response, name.decode(), value.decode())
        return response

    def close(self) -> None:
        """Store the usage counts and stop the engine; the next request starts it again."""
        self._portal.close()

    def _requirement_for(self, request: HttpRequest) -> Requirement | None:
        """The requirement by the rules, not final; None: no key is needed."""
        strip_identity_headers(request.META)
        request.__dict__.pop("headers", None)  # Django caches it; it may predate the line above
        request.META[REFUSALS] = self._refusals
        request.META[PRINCIPAL] = request.api_key = UnauthenticatedUser()
        requirement = self._policy.requirement_for(
            request.method, request.path_info, request, self._router
        )
        return None if requirement is None else _not_final(requirement)

    def _admit_or_refuse(self, request: HttpRequest, decision: Decision) -> HttpResponse | None:
        if isinstance(decision, DeferredDeny):
            # Only for a valid key that the rules do not allow, and in the thread that handles the
            # request: this may import the URLconf, and a path converter may query a database.
            method, path = request.method, request.path_info
            requirement = self._policy.routed_requirement(method, path, request, self._router)
            decision = time_check(functools.partial(decision.decide, requirement))
        if isinstance(decision, Deny):
            caller = functools.partial(client_info_of, request.META)
            return refuse(self._refusals.refuse(decision, caller), request)
        request.META[PRINCIPAL] = request.api_key = decision.principal
        if self.engine.records_clients:
            caller = functools.partial(client_info_of, request.META)
            self.engine.record_client(decision.principal.key_id, caller)
        return None


_engine: "Callable[[], Engine | None]" = lambda: None  # noqa: E731 - of the newest middleware


def keyring() -> "SyncKeyring":
    """Creates, changes and revokes keys, in views, tasks and management commands.

    It uses the engine of the middleware; a process without one, such as a management command,
    builds one from the setting KEYLATCH.
    """
    from keylatch.adapters.sync_keyring import SyncKeyring

    engine = getattr(settings, "KEYLATCH", {}).get("engine") or _engine()
    return SyncKeyring(engine=engine or APIKeyMiddleware(_no_view).engine)


def _no_view(request: HttpRequest) -> Any:
    raise NotImplementedError


@functools.cache  # a policy has few requirements
def _not_final(requirement: Requirement) -> Requirement:
    """The requirement, not final: the view may accept more permissions."""
    return replace(requirement, is_final=False)


def _append_header(response: Any, name: str, value: str) -> None:
    """Add a header whose value is a list. Django keeps one field per name, so the app's value and
    this one share it (RFC 9110 section 5.3)."""
    response[name] = f"{response[name]}, {value}" if name in response else value


def get_asgi_application() -> Callable[..., Awaitable[None]]:
    """Django's application, with support for lifespan events: at shutdown the engines stop."""
    app = asgi.get_asgi_application()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            if event == "shutdown":
                await asyncio.to_thread(close_all)
            await send({"type": f"lifespan.{event}.complete"})

    return application


def requires(*permissions: str) -> Callable[[View], View]:
    """A decorator for a view that requires all of these permissions; FULL includes every one.

    For functions and, with `method_decorator`, for methods of classes; sync or async. The
    middleware reads the declaration; the view checks again and refuses with the same response.

    Raises:
        ConfigurationError: names every malformed permission.
    """
    return _guard(all_of(permissions))


def requires_any(*permissions: str) -> Callable[[View], View]:
    """As `requires`, for a view that requires any one of these permissions.

    Raises:
        ConfigurationError: names every malformed permission.
    """
    return _guard(any_of(permissions))


def _guard(requirement: Requirement) -> Callable[[View], View]:
    def decorate(view: View) -> View:
        @functools.wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            refusal = refusal_of(request.META, requirement)
            return view(request, *args, **kwargs) if refusal is None else refuse(refusal, request)

        @functools.wraps(view)
        async def guarded_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            answer = guarded(request, *args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

        guard = guarded_async if iscoroutinefunction(view) else guarded
        declare(guard, requirement)
        return cast(View, guard)

    return decorate


def refuse(refusal: Refusal, request: HttpRequest) -> HttpResponse:
    """A refusal as Django's response, without further headers."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in refusal.headers}
    body = b"" if request.method == "HEAD" else refusal.body
    return HttpResponse(body, status=refusal.status, headers=headers)
