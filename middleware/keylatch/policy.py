"""From a route to the permissions that suffice for it. Compiled once, looked up per request.

FULL may do everything. Any other permission may call only the routes named for it, and none
where none are named. Paths match as a whole, never by prefix: a prefix also opens the neighbours.

A path that is named as it is decides alone. What only names with parameters open is decided by the
view that the app's router chooses: what that declares, and what an exact rule for another path of
it says, counts as well. A path that could be read in two ways is for FULL.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from keylatch.errors import ConfigurationError
from keylatch.frameworks import Route
from keylatch.model import FULL, ONLY_FULL, Wanted
from keylatch.paths import folded, is_canonical
from keylatch.routing import NoRouter, Router
from keylatch.rules import Mistakes, Rule, opened_by, public_routes, rules_in, sufficient

_NOT_NAMED: Final = replace(ONLY_FULL, scope="")
"""Stands for a path that is not named as it is."""
_UNDECIDED: Final = replace(ONLY_FULL, is_final=False)
"""FULL suffices; whether less does, `Policy.settled` says."""
_NO_ROUTER: Final = NoRouter()
_KEPT: Final = 4096  # routes of exact rules, by the host that a client names

log = logging.getLogger("keylatch")


class Policy:
    """Which paths are public, and which permission may call which route.

    Args:
        public: what needs no key: `"/healthz"` for GET and HEAD, or `"POST /signup"`.
        permissions: permission → rules of the form `"POST /v1/emails/{id}"`.
        grantable: the permissions that keys can have; None: any word.
        views_decide: whether what a view declares counts alone, whatever rules say (Django).

    Raises:
        ConfigurationError: naming every malformed path and rule, every unknown permission, and
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
        open_routes = public_routes(public, mistakes)
        rules = rules_in(permissions or {}, grantable, mistakes)
        undeclared = getattr(permissions, "undeclared", None)
        mistakes += opened_by(open_routes, undeclared or ())
        if mistakes:
            raise ConfigurationError(mistakes)
        self._views_decide = views_decide
        self._has_warned = False
        self._views_declare = views_decide or undeclared is not None
        self._known: dict[object, Route] = {}
        self._rules: dict[str, list[Rule]] = {}
        self._public: dict[str, list[Rule]] = {}
        self._exact: dict[tuple[str, str], Wanted | None] = {}
        self._by_hand: dict[str, list[Rule]] = {}
        for rule in rules:
            self._add(rule)
        for method, path in open_routes:
            if "{" in path:
                self._public.setdefault(method, []).append(Rule(method, path))
            else:
                self._exact[method, path] = None

    def _add(self, rule: Rule) -> None:
        if "{" in rule.path:
            self._rules.setdefault(rule.method, []).append(rule)
            return
        self._exact[rule.method, rule.path] = rule.wanted
        if not rule.is_declared:
            self._by_hand.setdefault(rule.method, []).append(rule)

    def asked(
        self, method: str, path: str, request: Any = None, router: Router[Any] = _NO_ROUTER
    ) -> Wanted | None:
        """What a request asks of a key; None where it needs none.

        It is not final where a rule with parameters matches: FULL suffices, and whether less does
        is to be asked of `settled`. HEAD follows GET (RFC 9110 section 9.3.2).
        """
        if method == "HEAD":
            method = "GET"
        exact = self._exact.get((method, path), _NOT_NAMED)
        if exact is not _NOT_NAMED:
            return exact if router.is_plain(request) else ONLY_FULL
        if method not in self._rules and method not in self._public:
            return ONLY_FULL
        return self._by_patterns(method, path, request, router)

    def _by_patterns(
        self, method: str, path: str, request: Any, router: Router[Any]
    ) -> Wanted | None:
        public = _matching(self._public, method, path)
        if not public and not _matching(self._rules, method, path):
            return ONLY_FULL
        if not is_canonical(path) or not router.is_plain(request):
            return ONLY_FULL
        return self._decided(method, path, request, router, public) if public else _UNDECIDED

    def settled(self, method: str, path: str, request: Any, router: Router[Any]) -> Wanted:
        """What a request asks of a key that is good and has not enough by what `asked` says."""
        if method == "HEAD":
            method = "GET"
        if not is_canonical(path) or not router.is_plain(request):
            return ONLY_FULL
        wanted = self._decided(method, path, request, router, [])
        return ONLY_FULL if wanted is None else wanted

    def _decided(
        self, method: str, path: str, request: Any, router: Router[Any], public: Sequence[Rule]
    ) -> Wanted | None:
        """By the view that the router chooses. Whatever goes wrong with that, FULL suffices."""
        try:
            route = router.find(request)
            if route is None:
                return self._exact.get((method, path)) or ONLY_FULL
            others = self._others(method, path, request, router, route)
        except Exception as error:  # noqa: BLE001
            self._warn(error)
            return ONLY_FULL
        if public and not others and route.declared is None and self._may_open(public, route):
            return None
        return self._of_route(method, path, route, others)

    def _of_route(self, method: str, path: str, route: Route, others: Sequence[Wanted]) -> Wanted:
        if self._views_decide and route.declared is not None:
            return route.declared
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        rules = _matching(self._rules, method, path)
        declares = route.declared is not None and route.declared.permissions is not None
        named = [rule.named for rule in rules if declares or not rule.is_declared]
        by_rules = sufficient(frozenset().union(*named))
        return _all_of([by_rules, *others, *filter(None, [route.declared])])

    def _may_open(self, public: Sequence[Rule], route: Route) -> bool:
        """Whether a public path opens a view that declares nothing. Where views declare, it does
        so only if it spells the view's own path: else it was not meant."""
        is_spelled = any(each.shape in route.shapes for each in public)
        return is_spelled or not self._views_declare or not route.is_known

    def _others(
        self, method: str, path: str, request: Any, router: Router[Any], route: Route
    ) -> list[Wanted]:
        """What exact rules say of the same view, by whatever path they name it."""
        rules = self._by_hand.get(method, ())
        if not rules:
            return []
        is_named = any(rule.shape in route.shapes for rule in _matching(self._rules, method, path))
        found = []
        for rule in rules:
            named = self._route_of(rule, request, router) if route.is_known else None
            if named is None or not named.is_known:
                is_meant = rule.folded == folded(path)
            else:
                is_meant = _leads_to(named, route, is_named)
            if is_meant:
                found.append(rule.wanted)
        return found

    def _route_of(self, rule: Rule, request: Any, router: Router[Any]) -> Route | None:
        key = router.place(request), rule
        route = self._known.get(key)
        if route is None:
            route = router.find_at(request, rule.path)
            if route is not None:  # what is not there may be added
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[key] = route
        return route

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "the app's router cannot be asked (%s): FULL is needed", type(error).__name__
            )

    def is_public(self, path: str, method: str = "GET") -> bool:
        """Whether a path needs no key, by itself."""
        exact = self._exact.get((method, path), _NOT_NAMED)
        if exact is not _NOT_NAMED:
            return exact is None
        return is_canonical(path) and bool(_matching(self._public, method, path))

    def wanted(self, method: str, path: str) -> Wanted:
        """What rules ask of a key, by themselves. HEAD follows GET (RFC 9110 section 9.3.2)."""
        if method == "HEAD":
            method = "GET"
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        named = [rule.named for rule in _matching(self._rules, method, path)]
        return sufficient(frozenset().union(*named)) if is_canonical(path) else ONLY_FULL


def path_of(scope: Mapping[str, Any]) -> str:
    """The path as the app's own router sees it: below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root:
        return path
    if path == root:
        return ""
    return path[len(root) :] if path.startswith(root + "/") else path


def _matching(rules: Mapping[str, Sequence[Rule]], method: str, path: str) -> list[Rule]:
    return [rule for rule in rules.get(method, ()) if rule.matches(path)]


def _leads_to(named: Route, route: Route, is_named: bool) -> bool:
    """Whether what is said of one route holds for another: it is the same view, and what the
    path says is the same, or more (a suffix such as `.json` is an argument). More is another
    thing where a rule spells that very route."""
    if named.view != route.view:
        return False
    if named.arguments == route.arguments:
        return True
    return not is_named and named.arguments.items() <= route.arguments.items()


def _all_of(wanted: Sequence[Wanted]) -> Wanted:
    """Demands that must all be satisfied; where only FULL does, the last names what is missing."""
    permissions = [each.permissions for each in wanted if each.permissions is not None]
    common = frozenset.intersection(*permissions) - {FULL}
    if common:
        return sufficient(common)
    scopes = [each.scope for each in wanted if each.permissions is not None]
    return Wanted(ONLY_FULL.permissions, scopes[-1])
