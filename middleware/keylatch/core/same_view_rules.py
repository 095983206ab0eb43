"""Exact rules also count for other paths of the same view: `/v1/export` for `/v1/{name}`.

The law of this file: no I/O of its own; an exception of the app's router goes to the caller, which
then requires FULL.
"""

import contextlib
from typing import Final

from keylatch.core.decisions import Requirement
from keylatch.core.paths import fold_path
from keylatch.core.routes import Route, Target
from keylatch.core.rules import Rule, rule_method

_MAX_CACHED_ROUTES: Final = 4096  # their key includes the host, which the client chooses


class SameViewRules:
    """The configured rules without parameters, and the routes that their paths lead to.

    Args:
        views_decide: as in `Policy`.
    """

    def __init__(self, views_decide: bool) -> None:
        self._views_decide = views_decide
        self._rules: dict[str, list[Rule]] = {}
        self._routes: dict[object, Route | None] = {}

    def add(self, rule: Rule) -> None:
        self._rules.setdefault(rule.method, []).append(rule)

    def requirements_for(self, target: Target, route: Route) -> list[Requirement]:
        """The requirements of exact rules for the same view, under any path, and of exact rules for
        a similar path: a middleware before the router may rewrite the path to theirs."""
        rules = self._rules.get(rule_method(target.method))
        if not rules:
            return []
        cache_key = target.router.cache_key(target.request) if route.is_view else None
        text = fold_path(target.path)
        return [
            rule.requirement
            for rule in rules
            if self._is_same_view(
                self._find_route(rule, cache_key, target), route, rule.folded_path == text
            )
        ]

    def _is_same_view(self, rule_route: Route | None, route: Route, is_same_text: bool) -> bool:
        """Whether an exact rule names the view of a request. A similar path alone does not count in
        Django: there the request is decided again for the chosen view."""
        if rule_route is None or not rule_route.is_view:
            return is_same_text
        # Further arguments, such as the format in a suffix, do not make it another view.
        is_same = (
            rule_route.view == route.view
            and rule_route.arguments.items() <= route.arguments.items()
        )
        return is_same or (is_same_text and not self._views_decide)

    def _find_route(self, rule: Rule, cache_key: object, target: Target) -> Route | None:
        """The route of an exact rule's path; None: none, or unknown."""
        if cache_key is None:
            return None
        with contextlib.suppress(KeyError):
            return self._routes[cache_key, rule]
        route = target.router.find_at(target.request, rule.path)
        if len(self._routes) >= _MAX_CACHED_ROUTES:
            self._routes.clear()
        self._routes[cache_key, rule] = route
        return route
