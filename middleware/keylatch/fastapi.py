"""FastAPI: a dependency that returns the principal, checks scopes, and is shown in OpenAPI.

    api_key = APIKey()
    app.add_middleware(APIKeyMiddleware, permissions=permissions_of(app))

    @app.post("/v1/emails")
    async def send(key: Principal = Security(api_key, scopes=["SENDING"])) -> str: ...

The middleware checks the key before FastAPI chooses a route, also for a route without the
dependency. The dependency only checks the scopes of the route.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.authentication import UnauthenticatedUser
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Host, Mount, Route, WebSocketRoute

from keylatch.adapters.frameworks import required_by_dependencies
from keylatch.adapters.view_permissions import any_of
from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import (
    ANY_KEY,
    FULL,
    Deny,
    Principal,
    Reason,
    Requirement,
    missing_scope,
)
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

    `Security(api_key, scopes=["SENDING"])` refuses keys that do not have all of the scopes; FULL
    includes every one. The refusal is the same response as the middleware's.

    Args:
        scheme_name: its name in OpenAPI and in the Authorize dialog.
        description: its description there, in Markdown.
        bearer_format: the kind of token, for OpenAPI.

    Raises:
        RuntimeError: the request did not pass `APIKeyMiddleware`.
    """

    keylatch_requirement = ANY_KEY  # for `frameworks.required_by_dependencies`

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
        for requirement in (
            Requirement.all_of(security_scopes.scopes),
            self.keylatch_requirement,
        ):
            deny = missing_scope(user.permission, requirement)
            if deny is not None:
                raise Refused(deny)
        return user

    def requires_any(self, *permissions: str) -> "APIKey":
        """A dependency that requires any one of these permissions.

            Depends(api_key.requires_any("SENDING", "READING"))

        Raises:
            ConfigurationError: names every malformed permission.
        """
        other = copy.copy(self)
        other.keylatch_requirement = any_of(permissions)
        return other


def permissions_of(app: FastAPI) -> Mapping[str, Sequence[str]]:
    """The middleware's `permissions=`, read from the app's routes.

    A route requires the permission that its `Security(api_key, scopes=[…])` names, or any one of
    its `requires_any`. With none, or with several scopes (a key has only one), it requires FULL.
    The routes are read when the middleware is built, at the app's first call; routes that are
    added later require FULL.

    Rules match methods and paths and ignore the order of routes. If a route that requires FULL
    precedes one whose path also matches, the middleware does not start until the former declares
    `scopes=["FULL"]`. Nor does it start if a public path with parameters opens a route that has no
    `APIKey` dependency, unless the public path is spelled exactly as that route's.

    Args:
        app: with its included routers and mounted apps.
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
            for permission in sorted(declaration.permissions):
                rules.setdefault(permission, []).append(DeclaredRule(declaration.rule))
        return rules

    @property
    def undeclared(self) -> Sequence[str]:
        """The routes that a public path with parameters must not open implicitly."""
        return [
            each.public_rule for each in _declarations(self._app.routes) if each.requirement is None
        ]


@dataclass(frozen=True, slots=True)
class _Declaration:
    """What a route declares for one method."""

    method: str
    path: str
    requirement: Requirement | None
    """None: the route has no `APIKey` dependency."""
    kind: tuple[object, str]
    """What the router distinguishes and a rule does not: HEAD from GET, WebSockets, hosts."""

    @property
    def permissions(self) -> frozenset[str]:
        """The permissions that suffice besides FULL; those of a rule for GET suffice for HEAD."""
        if self.requirement is None or self.method in ("HEAD", "OPTIONS"):
            return frozenset()
        return (self.requirement.permissions or frozenset()) - {FULL}

    @property
    def declares(self) -> bool:
        """Whether the route names permissions, which it then checks itself."""
        return self.requirement is not None and self.requirement.permissions is not None

    @property
    def rule(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def public_rule(self) -> str:
        """In the spelling of `public`."""
        is_websocket = self.kind[1] == WEBSOCKET
        return f"{WEBSOCKET} {self.path}" if is_websocket else self.rule

    def is_matched_by(self, other: "_Declaration") -> bool:
        """Whether the rule of another route matches requests of this one."""
        method = "GET" if self.method == "HEAD" else self.method
        return method in (ANY_METHOD, other.method) and overlaps(self.path, other.path)


def _declarations(
    routes: Sequence[BaseRoute], prefix: str = "", host: object = None
) -> Iterator[_Declaration]:
    """In the router's order."""
    for context in iter_route_contexts(routes):
        route = context.original_route
        path = prefix + (context.path or "")
        if isinstance(route, Host):
            yield from _declarations(context.routes, prefix, route)
        elif isinstance(route, Mount) and context.routes:
            yield from _declarations(context.routes, path, host)
        elif isinstance(route, Mount):
            yield _Declaration(ANY_METHOD, path + "/{path:path}", None, (host, "http"))
        elif not _is_documentation(route):
            requirement = required_by_dependencies(getattr(context, "dependant", None))
            for method, kind in _methods_of(context):
                yield _Declaration(method, path, requirement, (host, kind))


def _methods_of(context: RouteContext) -> Iterator[tuple[str, str]]:
    """Each method with its kind: `http`, `HEAD` or a WebSocket."""
    if isinstance(context.original_route, WebSocketRoute):
        yield "GET", WEBSOCKET
        return
    methods = set(context.methods or [ANY_METHOD])
    if "GET" in methods:
        methods.discard("HEAD")
    for method in sorted(methods):
        yield method, "HEAD" if method == "HEAD" else "http"


def _is_documentation(route: BaseRoute) -> bool:
    """Whether FastAPI added the route itself, so that it cannot declare anything."""
    return isinstance(route, Route) and route.endpoint.__module__ == "fastapi.applications"


def _shadowed(declarations: Sequence[_Declaration]) -> Iterator[tuple[str, str]]:
    """Each route that requires FULL and whose requests the rule of another route would allow.

    A route that names scopes checks them itself; the router does not reach one that comes later.
    """
    for place, opener in enumerate(declarations):
        if not opener.permissions:
            continue
        for at, closed in enumerate(declarations):
            reached = at < place or closed.kind != opener.kind
            if not closed.declares and reached and closed.is_matched_by(opener):
                yield (
                    f"{closed.rule} requires FULL, but {opener.rule} "
                    f"of {' or '.join(sorted(opener.permissions))} opens it",
                    f'declare Security(api_key, scopes=["{FULL}"]) there, or change a path',
                )
