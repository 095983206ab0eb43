"""Public paths and rules, parsed once at start, and the requirements that views declare.

The law of this file: mistakes are collected and returned, never raised; no router is called.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from keylatch.core.decisions import PERMISSION_PATTERN, Requirement
from keylatch.core.paths import compile_pattern, fold_path, overlaps, shape, to_starlette_path

Mistakes = list[tuple[str, str]]


class _PseudoMethod(str):
    """A method that no request can have: it equals only itself, and no text."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


WEBSOCKET: Final = _PseudoMethod("WEBSOCKET")
"""In `public`, a WebSocket that needs no key. Rules name GET, the method of the handshake."""
ANY_METHOD: Final = "*"
"""The method of a mounted app, which has methods and paths of its own."""
_IMPLIED_BY_GET: Final = {"HEAD": "HEAD follows it", str(WEBSOCKET): "a WebSocket is opened by it"}
_REQUIREMENT_ATTRIBUTE: Final = "keylatch_requirement"
_METHOD: Final = re.compile(r"[A-Z]+")
_PATH_HINT: Final = "such as /healthz, /docs/{page} or POST /signup"


def declare(view: Callable[..., Any], requirement: Requirement) -> None:
    """Set the requirement of a view; `functools.wraps` copies it to decorated views."""
    setattr(view, _REQUIREMENT_ATTRIBUTE, requirement)


def required_by(view: object, method: str) -> Requirement | None:
    """The requirement that a view declares for a method; None: it declares nothing.

    The methods of a class-based view (`view_class`; `cls` and `actions` in Django REST framework)
    can declare as well. HEAD follows GET, as in `policy`.
    """
    name = "get" if method == "HEAD" else method.lower()
    name = getattr(view, "actions", {}).get(name, name)
    of_class = getattr(view, "view_class", None) or getattr(view, "cls", None)
    for owner in (view, getattr(of_class, name, None)):
        requirement = getattr(owner, _REQUIREMENT_ATTRIBUTE, None)
        if isinstance(requirement, Requirement):
            return requirement
    return None


class DeclaredRule(str):
    """A rule that was read from a view. It does not open views that declare nothing."""

    __slots__ = ()


class DeclaredRules(dict[str, Sequence[str]]):
    """Rules that were read from views.

    Args:
        rules: permission → rules, each a `DeclaredRule`.
        undeclared: the routes whose views declare nothing, in the spelling of rules.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]], undeclared: Sequence[str]) -> None:
        super().__init__(rules)
        self.undeclared = undeclared


class Rule:
    """A method and a path, and what they require of a key.

    Args:
        method: of requests.
        path: with parameters in Starlette's spelling.
        permissions: any one suffices; none: the rule is public.
        is_declared: whether the rule was only read from views.
    """

    def __init__(
        self, method: str, path: str, permissions: Iterable[str] = (), is_declared: bool = False
    ) -> None:
        self.method = method
        self.path = path
        self.named = frozenset(permissions)
        self.is_declared = is_declared
        self.requirement = Requirement.any_of(self.named)
        self.matches = compile_pattern(path).fullmatch
        self.shape = shape(path)
        self.folded_path = fold_path(path)


def rule_method(method: str) -> str:
    """The method by which rules match a request."""
    return "GET" if method in ("HEAD", WEBSOCKET) else method


def find_exposed_views(public: Iterable[Rule], undeclared: Iterable[str]) -> Mistakes:
    """The views that declare nothing and that a public path with parameters opens. A view whose
    own path is a public path is not included: the app has chosen that."""
    public = list(public)
    named_shapes = {(str(rule.method), rule.shape) for rule in public}
    routes = [each.partition(" ") for each in undeclared]
    return [
        (
            f"public path {rule.method} {rule.path} opens {method} {path}, which declares nothing",
            f'name "{method} {path}" in public as well, or declare a permission there',
        )
        for rule in public
        for method, _, path in routes
        if str(rule.method) == ("GET" if method == "HEAD" else method)
        if (str(rule.method), shape(path)) not in named_shapes
        and overlaps(rule.path, to_starlette_path(path) or path)
    ]


def find_exposed_heads(public: Iterable[Rule], undeclared: Collection[str]) -> Mistakes:
    """The views for HEAD that declare nothing and that a public path for GET opens, although
    another view declares a permission for GET there."""
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


def find_exposed_mounts(public: Iterable[Rule], undeclared: Iterable[str]) -> Mistakes:
    """The mounted apps of unknown frameworks that a public path with parameters opens without
    naming the mount path."""
    mounts = [each.removeprefix(f"{ANY_METHOD} ") for each in undeclared if each[0] == ANY_METHOD]
    return [
        (
            f"public path {rule.method} {rule.path} opens the app mounted at {mount_path}",
            "name the mount's path in it, or change it",
        )
        for mount_path in (mount.removesuffix("/{path:path}") for mount in mounts)
        for rule in public
        if not rule.path.startswith(f"{mount_path}/")
        and overlaps(rule.path, f"{mount_path}/{{path:path}}")
    ]


def parse_public(paths: Iterable[str], mistakes: Mistakes) -> list[tuple[str, str]]:
    """Methods and paths. Without a method, a path is for GET, which HEAD follows."""
    if isinstance(paths, str):
        mistakes.append((f"public={paths!r} is one string", f"write public=[{paths!r}]"))
        return []
    found = []
    for each in paths:
        method, path = each.split(" ", 1) if " " in each else ("GET", each)
        starlette_path = to_starlette_path(path)
        if method == "HEAD":
            mistakes.append((f"public path {each!r}", "name GET: HEAD follows it"))
        elif not _METHOD.fullmatch(method) or starlette_path is None or ":path}" in starlette_path:
            mistakes.append((f"public path {each!r}", _PATH_HINT))
        else:
            found.append((WEBSOCKET if method == str(WEBSOCKET) else method, starlette_path))
    return found


def permission_mistakes(permission: str, grantable: Collection[str] | None = None) -> Mistakes:
    """What is wrong with a permission that a rule or a view names."""
    if not re.fullmatch(PERMISSION_PATTERN, permission):
        return [(f"permission {permission!r}", f"a word matching {PERMISSION_PATTERN}")]
    if grantable is not None and permission not in grantable:
        problem = f"is none of KEYLATCH_PERMISSIONS ({', '.join(grantable)})"
        return [(f"permission {permission!r} {problem}", "add it there, or correct it")]
    return []


def parse_rules(
    permissions: Mapping[str, Iterable[str]], grantable: Collection[str] | None, mistakes: Mistakes
) -> list[Rule]:
    permissions_by_route: dict[tuple[str, str], set[str]] = {}
    configured: set[tuple[str, str]] = set()
    for permission, rules in permissions.items():
        mistakes += permission_mistakes(permission, grantable)
        if isinstance(rules, str):
            mistakes.append((f"the rules of {permission} are one string", f"write [{rules!r}]"))
            continue
        for rule in rules:
            route = _parse_rule(rule, permission, mistakes)
            if route is not None:
                permissions_by_route.setdefault(route, set()).add(permission)
                if not isinstance(rule, DeclaredRule):
                    configured.add(route)
    return [
        Rule(*route, permissions_by_route[route], route not in configured)
        for route in permissions_by_route
    ]


def _parse_rule(rule: str, permission: str, mistakes: Mistakes) -> tuple[str, str] | None:
    method, _, path = rule.partition(" ")
    starlette_path = to_starlette_path(path)
    if method in _IMPLIED_BY_GET:  # read as GET, it would open more than it names
        hint = f"name GET: {_IMPLIED_BY_GET[method]}"
        mistakes.append((f"rule {rule!r} of {permission}", hint))
    elif not _METHOD.fullmatch(method) or starlette_path is None:
        hint = 'such as "POST /v1/emails" or "GET /v1/emails/{id}"'
        mistakes.append((f"rule {rule!r} of {permission}", hint))
    else:
        return method, starlette_path
    return None
