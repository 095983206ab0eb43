"""Finds the view of a request with the routers of the supported frameworks.

The law of this file: it imports no framework that the app has not imported, runs no view, and
of the app's code runs only what the router runs. On an exception the caller requires FULL: some of
these interfaces are private and may change in a new version.
"""

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias
from wsgiref.types import WSGIEnvironment

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Match, Mount, Router
from starlette.types import Scope

from keylatch.adapters.django_language import override_language
from keylatch.core.decisions import Requirement
from keylatch.core.paths import shape
from keylatch.core.routes import Route
from keylatch.core.rules import required_by

FindInApp: TypeAlias = Callable[[Any, Any, str], Route | None]
"""Finds the route in the app that is mounted at a prefix."""


def _is_instance(app: object, module: str, name: str) -> bool:
    """Whether an object is an instance of a class; False if its module is not imported."""
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and issubclass(type(app), cls)


# Starlette and FastAPI


def find_starlette_route(
    app: Starlette | Router, scope: Scope, prefix: str, find_in_app: FindInApp
) -> Route | None:
    """The route of a Starlette or FastAPI app; None: none, or a redirect."""
    router: Any = app.router if isinstance(app, Starlette) else app
    scope = {**scope, "fastapi": dict(scope.get("fastapi", ()))}  # FastAPI writes to it
    found = _first_match(router.routes, scope)
    if found is None:
        return _find_without_route(router, scope, prefix, find_in_app)
    route, child = _unwrap_included(*found, scope)
    scope = {**scope, **child}
    if isinstance(route, Mount):
        return find_in_app(route.app, scope, prefix + route.path)
    if isinstance(route, Host):
        return find_in_app(route.app, scope, prefix)
    path = prefix + getattr(route, "path", "")
    view = getattr(route, "endpoint", None) or route
    requirement = required_by_dependencies(getattr(route, "dependant", None))
    return Route(view, scope.get("path_params", {}), frozenset((shape(path),)), requirement)


def _first_match(routes: Sequence[BaseRoute], scope: Scope) -> tuple[Any, Scope] | None:
    """The first route that matches; otherwise the first with another method (405)."""
    partial = None
    for route in routes:
        match, child = route.matches(scope)
        if match is Match.FULL:
            return route, child
        if match is Match.PARTIAL and partial is None:
            partial = route, child
    return partial


def _unwrap_included(route: Any, child: Scope, scope: Scope) -> tuple[Any, Scope]:
    """The route inside FastAPI's nested included routers."""
    while hasattr(route, "effective_candidates"):
        _, child, route, context = route._match(scope)
        if context is not None:
            return context.starlette_route or context, child
    return route, child


def _find_without_route(
    router: Any, scope: Scope, prefix: str, find_in_app: FindInApp
) -> Route | None:
    """Without a matching route: FastAPI's static front ends, or the router's default app."""
    if hasattr(router, "_match_low_priority"):
        match, _, route, _ = router._match_low_priority(scope)
        if match is not Match.NONE:
            return Route(route, {}, is_view=False)
    if getattr(router.default, "__self__", None) is router:
        return None
    return find_in_app(router.default, scope, prefix)


def required_by_dependencies(dependant: Any) -> Requirement | None:
    """What all `keylatch.fastapi.APIKey` dependencies together require; None: there is none."""
    api_keys = list(_api_keys(dependant))
    if not api_keys:
        return None
    scopes = {scope for _, scopes in api_keys for scope in scopes}
    any_of = [requirement for requirement, _ in api_keys]
    return Requirement.intersection([Requirement.all_of(sorted(scopes)), *any_of])


def _api_keys(dependant: Any) -> Iterator[tuple[Requirement, Sequence[str]]]:
    """Each such dependency: what it requires itself, and its scopes, also those of its parents."""
    for each in getattr(dependant, "dependencies", ()):
        yield from _api_keys(each)
    requirement = getattr(getattr(dependant, "call", None), "keylatch_requirement", None)
    if isinstance(requirement, Requirement):
        own = (*(dependant.parent_oauth_scopes or ()), *(dependant.own_oauth_scopes or ()))
        yield requirement, own


# Litestar


def find_litestar_route(app: Any, scope: Scope, prefix: str) -> Route | None:
    """As Litestar's `ASGIRouter.__call__` finds it."""
    from litestar.exceptions import HTTPException
    from litestar.utils import normalize_path

    path, root = scope["path"], scope.get("root_path", "")
    path = normalize_path(path.split(root, maxsplit=1)[-1] if root else path)
    try:
        found = app.asgi_router.handle_routing(path=path, method=scope.get("method"))
    except HTTPException:
        return None
    _, handler, _, arguments, template = found
    return _route_from_handler(handler, arguments, prefix + template)


def litestar_selected_route(scope: Scope) -> Route | None:
    """The route that Litestar has already chosen, inside its own middleware; None inside an app
    that is mounted on it."""
    if "litestar_app" not in scope or "route_handler" not in scope:
        return None
    template = str(scope.get("path_template", ""))
    route = _route_from_handler(scope["route_handler"], scope.get("path_params", {}), template)
    return route if route.is_view else None


def _route_from_handler(handler: Any, arguments: Any, template: str) -> Route:
    is_app = getattr(handler, "is_mount", False) or getattr(handler, "is_static", False)
    view = getattr(handler, "fn", handler)  # Litestar copies a handler for each path
    return Route(view, arguments, frozenset((shape(template),)), is_view=not is_app)


# Flask and Quart


def find_flask_route(app: Any, environ: WSGIEnvironment, prefix: str) -> Route | None:
    """With the URL adapter that Flask creates for a request."""
    request = app.request_class({**environ})
    return _match_werkzeug(app, app.create_url_adapter(request), request.method, prefix)


def find_quart_route(app: Any, scope: Scope, prefix: str) -> Route | None:
    """With the request that Quart creates from a scope."""
    if scope["type"] == "websocket":
        request = app.asgi_websocket_class(app, scope)._create_websocket_from_scope(None)
    else:
        request = app.asgi_http_class(app, scope)._create_request_from_scope(None)
    return _match_werkzeug(app, app.create_url_adapter(request), scope.get("method", "GET"), prefix)


def _match_werkzeug(app: Any, adapter: Any, method: str, prefix: str) -> Route | None:
    from werkzeug.exceptions import HTTPException
    from werkzeug.routing import RoutingException

    try:
        rule, arguments = adapter.match(return_rule=True)
    except (HTTPException, RoutingException):  # not found, another method, a redirect
        return None
    view = app.view_functions[rule.endpoint]
    return Route(
        view, arguments, frozenset((shape(prefix + rule.rule),)), required_by(view, method)
    )


# Django


def find_django_route(path: str, method: str, urlconf: Any, prefix: str = "") -> Route | None:
    """As Django's handler resolves `request.path_info`; also for REST framework and Ninja."""
    from django.urls import Resolver404, resolve

    try:
        match = resolve(path, urlconf)
    except Resolver404:
        return None
    return route_from_django_match(match, method, prefix)


def route_from_django_match(match: Any, method: str, prefix: str = "") -> Route:
    """The route of a `request.resolver_match`."""
    arguments = {**match.kwargs, **{str(at): value for at, value in enumerate(match.args)}}
    shapes = frozenset(shape(prefix + each) for each in django_path_templates(match.route))
    return Route(match.func, arguments, shapes, required_by(match.func, method))


_CONVERTER: Final = re.compile(r"(?<!\?P)<(?:(\w+):)?(\w+)>")
_DIGITS: Final = re.compile(r"\(\?P<(\w+)>(?:\\d|\[0-9\])\+\)")
_GROUP: Final = re.compile(r"%\((\w+)\)s")
_FIRST_PLACEHOLDER: Final = 0xE000  # private use area: no path has these characters


def django_path_templates(route: str) -> Iterator[str]:
    """A route of `path` and `re_path` in every spelling that a rule can have; none for an
    expression that Django cannot reverse."""
    parameters: list[str] = []

    def to_placeholder(match: re.Match[str]) -> str:
        kind = match[1] if match[1] in ("int", "uuid", "path") else "str"
        parameters.append(f"{{{match[2]}:{kind}}}".replace(":str", ""))
        return chr(_FIRST_PLACEHOLDER + len(parameters) - 1)

    template = _CONVERTER.sub(to_placeholder, _DIGITS.sub(r"<int:\1>", route))
    table = {_FIRST_PLACEHOLDER + at: parameter for at, parameter in enumerate(parameters)}
    for text in (
        _expand_regex(template) if any(sign in template for sign in "(^$\\[") else (template,)
    ):
        yield "/" + text.translate(table)


def _expand_regex(expression: str) -> list[str]:
    """The paths that an expression matches, with its named groups as parameters."""
    from django.utils.regex_helper import normalize

    try:
        return [_GROUP.sub(r"{\1}", text) for text, _ in normalize(expression)]
    except ValueError:
        return []


def find_django_handler_route(app: Any, request: Any, prefix: str) -> Route | None:
    """For a scope or environ, if the middleware wraps Django's whole application."""
    is_scope = "type" in request
    wrapped = app.request_class(*(({**request}, io.BytesIO()) if is_scope else ({**request},)))
    with override_language(wrapped, wrapped.path_info):
        return find_django_route(wrapped.path_info, wrapped.method, None, prefix)


# Dispatch by the app's class


def is_framework(app: object) -> bool:
    """Whether a function above supports the app."""
    is_starlette = issubclass(type(app), Starlette | Router)
    return is_starlette or any(_is_instance(app, *each) for each in _FRAMEWORKS)


LITESTAR: Final = ("litestar.app", "Litestar")
QUART: Final = ("quart.app", "Quart")
FLASK: Final = ("flask.app", "Flask")
DJANGO: Final = ("django.core.handlers.base", "BaseHandler")
DISPATCHER: Final = ("werkzeug.middleware.dispatcher", "DispatcherMiddleware")
_FRAMEWORKS: Final = (LITESTAR, QUART, FLASK, DJANGO, DISPATCHER)


def find_asgi_route(app: Any, scope: Scope, prefix: str, find_in_app: FindInApp) -> Route | None:
    """The route that a framework's app chooses for a scope."""
    if isinstance(app, Starlette | Router):
        return find_starlette_route(app, scope, prefix, find_in_app)
    if _is_instance(app, *LITESTAR):
        return find_litestar_route(app, scope, prefix)
    if _is_instance(app, *QUART):
        return find_quart_route(app, scope, prefix)
    if _is_instance(app, *DJANGO):
        return find_django_handler_route(app, scope, prefix)
    return Route(app, {}, is_view=False)


def find_wsgi_route(
    app: Any, environ: WSGIEnvironment, prefix: str, find_in_app: FindInApp
) -> Route | None:
    """The route that a framework's app chooses for an environ."""
    if _is_instance(app, *FLASK):
        return find_flask_route(app, environ, prefix)
    if _is_instance(app, *DJANGO):
        return find_django_handler_route(app, environ, prefix)
    if _is_instance(app, *DISPATCHER):
        return _find_dispatched(app, environ, prefix, find_in_app)
    return Route(app, {}, is_view=False)


def _find_dispatched(
    app: Any, environ: WSGIEnvironment, prefix: str, find_in_app: FindInApp
) -> Route | None:
    """Werkzeug's dispatcher chooses the app with the longest prefix."""
    path = environ.get("PATH_INFO", "")
    prefixes = [path[:at] for at in range(len(path), -1, -1) if path[at : at + 1] in ("/", "")]
    mount_path = next((each for each in prefixes if each in app.mounts), "")
    script = environ.get("SCRIPT_NAME", "") + mount_path
    rest = {**environ, "SCRIPT_NAME": script, "PATH_INFO": path[len(mount_path) :]}
    return find_in_app(app.mounts.get(mount_path, app.app), rest, prefix + mount_path)
