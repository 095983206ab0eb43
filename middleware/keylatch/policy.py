"""From a route to the permissions that suffice for it. Compiled once, looked up per request.

FULL may do everything. Any other permission may call only the routes named for it, and none
where none are named. Paths match exactly, never by prefix: a prefix also opens the neighbours.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from keylatch.errors import ConfigurationError
from keylatch.model import FULL, ONLY_FULL, Wanted
from keylatch.settings import PERMISSION_PATTERN

_METHOD: Final = re.compile(r"[A-Z]+")


class Policy:
    """Which paths are public, and which permission may call which route.

    Args:
        public: exact paths that need no key.
        permissions: permission → rules of the form `"POST /v1/emails"`.

    Raises:
        ConfigurationError: naming every malformed rule.
    """

    def __init__(
        self,
        public: Iterable[str] = (),
        permissions: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        mistakes: list[tuple[str, str]] = []
        self._public = frozenset(_paths(public, mistakes))
        routes = _routes(permissions or {}, mistakes)
        if mistakes:
            raise ConfigurationError(mistakes)
        self._wanted = {
            route: Wanted(frozenset(named) | {FULL}, " ".join(sorted(named)))
            for route, named in routes.items()
        }

    def is_public(self, path: str) -> bool:
        """Whether a path needs no key."""
        return path in self._public

    def wanted(self, method: str, path: str) -> Wanted:
        """What a request asks of a key. HEAD follows GET (RFC 9110 section 9.3.2)."""
        return self._wanted.get(("GET" if method == "HEAD" else method, path), ONLY_FULL)


def path_of(scope: Mapping[str, Any]) -> str:
    """The path as the app's own router sees it: below the place where the app is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path == root:
        return ""
    if root and path.startswith(root + "/"):
        return path[len(root) :]
    return path


def _paths(paths: Iterable[str], mistakes: list[tuple[str, str]]) -> list[str]:
    if isinstance(paths, str):
        mistakes.append((f"public={paths!r} is one string", f"write public=[{paths!r}]"))
        return []
    paths = list(paths)
    mistakes += [
        (f"public path {path!r}", "an exact path, such as /healthz, without patterns")
        for path in paths
        if not _is_exact(path)
    ]
    return paths


def _routes(
    permissions: Mapping[str, Iterable[str]], mistakes: list[tuple[str, str]]
) -> dict[tuple[str, str], set[str]]:
    routes: dict[tuple[str, str], set[str]] = {}
    for permission, rules in permissions.items():
        if not re.fullmatch(PERMISSION_PATTERN, permission):
            mistakes.append((f"permission {permission!r}", f"a word matching {PERMISSION_PATTERN}"))
        if isinstance(rules, str):
            mistakes.append((f"the rules of {permission} are one string", f"write [{rules!r}]"))
            continue
        for rule in rules:
            method, _, path = rule.partition(" ")
            if method == "HEAD":  # taken for GET, it would open more than it names
                mistakes.append((f"rule {rule!r} of {permission}", "name GET: HEAD follows it"))
            elif not _METHOD.fullmatch(method) or not _is_exact(path):
                mistakes.append((f"rule {rule!r} of {permission}", 'such as "POST /v1/emails"'))
            routes.setdefault((method, path), set()).add(permission)
    return routes


def _is_exact(path: str) -> bool:
    return path.startswith("/") and not any(sign in path for sign in "*{}?# ")
