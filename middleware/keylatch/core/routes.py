"""The interface between the policy and a framework's router."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from keylatch.core.decisions import Requirement

Request = TypeVar("Request", contravariant=True)


@dataclass(frozen=True, slots=True)
class Route:
    """The route that a router chooses for a request.

    Args:
        view: the callable; equal views are the same view.
        arguments: the path's parameters, by name.
        shapes: the route's path as `paths.shape`, in every spelling that a rule can have.
        requirement: the requirement that the view declares; None: it declares nothing.
        is_view: False: `view` is an app with paths of its own.
    """

    view: object
    arguments: Mapping[str, object]
    shapes: frozenset[str] = frozenset()
    requirement: Requirement | None = None
    is_view: bool = True


class Router(Protocol[Request]):
    """The router of an app, for one protocol."""

    def is_unambiguous(self, request: Request) -> bool:
        """Whether nothing in the request besides path and method makes these ambiguous."""

    def find(self, request: Request) -> Route | None:
        """The route of the request; None: none, or a redirect. It may raise any exception."""

    def find_at(self, request: Request, path: str) -> Route | None:
        """The route of another path on the same host; nothing else of the request matters."""

    def cache_key(self, request: Request) -> object:
        """What the result of `find_at` depends on besides path and method."""


class NoRouter:
    """For paths without a request: the app and its views are unknown."""

    def is_unambiguous(self, request: object) -> bool:
        return True

    def find(self, request: object) -> Route | None:
        return Route(None, {}, is_view=False)

    def find_at(self, request: object, path: str) -> Route | None:
        return None

    def cache_key(self, request: object) -> object:
        return None


@dataclass(frozen=True, slots=True)
class Target:
    """A request and the router of its app.

    Args:
        method: as rules name it.
        path: relative to the place where the app is mounted.
        request: scope or environ; None: there is none.
        router: of the app.
    """

    method: str
    path: str
    request: Any
    router: Router[Any]
