"""What the policy asks of the framework's router, and what a router answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from keylatch.core.decisions import Requirement

Request = TypeVar("Request", contravariant=True)


@dataclass(frozen=True, slots=True)
class Route:
    """What a router chooses for a request.

    Args:
        view: what will be called; two are the same if they are equal.
        arguments: what the path says, by the names of its parameters.
        shapes: the route's path as `paths.shape` has it, in each way a rule may spell it.
        requirement: what the view declares; None: it declares nothing.
        is_view: whether `view` is a view. If not, it is an app with paths of its own.
    """

    view: object
    arguments: Mapping[str, object]
    shapes: frozenset[str] = frozenset()
    requirement: Requirement | None = None
    is_view: bool = True


class Router(Protocol[Request]):
    """What `policy` asks about a request, whatever the protocol."""

    def is_unambiguous(self, request: Request) -> bool:
        """Whether path and method have one meaning, as far as they themselves cannot tell."""

    def find(self, request: Request) -> Route | None:
        """What will be called; None: nothing, or a redirect. It may raise anything."""

    def find_at(self, request: Request, path: str) -> Route | None:
        """The same for another path, on the same host; nothing else of the request counts."""

    def cache_key(self, request: Request) -> object:
        """By what `find_at` differs for one path and method."""


class NoRouter:
    """For paths that come without a request: the app is unknown, and so is everything in it."""

    def is_unambiguous(self, request: object) -> bool:
        return True

    def find(self, request: object) -> Route | None:
        return Route(None, {}, is_view=False)

    def find_at(self, request: object, path: str) -> Route | None:
        return None

    def cache_key(self, request: object) -> object:
        return None
