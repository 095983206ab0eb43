"""Flask: which key calls, and which permission a route asks for, in Flask's own words.

    @app.post("/v1/emails")
    @requires("SENDING")
    def send_email():
        return {"sent by": api_key.key_name}

    app.wsgi_app = APIKeyMiddleware(app.wsgi_app, permissions=permissions_of(app))  # the last line

The middleware is that of `keylatch.wsgi`, and it decides. A permission is declared once, at its
route; a route that declares none is for FULL only.
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

from keylatch.adapters.view_permissions import any_of, principal_of, refusal_of
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
        raise RuntimeError("api_key is known while a request is handled: use it inside a view")
    return cast(Principal, principal_of(request.environ))


api_key = cast(Principal, LocalProxy(_principal))
"""The principal of the current request; on a public path nobody (`is_authenticated` is False)."""


def requires(*permissions: str) -> Callable[[View], View]:
    """Let a view be called by keys with any one of these permissions, and by FULL.

    It stands below the route, so that `permissions_of` finds it. A key that may not call the view
    is refused by the middleware; the view itself refuses with the very same answer.

    Raises:
        ConfigurationError: naming every word that is no permission.
    """
    requirement = any_of(permissions)

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
    """The routes that each permission may call, as their views declare it.

    Call it when all routes are registered; later ones are for FULL only. The start fails as well
    where a public path with parameters opens a view that declares nothing, unless it spells that
    view's own path.

    Raises:
        ConfigurationError: naming every route that declares nothing, although a route that does
            also matches its path: Flask would tell them apart, rules do not.
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
         f'put @requires("FULL") on the view of {bare}, or what else it is for')
        for permission, routes in opened.items()
        for route, bare in itertools.product(routes, closed)
        if _overlap(route, bare)
    ]  # fmt: skip
    if mistakes:
        raise ConfigurationError(mistakes)
    return DeclaredRules(opened, undeclared)


def _routes(app: Flask) -> Iterator[tuple[str, Requirement | None, bool]]:
    """Each rule, spelled as `policy` reads it, what its view declares, and whether Flask added it
    by itself, where nothing could be declared."""

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
    """Whether the rule for a route opens one that declares nothing; in doubt it does."""
    (method, path), (other, bare_path) = route.split(" ", 1), bare.split(" ", 1)
    return method == other and overlaps(
        to_starlette_path(path) or path, to_starlette_path(bare_path) or bare_path
    )
