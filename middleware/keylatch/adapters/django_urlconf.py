"""The views of a Django project, by the URLconf that is active for a request.

The law of this file: it imports Django only in functions; `keylatch.django` reports a missing one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from keylatch.adapters.django_language import language_of, override_language
from keylatch.adapters.frameworks import (
    django_path_templates,
    find_django_route,
    route_from_django_match,
)
from keylatch.adapters.routing import has_encoded_slash, is_unambiguous_environ
from keylatch.core.routes import Route
from keylatch.core.rules import required_by

if TYPE_CHECKING:
    from django.http import HttpRequest


class URLconf:
    """The view of a request, by the URLconf that is active for it."""

    def is_unambiguous(self, request: "HttpRequest") -> bool:
        raw = getattr(request, "scope", {}).get("raw_path")
        return not has_encoded_slash(raw) and is_unambiguous_environ(request.META)

    def find(self, request: "HttpRequest") -> Route | None:
        return self.find_at(request, request.path_info)

    def find_at(self, request: "HttpRequest", path: str) -> Route | None:
        with override_language(request, path):
            return find_django_route(path, str(request.method), getattr(request, "urlconf", None))

    def cache_key(self, request: "HttpRequest") -> object:
        return getattr(request, "urlconf", None), language_of(request), request.method


class ResolvedURLconf(URLconf):
    """The view that Django has already resolved."""

    def find(self, request: "HttpRequest") -> Route | None:
        return route_from_django_match(request.resolver_match, str(request.method))


def undeclared_routes(methods: Sequence[str]) -> Iterator[str]:
    """The routes whose views declare nothing, in the spelling of rules."""
    from django.urls import get_resolver

    for route, view in _views(get_resolver().url_patterns):
        for method in methods:
            if required_by(view, method) is None:
                yield from (f"{method} {each}" for each in django_path_templates(route))


def _views(patterns: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Each route and its view, including those of included URLconfs."""
    for each in patterns:
        route = prefix + str(each.pattern).removeprefix("^" if prefix else "")
        if hasattr(each, "url_patterns"):
            yield from _views(each.url_patterns, route)
        else:
            yield route, each.callback
