"""Maps a route to the permissions that suffice for it. Compiled at start, looked up per request.

FULL can call every route. Another permission can call only the routes that are named for it.
Rules match whole paths, never prefixes: a prefix would also match other routes.

A rule without parameters (an exact rule) alone decides its path. If only rules or public paths with
parameters match, the view that the app's router chooses decides: the view's own declaration counts
as well, and so do exact rules for other paths of the same view, or for paths that differ only in
letter case, a slash or a suffix. A path with two interpretations requires FULL.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from keylatch.core.decisions import ONLY_FULL, Requirement
from keylatch.core.paths import is_canonical
from keylatch.core.routes import NoRouter, Route, Router, Target
from keylatch.core.rules import (
    WEBSOCKET,
    Mistakes,
    Rule,
    find_exposed_heads,
    find_exposed_mounts,
    find_exposed_views,
    parse_public,
    parse_rules,
    rule_method,
)
from keylatch.core.same_view_rules import SameViewRules
from keylatch.errors import ConfigurationError

_FULL_BEFORE_ROUTING: Final = replace(ONLY_FULL, is_final=False)
"""FULL suffices; `Policy.routed_requirement` decides on other permissions."""
_NO_ROUTER: Final = NoRouter()

log = logging.getLogger("keylatch")


class Policy:
    """The public paths, and the permissions that suffice for each route.

    Args:
        public: paths that need no key: `"/healthz"` for GET and HEAD, or `"POST /signup"`.
        permissions: permission → rules of the form `"POST /v1/emails/{id}"`.
        grantable: the permissions that keys can have; None: any word.
        views_decide: a view's declaration takes precedence over all rules, and each request is
            decided again for the view that was chosen (Django).

    Raises:
        ConfigurationError: names every malformed path and rule, every unknown permission, and
            every view that declares nothing and that a public path with parameters would open.
    """

    def __init__(
        self,
        public: Iterable[str] = (),
        permissions: Mapping[str, Iterable[str]] | None = None,
        grantable: Collection[str] | None = None,
        views_decide: bool = False,
    ) -> None:
        mistakes: Mistakes = []
        public_routes = parse_public(public, mistakes)
        rules = parse_rules(permissions or {}, grantable, mistakes)
        undeclared = getattr(permissions, "undeclared", None)
        self._views_decide = views_decide
        has_declared_rules = any(rule.is_declared for rule in rules)
        self._views_declare = views_decide or has_declared_rules or undeclared is not None
        self._has_warned = False
        self._same_view_rules = SameViewRules(views_decide)
        self._exact: dict[str, dict[str, Requirement | None]] = {}
        self._rule_patterns: dict[str, list[Rule]] = {}
        self._public_patterns: dict[str, list[Rule]] = {}
        for rule in rules:
            self._add(rule)
        for method, path in public_routes:
            if "{" in path:
                self._public_patterns.setdefault(method, []).append(Rule(method, path))
            else:
                self._add_public(method, path)
        self._has_patterns = bool(self._rule_patterns or self._public_patterns)
        mistakes += self.find_exposed(undeclared or ())
        if mistakes:
            raise ConfigurationError(mistakes)

    def _add(self, rule: Rule) -> None:
        if "{" in rule.path:
            self._rule_patterns.setdefault(rule.method, []).append(rule)
            return
        self._exact.setdefault(rule.path, {})[rule.method] = rule.requirement
        if not rule.is_declared:
            self._same_view_rules.add(rule)

    def _add_public(self, method: str, path: str) -> None:
        by_method = self._exact.setdefault(path, {})
        if method == "GET" and by_method.get("GET"):  # the rule still applies to WebSockets
            by_method.setdefault(WEBSOCKET, by_method["GET"])
        by_method[method] = None

    @property
    def public_patterns(self) -> list[Rule]:
        """The public paths with parameters."""
        return [rule for rules in self._public_patterns.values() for rule in rules]

    def find_exposed(self, undeclared: Iterable[str]) -> Mistakes:
        """The mistakes for the routes that only a public path with parameters opens, unless
        it is spelled exactly as the route."""
        named = {f"{on} {path}" for path, by_method in self._exact.items() for on in by_method}
        undeclared = list(undeclared)
        unnamed = [each for each in undeclared if each not in named]
        exact = [
            Rule(on, path)
            for path, by_method in self._exact.items()
            for on in by_method
            if by_method[on] is None
        ]
        patterns = self.public_patterns
        opened = find_exposed_views(patterns, unnamed) + find_exposed_mounts(patterns, undeclared)
        return opened + find_exposed_heads([*exact, *patterns], undeclared)

    def requirement_for(
        self, method: str, path: str, request: Any = None, router: Router[Any] = _NO_ROUTER
    ) -> Requirement | None:
        """The requirement of a request; None: it needs no key.

        If a rule with parameters matches, it is not final: FULL suffices, and `routed_requirement`
        decides on other permissions. HEAD follows GET (RFC 9110 section 9.3.2); so does a
        WebSocket, except that a public path for GET does not open WebSockets.
        """
        exact = self._exact.get(path)
        if exact is None and not self._has_patterns:  # most requests return here, before any call
            return ONLY_FULL
        method = "GET" if method == "HEAD" else method
        if exact is not None and method in exact:
            return exact[method] if router.is_unambiguous(request) else ONLY_FULL
        target = Target(method, path, request, router)
        return (
            self._websocket_requirement(target)
            if method == WEBSOCKET
            else self._pattern_requirement(target)
        )

    def routed_requirement(
        self, method: str, path: str, request: Any, router: Router[Any]
    ) -> Requirement:
        """The final requirement, for a valid key that does not satisfy `requirement_for`."""
        target = Target(rule_method(method), path, request, router)
        requirement = (
            self._route_requirement(target, []) if self._is_unambiguous(target) else ONLY_FULL
        )
        return requirement or ONLY_FULL

    def _websocket_requirement(self, target: Target) -> Requirement | None:
        if (
            self._matching(self._public_patterns, target)
            and self._pattern_requirement(target) is None
        ):
            return None
        requirement = self.requirement_for("GET", target.path, target.request, target.router)
        return requirement or _FULL_BEFORE_ROUTING

    def _pattern_requirement(self, target: Target) -> Requirement | None:
        public = self._matching(self._public_patterns, target)
        if not public and not self._matching(self._rule_patterns, target):
            return ONLY_FULL
        if not self._is_unambiguous(target):
            return ONLY_FULL
        return self._route_requirement(target, public) if public else _FULL_BEFORE_ROUTING

    def _is_unambiguous(self, target: Target) -> bool:
        return is_canonical(target.path) and target.router.is_unambiguous(target.request)

    def _route_requirement(self, target: Target, public: Sequence[Rule]) -> Requirement | None:
        """By the view that the router chooses. If that fails, the request requires FULL."""
        try:
            route = target.router.find(target.request)
            if route is None:
                return self._exact_requirement(target) or ONLY_FULL
            others = self._same_view_rules.requirements_for(target, route)
        except Exception as error:  # noqa: BLE001
            self._warn_once(error)
            return ONLY_FULL
        if (
            public
            and not others
            and route.requirement is None
            and self._is_public_view(public, route)
        ):
            return None
        return self._view_requirement(target, route, others)

    def _view_requirement(
        self, target: Target, route: Route, others: Sequence[Requirement]
    ) -> Requirement:
        if self._views_decide and route.requirement is not None:
            return route.requirement
        exact = self._exact_requirement(target)
        if exact is not None:
            return exact
        declares = route.requirement is not None and route.requirement.permissions is not None
        rules = self._matching(self._rule_patterns, target)
        permissions = [rule.named for rule in rules if declares or not rule.is_declared]
        by_rules = Requirement.any_of(frozenset().union(*permissions))
        return Requirement.intersection([by_rules, *others, *filter(None, [route.requirement])])

    def _is_public_view(self, public: Sequence[Rule], route: Route) -> bool:
        """Whether a public path opens a view that declares nothing. In an app whose views declare,
        only a public path that is spelled as the view's own route does."""
        is_spelled = any(each.shape in route.shapes for each in public)
        return is_spelled or not self._views_declare or not route.is_view

    def _exact_requirement(self, target: Target) -> Requirement | None:
        return self._exact.get(target.path, {}).get(target.method)

    @staticmethod
    def _matching(rules: Mapping[str, Sequence[Rule]], target: Target) -> list[Rule]:
        return [rule for rule in rules.get(target.method, ()) if rule.matches(target.path)]

    def _warn_once(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "the app's router failed (%s): the request requires a FULL key",
                type(error).__name__,
            )

    def is_public(self, path: str, method: str = "GET") -> bool:
        """Whether a path needs no key, without a request."""
        target = Target(method, path, None, _NO_ROUTER)
        if method in self._exact.get(path, {}):
            return self._exact[path][method] is None
        return is_canonical(path) and bool(self._matching(self._public_patterns, target))

    def requirement_by_rules(self, method: str, path: str) -> Requirement:
        """The requirement by the rules alone. HEAD follows GET (RFC 9110 section 9.3.2)."""
        target = Target("GET" if method == "HEAD" else method, path, None, _NO_ROUTER)
        exact = self._exact_requirement(target)
        if exact is not None:
            return exact
        permissions = [rule.named for rule in self._matching(self._rule_patterns, target)]
        if not is_canonical(path):
            return ONLY_FULL
        return Requirement.any_of(frozenset().union(*permissions))


def route_path(scope: Mapping[str, Any]) -> str:
    """The path as the app's router sees it: relative to the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root:
        return path
    if path == root:
        return ""
    return path[len(root) :] if path.startswith(root + "/") else path
