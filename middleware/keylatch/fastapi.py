"""FastAPI: the key as a dependency, declared where the route is, and shown in OpenAPI.

    api_key = APIKey()
    app.add_middleware(APIKeyMiddleware, permissions=permissions_of(app))

    @app.post("/v1/emails")
    async def send(key: Principal = Security(api_key, scopes=["SENDING"])) -> str: ...

The middleware stays the guard: it has checked the key before FastAPI looks for a route, also where
a route forgot the dependency. The dependency asks what the key may do here, and nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.authentication import UnauthenticatedUser
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Host, Mount, Route, WebSocketRoute

from keylatch.adapters.frameworks import required_scopes
from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import FULL, Deny, Principal, Reason, Requirement
from keylatch.core.paths import overlaps
from keylatch.core.rules import ANY_METHOD, WEBSOCKET, DeclaredRule
from keylatch.errors import ConfigurationError, Refused

try:
    from fastapi import FastAPI
    from fastapi.openapi.models import HTTPBearer
    from fastapi.routing import RouteContext, iter_route_contexts
    from fastapi.security import SecurityScopes
    from fastapi.security.base import SecurityBase
except ImportError as error:
    raise ImportError(
        "keylatch.fastapi needs the package fastapi: pip install 'fastapi>=0.150'", name="fastapi"
    ) from error

__all__ = ["APIKey", "APIKeyMiddleware", "permissions_of"]


class APIKey(SecurityBase):
    """A dependency that returns the request's `keylatch.Principal`.

    As `Security(api_key, scopes=["SENDING"])` it refuses keys that do not hold every scope; FULL
    holds all. A refusal is the very answer that the middleware gives.

    Args:
        scheme_name: what OpenAPI and the Authorize dialog call it.
        description: what they say about it, in Markdown.
        bearer_format: what kind of token it is.

    Raises:
        RuntimeError: for a request that did not pass `APIKeyMiddleware`.
    """

    keylatch_requires_key = True  # what `frameworks.required_scopes` looks for

    def __init__(
        self,
        *,
        scheme_name: str = "APIKey",
        description: str = "An API key, sent as `Authorization: Bearer <key>`.",
        bearer_format: str = "API key",
    ) -> None:
        self.model = HTTPBearer(bearerFormat=bearer_format, description=description)
        self.scheme_name = scheme_name

    async def __call__(
        self, security_scopes: SecurityScopes, connection: HTTPConnection
    ) -> Principal:
        user = connection.scope.get("user")
        if isinstance(user, UnauthenticatedUser):
            raise Refused(Deny(Reason.MISSING))
        if not isinstance(user, Principal):
            raise RuntimeError(
                "keylatch.fastapi.APIKey needs the middleware: "
                "app.add_middleware(keylatch.asgi.APIKeyMiddleware, …)"
            )
        granted = connection.auth.scopes
        if all(scope in granted for scope in security_scopes.scopes):
            return user
        raise Refused(
            Deny(Reason.INSUFFICIENT_SCOPE, Requirement.all_of(security_scopes.scopes).scope)
        )


def permissions_of(app: FastAPI) -> Mapping[str, Sequence[str]]:
    """The middleware's `permissions=`, as the app's routes declare them.

    A route is for the one permission that its `Security(api_key, scopes=[…])` names. With none, or
    with several (a key has but one), it is for FULL. The routes are read when the middleware is
    built, at the app's first call; those added later are for FULL.

    Rules know methods and paths, not the order of routes: where a route for FULL comes before one
    whose path also matches, the start fails, until the former says `scopes=["FULL"]`. It fails as
    well where a public path with parameters opens a route that asks for no key at all, unless it
    spells that route's own path.

    Args:
        app: with its included routers and whatever is mounted.
    """
    return _Permissions(app)


class _Permissions(Mapping[str, Sequence[str]]):
    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def __iter__(self) -> Iterator[str]:
        mistakes = list(_shadowed(list(_declarations(self._app.routes))))
        if mistakes:
            raise ConfigurationError(mistakes)
        return iter(self._rules())

    def __len__(self) -> int:
        return len(self._rules())

    def __getitem__(self, permission: str) -> Sequence[str]:
        return self._rules()[permission]

    def _rules(self) -> dict[str, list[str]]:
        rules: dict[str, list[str]] = {}
        for declaration in _declarations(self._app.routes):
            if declaration.permission:
                rule = DeclaredRule(declaration.rule)
                rules.setdefault(declaration.permission, []).append(rule)
        return rules

    @property
    def undeclared(self) -> Sequence[str]:
        """The routes that no public path may open by the way."""
        return [each.public_rule for each in _declarations(self._app.routes) if each.needs_no_key]


@dataclass(frozen=True, slots=True)
class _Declaration:
    """What a route says of one method."""

    method: str
    path: str
    scopes: frozenset[str]
    kind: tuple[object, str]
    """What the router tells apart and a rule does not: HEAD from GET, WebSockets, hosts."""
    needs_no_key: bool = False
    """Whether the route does not even ask for a key."""

    @property
    def permission(self) -> str | None:
        """The one that the middleware lets pass besides FULL."""
        if len(self.scopes) != 1 or self.method in ("HEAD", "OPTIONS"):
            return None
        return next(iter(self.scopes - {FULL}), None)

    @property
    def rule(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def public_rule(self) -> str:
        """As `public` names it."""
        is_websocket = self.kind[1] == WEBSOCKET
        return f"{WEBSOCKET} {self.path}" if is_websocket else self.rule

    def is_matched_by(self, other: "_Declaration") -> bool:
        """Whether the other's rule matches requests that are ours."""
        method = "GET" if self.method == "HEAD" else self.method
        return method in (ANY_METHOD, other.method) and overlaps(self.path, other.path)


def _declarations(
    routes: Sequence[BaseRoute], prefix: str = "", host: object = None
) -> Iterator[_Declaration]:
    """In the order in which the router tries them."""
    for context in iter_route_contexts(routes):
        route = context.original_route
        path = prefix + (context.path or "")
        if isinstance(route, Host):
            yield from _declarations(context.routes, prefix, route)
        elif isinstance(route, Mount) and context.routes:
            yield from _declarations(context.routes, path, host)
        elif isinstance(route, Mount):
            yield _Declaration(ANY_METHOD, path + "/{path:path}", frozenset(), (host, "http"), True)
        elif not _is_documentation(route):
            scopes = required_scopes(getattr(context, "dependant", None))
            for method, kind in _methods_of(context):
                needs_no_key = scopes is None
                yield _Declaration(method, path, scopes or frozenset(), (host, kind), needs_no_key)


def _methods_of(context: RouteContext) -> Iterator[tuple[str, str]]:
    """Its methods, each with what it is asked over."""
    if isinstance(context.original_route, WebSocketRoute):
        yield "GET", WEBSOCKET
        return
    methods = set(context.methods or [ANY_METHOD])
    if "GET" in methods:
        methods.discard("HEAD")
    for method in sorted(methods):
        yield method, "HEAD" if method == "HEAD" else "http"


def _is_documentation(route: BaseRoute) -> bool:
    """Whether FastAPI added it by itself, where nobody could declare anything."""
    return isinstance(route, Route) and route.endpoint.__module__ == "fastapi.applications"


def _shadowed(declarations: Sequence[_Declaration]) -> Iterator[tuple[str, str]]:
    """Each route for FULL whose requests the rule of another route would let pass.

    One that names scopes looks after itself, as does a route that comes later: the router never
    gets to it.
    """
    for place, opener in enumerate(declarations):
        if opener.permission is None:
            continue
        for at, closed in enumerate(declarations):
            reached = at < place or closed.kind != opener.kind
            if not closed.scopes and reached and closed.is_matched_by(opener):
                yield (
                    f"{closed.rule} is for FULL, but {opener.rule} of {opener.permission} opens it",
                    f'declare Security(api_key, scopes=["{FULL}"]) there, or change a path',
                )
