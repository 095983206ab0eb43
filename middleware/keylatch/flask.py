"""Flask: the request's principal, and a decorator for the permission that a view requires.

    @app.post("/v1/emails")
    @requires("SENDING")
    def send_email():
        return {"sent by": api_key.key_name}

    app.wsgi_app = APIKeyMiddleware(app.wsgi_app, permissions=permissions_of(app))  # the last line

The middleware is that of `keylatch.wsgi`; it reads the permissions from the views. A view that
declares none requires FULL.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, cast

try:
    from flask import Flask, current_app, has_request_context, request
    from werkzeug.local import LocalProxy
except ModuleNotFoundError as error:
    if error.name != "flask":
        raise
    raise ImportError("keylatch.flask needs the package flask: pip install flask") from error

from keylatch.adapters.view_permissions import all_of, any_of, principal_of, refusal_of
from keylatch.core.decisions import FULL, ONLY_FULL, Principal, Requirement
from keylatch.core.paths import overlaps, to_starlette_path
from keylatch.core.rules import DeclaredRule, DeclaredRules, declare, required_by
from keylatch.errors import ConfigurationError
from keylatch.wsgi import refuse

View = TypeVar("View", bound=Callable[..., Any])

_METHODS: Final = {"GET", "POST", "PUT", "PATCH", "DELETE"}
_PARAMETER: Final = re.compile(r"<(?:([A-Za-z_]\w*)(?:\(.*?\))?:)?([A-Za-z_]\w*)>")


def _principal() -> Principal:
    if not has_request_context():
        raise RuntimeError("api_key exists only during a request: use it inside a view")
    return cast(Principal, principal_of(request.environ))


api_key = cast(Principal, LocalProxy(_principal))
"""The principal of the current request; on a public path its `is_authenticated` is False."""


def requires(*permissions: str) -> Callable[[View], View]:
    """A decorator for a view that requires all of these permissions; FULL includes every one.

    Put it below the route decorator: then `permissions_of` finds it, and the middleware refuses
    other keys before the view is called. The view checks again and refuses with the same response.

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
        def guarded(*args: Any, **kwargs: Any) -> Any:
            refusal = refusal_of(request.environ, requirement)
            if refusal is None:
                return current_app.ensure_sync(view)(*args, **kwargs)
            answer = functools.partial(refuse, refusal)
            return current_app.response_class.from_app(answer, request.environ, buffered=True)

        declare(guarded, requirement)
        return cast(View, guarded)

    return decorate


def permissions_of(app: Flask) -> DeclaredRules:
    """The routes that each permission can call, as their views declare it: the middleware's
    `permissions=`.

    Call it when all routes are registered; later routes require FULL. The middleware does not
    start if a public path with parameters opens a view that declares nothing, unless the public
    path is spelled exactly as that view's route.

    Raises:
        ConfigurationError: names every route that declares nothing and whose path also matches a
            route that declares a permission: Flask distinguishes the two, rules do not.
    """
    opened: dict[str, list[str]] = {}
    closed: list[str] = []
    undeclared: list[str] = []
    for route, requirement, is_builtin in _routes(app):
        if requirement is None:
            closed.append(route)
            undeclared += [] if is_builtin else [route]
        for permission in sorted((requirement or ONLY_FULL).permissions or ()):
            if permission != FULL:
                opened.setdefault(permission, []).append(DeclaredRule(route))
    mistakes = [
        (f"{bare} declares no permission, but {route} is for {permission} and matches it too",
         f'put @requires("FULL"), or another permission, on the view of {bare}')
        for permission, routes in opened.items()
        for route, bare in itertools.product(routes, closed)
        if _overlap(route, bare)
    ]  # fmt: skip
    if mistakes:
        raise ConfigurationError(mistakes)
    return DeclaredRules(opened, undeclared)


def _routes(app: Flask) -> Iterator[tuple[str, Requirement | None, bool]]:
    """Each route in the spelling of rules, what its view declares, and whether it is Flask's own
    `static` route, which cannot declare anything."""

    def parameter(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if not app.url_map.converters[kind or "default"].part_isolating:
            return f"<path:{name}>"
        return f"<{kind}:{name}>" if kind in ("int", "float", "uuid") else f"<{name}>"

    for rule in app.url_map.iter_rules():
        path = _PARAMETER.sub(parameter, rule.rule)
        view = app.view_functions.get(rule.endpoint)
        methods = _METHODS if rule.methods is None else rule.methods - {"HEAD", "OPTIONS"}
        for method in sorted(methods if not rule.build_only else ()):
            is_builtin = rule.endpoint.split(".")[-1] == "static"
            yield f"{method} {path}", required_by(view, method), is_builtin


def _overlap(route: str, bare: str) -> bool:
    """Whether the rule for a route also matches one that declares nothing; in doubt, yes."""
    (method, path), (other, bare_path) = route.split(" ", 1), bare.split(" ", 1)
    return method == other and overlaps(
        to_starlette_path(path) or path, to_starlette_path(bare_path) or bare_path
    )
