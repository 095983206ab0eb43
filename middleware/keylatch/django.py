"""Django: one line in MIDDLEWARE, one setting, and `request.api_key` says who calls.

    MIDDLEWARE = ["keylatch.django.APIKeyMiddleware", ...]
    KEYLATCH = {"store": "sqlite:///keys.db", "public": ["/healthz"]}

    @requires("SENDING")
    def send_email(request): ...

Under ASGI the event loop never waits: what this process does not know is asked through the portal,
because Django may run several loops. Take `get_asgi_application` from here: Django's own knows no
lifespan events, so under uvicorn nobody would store the last uses when the server stops.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar, cast

try:
    from asgiref.sync import iscoroutinefunction, markcoroutinefunction
    from django.conf import settings
    from django.core import asgi
    from django.http import HttpRequest, HttpResponse
    from django.urls import get_resolver
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("asgiref", "django"):
        raise
    raise ImportError("keylatch.django needs the package Django: pip install Django") from error

from starlette.authentication import UnauthenticatedUser
from starlette.types import Receive, Scope, Send

from keylatch.demands import refusal_of, wanted_of
from keylatch.errors import ConfigurationError
from keylatch.frameworks import Route, of_django, of_django_match, templates_of_django
from keylatch.gate import Gate
from keylatch.languages import in_language_of, language_of
from keylatch.model import FULL, Deny, Principal, Unsettled, Verdict, Wanted, missing_scope
from keylatch.portal import Portal, close_all
from keylatch.refusals import Refusal
from keylatch.routing import has_encoded_slash, is_plain_environ
from keylatch.rules import declare, declared
from keylatch.telemetry.trail import Trail, timed, timed_awaiting
from keylatch.wsgi import PRINCIPAL, REFUSALS, authorization, caller_of, strip_identity, trail_of

View = TypeVar("View", bound=Callable[..., Any])

_NAMES: Final = tuple(name for name in inspect.signature(Gate).parameters if name != "app")


class APIKeyMiddleware(Gate[Callable[[HttpRequest], Any]]):
    """Lets a request pass if it carries a good key, as `request.api_key`.

    The setting KEYLATCH is a dict of the arguments of `keylatch.gate.Gate`. A key without FULL may
    call what `permissions` names for it, and the views that say `requires`. Name this middleware
    first: what stands before it sees requests that nobody has checked. Only one that chooses
    `request.urlconf` belongs before it, because the view is looked up there. What one after it
    changes (the path, the method, the language, the URLconf) can close a view and open none: the
    request is judged again by the view that Django has chosen.

    Raises:
        ConfigurationError: naming every wrong setting and rule, and every view that declares
            nothing and that a public path with parameters opens without spelling its route.
    """

    sync_capable = async_capable = True
    _views_decide = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        given = dict(getattr(settings, "KEYLATCH", {}))
        unknown = [name for name in given if name not in _NAMES]
        mistakes = [(f"KEYLATCH[{name!r}]", f"is none of {', '.join(_NAMES)}") for name in unknown]
        for name in unknown:
            del given[name]
        try:
            super().__init__(get_response, **given)
        except ConfigurationError as error:
            mistakes += error.mistakes
        else:
            methods = sorted({rule.method for rule in self._policy.public_patterns})
            if methods:  # else the URLconf is not imported before the first request
                mistakes += self._policy.opened_unsaid(_undeclared(methods))
        if mistakes:
            raise ConfigurationError(mistakes)
        self._awaits = iscoroutinefunction(get_response)
        self.process_view = self._chosen_async if self._awaits else self._chosen
        if self._awaits:
            markcoroutinefunction(self)

    def _router_of(self, app: Any) -> "URLconf":
        return URLconf()

    def _prepare(self) -> None:
        portal = self._portal = Portal.of(self.engine)
        self._check, self._check_from_loop = portal.check, portal.check_from_loop
        if self._is_followed:
            self._check = lambda *asked: timed(lambda: portal.check(*asked))
            self._check_from_loop = lambda *asked: timed_awaiting(portal.check_from_loop(*asked))

    def __call__(self, request: HttpRequest) -> Any:
        if self._awaits:
            return self._trailing_async(request) if self._is_followed else self._async(request)
        return self._trailing(request) if self._is_followed else self._sync(request)

    def _sync(self, request: HttpRequest) -> Any:
        refusal = None
        wanted = self._asked(request)
        if wanted is not None:
            verdict = self._check(authorization(request.META), wanted)
            refusal = self._refusal(request, verdict)
        return refusal or self._app(request)

    async def _async(self, request: HttpRequest) -> Any:
        refusal = None
        wanted = self._asked(request)
        if wanted is not None:
            verdict = await self._check_from_loop(authorization(request.META), wanted)
            refusal = self._refusal(request, verdict)
        return refusal or await self._app(request)

    def _chosen(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        """Judge again, now that Django has resolved the path."""
        user = request.META[PRINCIPAL]
        permission = user.permission if isinstance(user, Principal) else ""
        if permission == FULL:
            return None
        asked = (request.method, request.path_info, request, _CHOSEN)
        wanted = self._policy.asked(*asked)
        if wanted is not None and permission and missing_scope(permission, wanted):
            wanted = self._policy.settled(*asked)
        refusal = None if wanted is None else refusal_of(request.META, wanted)
        return None if refusal is None else refuse(refusal, request)

    async def _chosen_async(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        return self._chosen(request)  # Django would run the other one in a thread

    def _trailing(self, request: HttpRequest) -> Any:
        with trail_of(request.META) as trail:
            return self._telling(trail, self._sync(request))

    async def _trailing_async(self, request: HttpRequest) -> Any:
        with trail_of(request.META) as trail:
            return self._telling(trail, await self._async(request))

    def _telling(self, trail: Trail, answer: Any) -> Any:
        if self.engine.settings.timing == "on":
            for name, value in trail.headers():
                _append(answer, name.decode(), value.decode())
        return answer

    def close(self) -> None:
        """Store what was used and let go of everything, until the next request comes."""
        self._portal.close()

    def _asked(self, request: HttpRequest) -> Wanted | None:
        """What the rules ask of the key, so far; None where none is needed."""
        strip_identity(request.META)
        request.__dict__.pop("headers", None)  # made of META once, if somebody has looked already
        request.META[REFUSALS] = self._refusals
        request.META[PRINCIPAL] = request.api_key = UnauthenticatedUser()
        wanted = self._policy.asked(request.method, request.path_info, request, self._router)
        return None if wanted is None else _so_far(wanted)

    def _refusal(self, request: HttpRequest, verdict: Verdict) -> HttpResponse | None:
        if isinstance(verdict, Unsettled):
            # Only for a good key that the rules do not let in, and only where the request is
            # handled: the URLconf may be imported here, and a path converter may ask a database.
            method, path = request.method, request.path_info
            wanted = self._policy.settled(method, path, request, self._router)
            verdict = timed(functools.partial(verdict.settle, wanted))
        if isinstance(verdict, Deny):
            caller = functools.partial(caller_of, request.META)
            return refuse(self._refusals.refuse(verdict, caller), request)
        request.META[PRINCIPAL] = request.api_key = verdict.principal
        if self.engine.sees_clients:
            caller = functools.partial(caller_of, request.META)
            self.engine.see(verdict.principal.key_id, caller)
        return None


class URLconf:
    """Which view a request gets to, by the URLconf that is in force for it."""

    def is_plain(self, request: HttpRequest) -> bool:
        raw = getattr(request, "scope", {}).get("raw_path")
        return not has_encoded_slash(raw) and is_plain_environ(request.META)

    def find(self, request: HttpRequest) -> Route | None:
        return self.find_at(request, request.path_info)

    def find_at(self, request: HttpRequest, path: str) -> Route | None:
        with in_language_of(request, path):
            return of_django(path, str(request.method), getattr(request, "urlconf", None))

    def place(self, request: HttpRequest) -> object:
        return getattr(request, "urlconf", None), language_of(request), request.method


class Chosen(URLconf):
    """The same, once Django has resolved the request itself."""

    def find(self, request: HttpRequest) -> Route | None:
        return of_django_match(request.resolver_match, str(request.method))


_CHOSEN: Final = Chosen()


def _undeclared(methods: Sequence[str]) -> Iterator[str]:
    """The routes of the project whose views declare nothing, spelled as rules are."""
    for route, view in _views(get_resolver().url_patterns):
        for method in methods:
            if declared(view, method) is None:
                yield from (f"{method} {each}" for each in templates_of_django(route))


def _views(patterns: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Each route and its view, with included URLconfs."""
    for each in patterns:
        route = prefix + str(each.pattern).removeprefix("^" if prefix else "")
        if hasattr(each, "url_patterns"):
            yield from _views(each.url_patterns, route)
        else:
            yield route, each.callback


@functools.cache  # of the few that a policy knows
def _so_far(wanted: Wanted) -> Wanted:
    """The same, where the view may let in more."""
    return replace(wanted, is_final=False)


def _append(answer: Any, name: str, value: str) -> None:
    """Add a header whose value is a list. Django keeps one field of a name, so what the app said
    and this share it (RFC 9110 section 5.3)."""
    answer[name] = f"{answer[name]}, {value}" if name in answer else value


def get_asgi_application() -> Callable[..., Awaitable[None]]:
    """Django's own, and the lifespan events by which a server says that it stops."""
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
    """Let a view be called by keys with any one of these permissions, and by FULL.

    For functions and, with `method_decorator`, for the methods of classes; sync or async. The
    middleware reads it; the view itself refuses with the very same answer.

    Raises:
        ConfigurationError: naming every word that is no permission.
    """
    wanted = wanted_of(permissions)

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            refusal = refusal_of(request.META, wanted)
            return view(request, *args, **kwargs) if refusal is None else refuse(refusal, request)

        @functools.wraps(view)
        async def guarded_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            answer = guarded(request, *args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

        guard = guarded_async if iscoroutinefunction(view) else guarded
        declare(guard, wanted)
        return cast(View, guard)

    return decorate


def refuse(refusal: Refusal, request: HttpRequest) -> HttpResponse:
    """A refusal as Django's response, with nothing added."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in refusal.headers}
    body = b"" if request.method == "HEAD" else refusal.body
    return HttpResponse(body, status=refusal.status, headers=headers)
