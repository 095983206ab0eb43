"""From a route to the permissions that suffice for it. Compiled once, looked up per request.

FULL may do everything. Any other permission may call only the routes named for it, and none
where none are named. Paths match as a whole, never by prefix: a prefix also opens the neighbours.

A path that is named as it is decides alone. What only names with parameters open is decided by the
view that the app's router chooses: what that declares, and what an exact rule for another path of
it says, counts as well; so does one whose path is the same but for letter case, a slash or a
suffix. A path that could be read in two ways is for FULL.
"""

import contextlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from keylatch.errors import ConfigurationError
from keylatch.frameworks import Route
from keylatch.model import FULL, ONLY_FULL, Wanted
from keylatch.paths import folded, is_canonical
from keylatch.routing import NoRouter, Router
from keylatch.rules import (
    WEBSOCKET,
    Mistakes,
    Rule,
    heads_opened_by,
    mounts_opened_by,
    opened_by,
    public_routes,
    rules_in,
    sufficient,
)

_UNDECIDED: Final = replace(ONLY_FULL, is_final=False)
"""FULL suffices; whether less does, `Policy.settled` says."""
_NO_ROUTER: Final = NoRouter()
_KEPT: Final = 4096  # routes of exact rules, by the host that a client names

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that the text of its path does not decide."""

    method: str
    path: str
    request: Any
    router: Router[Any]


class Policy:
    """Which paths are public, and which permission may call which route.

    Args:
        public: what needs no key: `"/healthz"` for GET and HEAD, or `"POST /signup"`.
        permissions: permission → rules of the form `"POST /v1/emails/{id}"`.
        grantable: the permissions that keys can have; None: any word.
        views_decide: whether what a view declares counts alone, whatever rules say, and each
            request is judged again by the view that was chosen (Django).

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
        self._views_decide = views_decide
        repeats = any(rule.is_declared for rule in rules)
        self._views_declare = views_decide or repeats or undeclared is not None
        self._has_warned = False
        self._known: dict[object, Route | None] = {}
        self._exact: dict[str, dict[str, Wanted | None]] = {}
        self._by_hand: dict[str, list[Rule]] = {}
        self._rules: dict[str, list[Rule]] = {}
        self._public: dict[str, list[Rule]] = {}
        for rule in rules:
            self._add(rule)
        for method, path in open_routes:
            if "{" in path:
                self._public.setdefault(method, []).append(Rule(method, path))
            else:
                self._open(method, path)
        self._has_patterns = bool(self._rules or self._public)
        mistakes += self.opened_unsaid(undeclared or ())
        if mistakes:
            raise ConfigurationError(mistakes)

    def _add(self, rule: Rule) -> None:
        if "{" in rule.path:
            self._rules.setdefault(rule.method, []).append(rule)
            return
        self._exact.setdefault(rule.path, {})[rule.method] = rule.wanted
        if not rule.is_declared:
            self._by_hand.setdefault(rule.method, []).append(rule)

    def _open(self, method: str, path: str) -> None:
        by_method = self._exact.setdefault(path, {})
        if method == "GET" and by_method.get("GET"):  # the rule stays that of the WebSocket
            by_method.setdefault(WEBSOCKET, by_method["GET"])
        by_method[method] = None

    @property
    def public_patterns(self) -> list[Rule]:
        """What is public and has parameters."""
        return [rule for rules in self._public.values() for rule in rules]

    def opened_unsaid(self, undeclared: Iterable[str]) -> Mistakes:
        """The routes among these that only a public path with parameters speaks of, although it
        does not spell them."""
        named = {f"{on} {path}" for path, by_method in self._exact.items() for on in by_method}
        undeclared = list(undeclared)
        unnamed = [each for each in undeclared if each not in named]
        exact = [Rule(on, path) for path, of in self._exact.items() for on in of if of[on] is None]
        patterns = self.public_patterns
        opened = opened_by(patterns, unnamed) + mounts_opened_by(patterns, undeclared)
        return opened + heads_opened_by([*exact, *patterns], undeclared)

    def asked(
        self, method: str, path: str, request: Any = None, router: Router[Any] = _NO_ROUTER
    ) -> Wanted | None:
        """What a request asks of a key; None where it needs none.

        It is not final where a rule with parameters matches: FULL suffices, and whether less does
        is to be asked of `settled`. HEAD follows GET (RFC 9110 section 9.3.2); a WebSocket does so
        as well, but not where that is public.
        """
        exact = self._exact.get(path)
        if exact is None and not self._has_patterns:  # where most requests end: no call yet
            return ONLY_FULL
        method = "GET" if method == "HEAD" else method
        if exact is not None and method in exact:
            return exact[method] if router.is_plain(request) else ONLY_FULL
        asked = _Asked(method, path, request, router)
        return self._of_websocket(asked) if method == WEBSOCKET else self._by_patterns(asked)

    def settled(self, method: str, path: str, request: Any, router: Router[Any]) -> Wanted:
        """What a request asks of a key that is good and has not enough by what `asked` says."""
        asked = _Asked(_ruled(method), path, request, router)
        wanted = self._by_route(asked, []) if self._is_clear(asked) else ONLY_FULL
        return wanted or ONLY_FULL

    def _of_websocket(self, asked: _Asked) -> Wanted | None:
        if self._matching(self._public, asked) and self._by_patterns(asked) is None:
            return None
        wanted = self.asked("GET", asked.path, asked.request, asked.router)
        return wanted or _UNDECIDED

    def _by_patterns(self, asked: _Asked) -> Wanted | None:
        public = self._matching(self._public, asked)
        if not public and not self._matching(self._rules, asked):
            return ONLY_FULL
        if not self._is_clear(asked):
            return ONLY_FULL
        return self._by_route(asked, public) if public else _UNDECIDED

    def _is_clear(self, asked: _Asked) -> bool:
        return is_canonical(asked.path) and asked.router.is_plain(asked.request)

    def _by_route(self, asked: _Asked, public: Sequence[Rule]) -> Wanted | None:
        """By the view that the router chooses. Whatever goes wrong with that, FULL suffices."""
        try:
            route = asked.router.find(asked.request)
            if route is None:
                return self._exactly(asked) or ONLY_FULL
            others = self._others(asked, route)
        except Exception as error:  # noqa: BLE001
            self._warn(error)
            return ONLY_FULL
        if public and not others and route.declared is None and self._may_open(public, route):
            return None
        return self._of_route(asked, route, others)

    def _of_route(self, asked: _Asked, route: Route, others: Sequence[Wanted]) -> Wanted:
        if self._views_decide and route.declared is not None:
            return route.declared
        exact = self._exactly(asked)
        if exact is not None:
            return exact
        declares = route.declared is not None and route.declared.permissions is not None
        rules = self._matching(self._rules, asked)
        named = [rule.named for rule in rules if declares or not rule.is_declared]
        by_rules = sufficient(frozenset().union(*named))
        return _all_of([by_rules, *others, *filter(None, [route.declared])])

    def _may_open(self, public: Sequence[Rule], route: Route) -> bool:
        """Whether a public path opens a view that declares nothing. Where views declare, it does
        so only if it spells the view's own path: else it was not meant."""
        is_spelled = any(each.shape in route.shapes for each in public)
        return is_spelled or not self._views_declare or not route.is_known

    def _others(self, asked: _Asked, route: Route) -> list[Wanted]:
        """What exact rules say of the same view, by whatever path they name it, and those whose
        text is nearly the same: a middleware before the router may make the path theirs."""
        rules = self._by_hand.get(_ruled(asked.method))
        if not rules:
            return []
        place = asked.router.place(asked.request) if route.is_known else None
        text = folded(asked.path)
        return [
            rule.wanted
            for rule in rules
            if self._is_meant(self._route_of(rule, place, asked), route, rule.folded == text)
        ]

    def _is_meant(self, named: Route | None, route: Route, is_same_text: bool) -> bool:
        """Whether an exact rule speaks of what a request gets to. Its text does not count where
        the view is certain: Django's is judged again once it is chosen."""
        if named is None or not named.is_known:
            return is_same_text
        # What the path says besides, such as the format of a suffix, makes it no other view.
        is_same = named.view == route.view and named.arguments.items() <= route.arguments.items()
        return is_same or (is_same_text and not self._views_decide)

    def _route_of(self, rule: Rule, place: object, asked: _Asked) -> Route | None:
        """Where the path of an exact rule leads; None: nowhere, or it is not known."""
        if place is None:
            return None
        with contextlib.suppress(KeyError):
            return self._known[place, rule]
        route = asked.router.find_at(asked.request, rule.path)
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[place, rule] = route
        return route

    def _exactly(self, asked: _Asked) -> Wanted | None:
        return self._exact.get(asked.path, {}).get(asked.method)

    @staticmethod
    def _matching(rules: Mapping[str, Sequence[Rule]], asked: _Asked) -> list[Rule]:
        return [rule for rule in rules.get(asked.method, ()) if rule.matches(asked.path)]

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "the app's router cannot be asked (%s): FULL is needed", type(error).__name__
            )

    def is_public(self, path: str, method: str = "GET") -> bool:
        """Whether a path needs no key, by itself."""
        asked = _Asked(method, path, None, _NO_ROUTER)
        if method in self._exact.get(path, {}):
            return self._exact[path][method] is None
        return is_canonical(path) and bool(self._matching(self._public, asked))

    def wanted(self, method: str, path: str) -> Wanted:
        """What rules ask of a key, by themselves. HEAD follows GET (RFC 9110 section 9.3.2)."""
        asked = _Asked("GET" if method == "HEAD" else method, path, None, _NO_ROUTER)
        exact = self._exactly(asked)
        if exact is not None:
            return exact
        named = [rule.named for rule in self._matching(self._rules, asked)]
        return sufficient(frozenset().union(*named)) if is_canonical(path) else ONLY_FULL


def _ruled(method: str) -> str:
    """The method by which rules speak of a request."""
    return "GET" if method in ("HEAD", WEBSOCKET) else method


def path_of(scope: Mapping[str, Any]) -> str:
    """The path as the app's own router sees it: below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root:
        return path
    if path == root:
        return ""
    return path[len(root) :] if path.startswith(root + "/") else path


def _all_of(wanted: Sequence[Wanted]) -> Wanted:
    """Demands that must all be satisfied; where only FULL does, the last names what is missing."""
    permissions = [each.permissions for each in wanted if each.permissions is not None]
    common = frozenset.intersection(*permissions) - {FULL}
    if common:
        return sufficient(common)
    scopes = [each.scope for each in wanted if each.permissions is not None]
    return Wanted(ONLY_FULL.permissions, scopes[-1])
