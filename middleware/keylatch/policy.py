"""From a route to the permissions that suffice for it. Compiled once, looked up per request.

FULL may do everything. Any other permission may call only the routes named for it, and none
where none are named. A path named as it is counts before any with parameters, so naming it for
FULL closes it; of several with parameters, each counts. Paths match as a whole, never by prefix: a
prefix also opens the neighbours.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from starlette.routing import compile_path

from keylatch.errors import ConfigurationError
from keylatch.model import FULL, ONLY_FULL, Wanted
from keylatch.settings import PERMISSION_PATTERN

Mistakes = list[tuple[str, str]]

_METHOD: Final = re.compile(r"[A-Z]+")
# Flask and Django write <int:id> and <id>, Starlette, FastAPI and Litestar {id:int} and {id}.
_ANGLED: Final = re.compile(r"<(?:([a-z]+):)?([A-Za-z_]\w*)>")
_FLASK_NAMES: Final = {"string": "str"}
_UNFIT: Final = frozenset("*?# <>")


class Policy:
    """Which paths are public, and which permission may call which route.

    Args:
        public: paths that need no key.
        permissions: permission → rules of the form `"POST /v1/emails/{id}"`.
        grantable: the permissions that keys can have; None: any word.

    Raises:
        ConfigurationError: naming every malformed path and rule, and every unknown permission.
    """

    def __init__(
        self,
        public: Iterable[str] = (),
        permissions: Mapping[str, Iterable[str]] | None = None,
        grantable: Collection[str] | None = None,
    ) -> None:
        mistakes: Mistakes = []
        self._public, self._public_patterns = _public(public, mistakes)
        routes = _routes(permissions or {}, grantable, mistakes)
        if mistakes:
            raise ConfigurationError(mistakes)
        self._exact = {
            route: _sufficient(frozenset(named))
            for route, named in routes.items()
            if "{" not in route[1]
        }
        self._has_rules = bool(routes)
        self._patterns: dict[str, list[tuple[re.Pattern[str], set[str]]]] = {}
        for (method, path), named in routes.items():
            if "{" in path:
                self._patterns.setdefault(method, []).append((_pattern(path), named))

    def asked(self, method: str, path: str) -> Wanted | None:
        """What a request asks of a key; None where it needs none."""
        if path in self._public or (self._public_patterns and self.is_public(path)):
            return None
        return self.wanted(method, path) if self._has_rules else ONLY_FULL

    def is_public(self, path: str) -> bool:
        """Whether a path needs no key."""
        return path in self._public or any(p.fullmatch(path) for p in self._public_patterns)

    def wanted(self, method: str, path: str) -> Wanted:
        """What a request asks of its key. HEAD follows GET (RFC 9110 section 9.3.2)."""
        if method == "HEAD":
            method = "GET"
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        patterns = self._patterns.get(method)
        if patterns is None:
            return ONLY_FULL
        named = [permissions for pattern, permissions in patterns if pattern.fullmatch(path)]
        return _sufficient(frozenset().union(*named)) if named else ONLY_FULL


def path_of(scope: Mapping[str, Any]) -> str:
    """The path as the app's own router sees it: below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root:
        return path
    if path == root:
        return ""
    return path[len(root) :] if path.startswith(root + "/") else path


@functools.cache
def _sufficient(named: frozenset[str]) -> Wanted:
    return Wanted(named | {FULL}, " ".join(sorted(named)))


def _public(
    paths: Iterable[str], mistakes: Mistakes
) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    if isinstance(paths, str):
        mistakes.append((f"public={paths!r} is one string", f"write public=[{paths!r}]"))
        return frozenset(), ()
    exact, patterns = set(), []
    for path in paths:
        spelled = _spelled(path)
        if spelled is None or ":path}" in spelled:
            mistakes.append((f"public path {path!r}", "such as /healthz or /docs/{page}"))
        elif "{" in spelled:
            patterns.append(_pattern(spelled))
        else:
            exact.add(spelled)
    return frozenset(exact), tuple(patterns)


def _routes(
    permissions: Mapping[str, Iterable[str]], grantable: Collection[str] | None, mistakes: Mistakes
) -> dict[tuple[str, str], set[str]]:
    routes: dict[tuple[str, str], set[str]] = {}
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
            method, _, path = rule.partition(" ")
            spelled = _spelled(path)
            if method == "HEAD":  # taken for GET, it would open more than it names
                mistakes.append((f"rule {rule!r} of {permission}", "name GET: HEAD follows it"))
            elif not _METHOD.fullmatch(method) or spelled is None:
                hint = 'such as "POST /v1/emails" or "GET /v1/emails/{id}"'
                mistakes.append((f"rule {rule!r} of {permission}", hint))
            else:
                routes.setdefault((method, spelled), set()).add(permission)
    return routes


def _spelled(path: str) -> str | None:
    """The path with parameters spelled Starlette's way; None where it is no path."""

    def brace(match: re.Match[str]) -> str:
        kind = _FLASK_NAMES.get(match[1], match[1])
        return f"{{{match[2]}:{kind}}}" if kind else f"{{{match[2]}}}"

    spelled = _ANGLED.sub(brace, path)
    try:
        _, _, parameters = compile_path(spelled)
    except (AssertionError, ValueError):  # an unknown kind, or the same name twice
        return None
    literal = re.sub(r"{[A-Za-z_]\w*(:[a-z]+)?}", "", spelled)
    fits = path.startswith("/") and not _UNFIT.intersection(literal) and "{" not in literal
    return spelled if fits and "}" not in literal and parameters is not None else None


def _pattern(path: str) -> re.Pattern[str]:
    return compile_path(path)[0]
