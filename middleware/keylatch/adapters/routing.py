"""Finds the view that the app behind a middleware will call, by the app's own router.

One class for each protocol, with the same methods. This file finds the framework's app behind
other middlewares, once; `frameworks` calls its router.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from operator import itemgetter
from types import FunctionType, MethodType
from typing import Any, Final
from urllib.parse import quote
from wsgiref.types import WSGIEnvironment

from starlette.types import Scope

from keylatch.adapters import frameworks
from keylatch.core.paths import has_unambiguous_root
from keylatch.core.routes import Route

_METHOD_OVERRIDE_HEADERS: Final = ("x-http-method-override", "x-http-method", "x-method-override")
_OVERRIDES_IN_SCOPE: Final = frozenset(
    each.replace("-", sign).encode() for each in _METHOD_OVERRIDE_HEADERS for sign in "-_"
)
_OVERRIDES_IN_ENVIRON: Final = frozenset(
    "HTTP_" + each.upper().replace("-", "_") for each in _METHOD_OVERRIDE_HEADERS
)
_NAME: Final = itemgetter(0)
_MAX_DEPTH: Final = 24  # middlewares around an app; a deeper app is not found


class ASGIRouter:
    """The router of an ASGI app.

    Args:
        app: the app or middleware that keylatch's middleware wraps.
        is_own_middleware: recognises keylatch's entry in Starlette's `user_middleware`. The app in
            the scope is the wrapped one only if it lists the middleware.
    """

    def __init__(self, app: Any, is_own_middleware: Callable[[object], bool]) -> None:
        self._app = app
        self._is_own_middleware = is_own_middleware

    def is_unambiguous(self, scope: Scope) -> bool:
        if has_encoded_slash(scope.get("raw_path")):
            return False
        if not _OVERRIDES_IN_SCOPE.isdisjoint(map(_NAME, scope.get("headers", ()))):
            return False
        root = scope.get("root_path")
        return not root or has_unambiguous_root(scope["path"], root)

    def find(self, scope: Scope) -> Route | None:
        return frameworks.litestar_selected_route(scope) or self._find_in_app(
            self._root_app(scope), scope
        )

    def find_at(self, scope: Scope, path: str) -> Route | None:
        hosts = [(name, value) for name, value in scope["headers"] if name == b"host"]
        # Without a root path: daphne takes it from the client, and it may be a prefix of the rule.
        other = {**scope, "path": path, "raw_path": quote(path).encode(), "root_path": ""}
        other |= {"headers": hosts, "query_string": b""}
        app = scope["litestar_app"] if frameworks.litestar_selected_route(scope) else None
        return self._find_in_app(app or self._root_app(scope), other)

    def cache_key(self, scope: Scope) -> object:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        count = len(getattr(self._root_app(scope), "routes", ()))  # routes may be added later
        return count, scope.get("method"), *hosts

    def _find_in_app(self, app: Any, scope: Scope, prefix: str = "") -> Route | None:
        return frameworks.find_asgi_route(
            find_framework(app) or app, scope, prefix, self._find_in_app
        )

    @cached_property
    def _framework(self) -> Any:
        return find_framework(self._app)

    def _root_app(self, scope: Scope) -> Any:
        if self._framework is not None:
            return self._framework
        app = scope.get("app")
        listed = getattr(app, "user_middleware", ())
        return app if any(map(self._is_own_middleware, listed)) else self._app


class WSGIRouter:
    """The router of a WSGI app.

    Args:
        app: the app or middleware that keylatch's middleware wraps.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    def is_unambiguous(self, environ: WSGIEnvironment) -> bool:
        return is_unambiguous_environ(environ)

    def find(self, environ: WSGIEnvironment) -> Route | None:
        return self._find_in_app(self._framework, environ)

    def find_at(self, environ: WSGIEnvironment, path: str) -> Route | None:
        other = {name: value for name, value in environ.items() if not name.startswith("HTTP_")}
        other |= {name: environ[name] for name in ("HTTP_HOST",) if name in environ}
        other |= {"PATH_INFO": path.encode().decode("latin-1"), "QUERY_STRING": ""}
        return self._find_in_app(self._framework, other)

    def cache_key(self, environ: WSGIEnvironment) -> object:
        return (*map(environ.get, ("REQUEST_METHOD", "SCRIPT_NAME", "HTTP_HOST", "SERVER_NAME")),)

    def _find_in_app(self, app: Any, environ: WSGIEnvironment, prefix: str = "") -> Route | None:
        return frameworks.find_wsgi_route(
            find_framework(app) or app, environ, prefix, self._find_in_app
        )

    @cached_property
    def _framework(self) -> Any:
        return find_framework(self._app) or self._app


def has_encoded_slash(raw_path: bytes | None) -> bool:
    """Whether the path has an encoded slash, which some routers decode and others do not."""
    if raw_path is None or b"%" not in raw_path:
        return False
    return b"%2f" in raw_path.partition(b"?")[0].lower()


def is_unambiguous_environ(environ: Mapping[str, Any]) -> bool:
    """Whether the path has no encoded slash, as far as the server reports the raw path, and no
    header overrides the method, which a middleware before the router may do."""
    if not environ.keys().isdisjoint(_OVERRIDES_IN_ENVIRON):
        return False
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    return "%" not in raw or "%2f" not in raw.partition("?")[0].lower()


def find_framework(app: Any) -> Any:
    """The app of a known framework behind middlewares; None: there is none, or there are several,
    and it is unknown which of them gets a request."""
    seen: dict[int, Any] = {}
    found: dict[int, Any] = {}
    level = {id(app): app}
    for _ in range(_MAX_DEPTH):
        apps = {at: each for at, each in level.items() if frameworks.is_framework(each)}
        found |= apps
        seen |= level
        wrapped = (
            each for at, each in level.items() if at not in apps for each in _wrapped_objects(each)
        )
        level = {id(each): each for each in wrapped if id(each) not in seen}
    for each in list(found.values()):
        found.pop(id(getattr(each, "router", None)), None)  # an app and its router count once
    return next(iter(found.values())) if len(found) == 1 else None


def _wrapped_objects(app: Any) -> Iterator[Any]:
    """The objects that a callable may pass requests to. Runs no property and no `__getattr__`."""
    inner: Iterable[Any] = ()
    if isinstance(app, dict):
        inner = app.values()
    elif isinstance(app, list | tuple):
        inner = app
    elif isinstance(app, partial):
        inner = (app.func, *app.args, *app.keywords.values())
    elif isinstance(app, FunctionType):
        inner = (cell.cell_contents for cell in app.__closure__ or () if _has_contents(cell))
    elif isinstance(app, MethodType):
        inner = (app.__self__,)
    elif "__dict__" in dir(type(app)):
        inner = tuple(object.__getattribute__(app, "__dict__").values())
    yield from (each for each in inner if _may_wrap_app(each))


def _may_wrap_app(wrapped: Any) -> bool:
    is_collection = isinstance(wrapped, dict | list | tuple)
    return is_collection or (callable(wrapped) and not isinstance(wrapped, type))


def _has_contents(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
