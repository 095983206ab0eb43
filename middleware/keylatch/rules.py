"""What an app says of its routes: public paths and rules, read once when it starts, and what
views declare.

The law of this file: everything wrong is collected, none of it raised, and nothing is asked.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from keylatch.model import FULL, ONLY_FULL, Wanted
from keylatch.paths import folded, overlap, pattern, shape, spelled
from keylatch.settings import PERMISSION_PATTERN

Mistakes = list[tuple[str, str]]


class _Unsent(str):
    """A method that no request can name: it equals only itself, and no text."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


WEBSOCKET: Final = _Unsent("WEBSOCKET")
"""What `public` names where a WebSocket needs no key. Rules say GET, by which it is opened."""
ANY_METHOD: Final = "*"
"""Of what is mounted, with methods and paths of its own."""
_FOLLOWING: Final = {"HEAD": "HEAD follows it", str(WEBSOCKET): "a WebSocket is opened by it"}
_DECLARED: Final = "keylatch_wanted"
_METHOD: Final = re.compile(r"[A-Z]+")
_PATH_HINT: Final = "such as /healthz, /docs/{page} or POST /signup"


def declare(view: Callable[..., Any], wanted: Wanted) -> None:
    """Mark a view with what it asks; `functools.wraps` carries the mark on."""
    setattr(view, _DECLARED, wanted)


def declared(view: object, method: str) -> Wanted | None:
    """What a view asks of a request with this method, or None where it declares nothing.

    Of a class-based view (`view_class`; `cls` and `actions` in Django REST framework) also its
    methods are asked. HEAD follows GET, as in `policy`.
    """
    name = "get" if method == "HEAD" else method.lower()
    name = getattr(view, "actions", {}).get(name, name)
    of_class = getattr(view, "view_class", None) or getattr(view, "cls", None)
    for place in (view, getattr(of_class, name, None)):
        wanted = getattr(place, _DECLARED, None)
        if isinstance(wanted, Wanted):
            return wanted
    return None


class DeclaredRule(str):
    """A rule that repeats what a view declares. It opens no view that declares nothing."""

    __slots__ = ()


class DeclaredRules(dict[str, Sequence[str]]):
    """Rules that are read from views.

    Args:
        rules: permission → rules, each a `DeclaredRule`.
        undeclared: the routes whose views declare nothing, spelled as rules are.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]], undeclared: Sequence[str]) -> None:
        super().__init__(rules)
        self.undeclared = undeclared


class Rule:
    """A route as it is named, and what it asks of a key.

    Args:
        method: of requests.
        path: with parameters spelled Starlette's way.
        named: the permissions that it is named for; none: it is public.
        is_declared: whether it only repeats what views declare.
    """

    def __init__(
        self, method: str, path: str, named: Iterable[str] = (), is_declared: bool = False
    ) -> None:
        self.method = method
        self.path = path
        self.named = frozenset(named)
        self.is_declared = is_declared
        self.wanted = sufficient(self.named)
        self.matches = pattern(path).fullmatch
        self.shape = shape(path)
        self.folded = folded(path)


@functools.lru_cache(maxsize=1024)
def sufficient(named: frozenset[str]) -> Wanted:
    """What a route asks that is named for these permissions; for none: FULL."""
    return Wanted(named | {FULL}, " ".join(sorted(named))) if named else ONLY_FULL


def opened_by(public: Iterable[Rule], undeclared: Iterable[str]) -> Mistakes:
    """The views that declare nothing and that public paths with parameters open, if none of these
    spells the view's own path: that is the app's own choice."""
    public = list(public)
    said = {(str(rule.method), rule.shape) for rule in public}
    routes = [each.partition(" ") for each in undeclared]
    return [
        (
            f"public path {rule.method} {rule.path} opens {method} {path}, which declares nothing",
            f'name "{method} {path}" in public as well, or declare a permission there',
        )
        for rule in public
        for method, _, path in routes
        if str(rule.method) == ("GET" if method == "HEAD" else method)
        if (str(rule.method), shape(path)) not in said and overlap(rule.path, spelled(path) or path)
    ]


def heads_opened_by(public: Iterable[Rule], undeclared: Collection[str]) -> Mistakes:
    """The views for HEAD that declare nothing and that public paths for GET open, although another
    view answers GET there and declares something."""
    heads = [each.partition(" ")[2] for each in undeclared if each.startswith("HEAD ")]
    return [
        (
            f"public path GET {rule.path} opens HEAD {path}, which declares nothing",
            "declare a permission there, as the view for GET does",
        )
        for path in heads
        if f"GET {path}" not in undeclared
        for rule in public
        if rule.method == "GET" and rule.shape == shape(path)
    ]


def mounts_opened_by(public: Iterable[Rule], undeclared: Iterable[str]) -> Mistakes:
    """The mounted apps that cannot be looked into and that public paths with parameters open, if
    these do not spell the place where the app is mounted."""
    mounts = [each.removeprefix(f"{ANY_METHOD} ") for each in undeclared if each[0] == ANY_METHOD]
    return [
        (
            f"public path {rule.method} {rule.path} opens what is mounted at {place}",
            "spell that place in it, or change it",
        )
        for place in (mount.removesuffix("/{path:path}") for mount in mounts)
        for rule in public
        if not rule.path.startswith(f"{place}/") and overlap(rule.path, f"{place}/{{path:path}}")
    ]


def public_routes(paths: Iterable[str], mistakes: Mistakes) -> list[tuple[str, str]]:
    """Methods and paths. One without a method is for reading: GET, which HEAD follows."""
    if isinstance(paths, str):
        mistakes.append((f"public={paths!r} is one string", f"write public=[{paths!r}]"))
        return []
    found = []
    for each in paths:
        method, path = each.split(" ", 1) if " " in each else ("GET", each)
        path_spelled = spelled(path)
        if method == "HEAD":
            mistakes.append((f"public path {each!r}", "name GET: HEAD follows it"))
        elif not _METHOD.fullmatch(method) or path_spelled is None or ":path}" in path_spelled:
            mistakes.append((f"public path {each!r}", _PATH_HINT))
        else:
            found.append((WEBSOCKET if method == str(WEBSOCKET) else method, path_spelled))
    return found


def rules_in(
    permissions: Mapping[str, Iterable[str]], grantable: Collection[str] | None, mistakes: Mistakes
) -> list[Rule]:
    named: dict[tuple[str, str], set[str]] = {}
    by_hand: set[tuple[str, str]] = set()
    for permission, rules in permissions.items():
        if not re.fullmatch(PERMISSION_PATTERN, permission):
            mistakes.append((f"permission {permission!r}", f"a word matching {PERMISSION_PATTERN}"))
        elif grantable is not None and permission not in grantable:
            known = f"is none of KEYLATCH_PERMISSIONS ({', '.join(grantable)})"
            mistakes.append((f"permission {permission!r} {known}", "add it there, or correct it"))
        if isinstance(rules, str):
            mistakes.append((f"the rules of {permission} are one string", f"write [{rules!r}]"))
            continue
        for rule in rules:
            route = _route(rule, permission, mistakes)
            if route is not None:
                named.setdefault(route, set()).add(permission)
                if not isinstance(rule, DeclaredRule):
                    by_hand.add(route)
    return [Rule(*route, named[route], route not in by_hand) for route in named]


def _route(rule: str, permission: str, mistakes: Mistakes) -> tuple[str, str] | None:
    method, _, path = rule.partition(" ")
    path_spelled = spelled(path)
    if method in _FOLLOWING:  # taken for GET, it would open more than it names
        hint = f"name GET: {_FOLLOWING[method]}"
        mistakes.append((f"rule {rule!r} of {permission}", hint))
    elif not _METHOD.fullmatch(method) or path_spelled is None:
        hint = 'such as "POST /v1/emails" or "GET /v1/emails/{id}"'
        mistakes.append((f"rule {rule!r} of {permission}", hint))
    else:
        return method, path_spelled
    return None
