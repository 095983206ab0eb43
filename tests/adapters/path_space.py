"""Request targets that a client can write, and what servers make of them.

The law of this file: everything comes from one seed, and no target is left out because a client
library would refuse it. A target is the path of a request line, still encoded, without a query.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote, unquote_to_bytes

from keylatch.core.decisions import FULL, ONLY_FULL, Requirement
from keylatch.core.rules import parse_public, parse_rules

PATHS: Final = (
    *("/healthz", "/secret", "/users/me", "/users/ada", "/docs/page", "/v1/batch"),
    *("/v1/emails/export", "/v1/emails/purge", "/v1/emails/7", "/v1/files/export"),
    *("/v1/files/a/b", "/alias/x/export", "/mounted/export", "/mounted/7", "/v1/files/x/secret"),
)
METHODS: Final = ("GET", "GET", "GET", "GET", "GET", "HEAD", "POST", "DELETE", "OPTIONS", "get")

_INSERTED: Final = (
    *("%0a", "%0A", "%0d%0a", "%00", "%09", "%1f", "%7f", "%c2%85", "%e2%80%a8", "%e2%80%8b"),
    *("/", "//", "/.", "/..", "/../", "/./", "%2f", "%2F", "%5c", "%2e%2e", "/%2e%2e/", ";x=1"),
    *("%25", "%252f", "%2500", "%ff", "%c0%af", "%c3", "%ed%a0%80", "%3f", "%23", "%3fx=1", "+"),
    *(".json", ".api", ".JSON", ".json/", ".xml", "%2ejson", "%20", "~", "'", "*", "@", ":", ","),
    *("export", "secret", "me", "/export", "/secret", "/me", "api", "/api", "/api/", "e%cc%81"),
)
_FORMS: Final = {  # NFKC makes the letter of each
    "e": "%ef%bd%85",
    "s": "%c5%bf",
    "k": "%e2%84%aa",
    "m": "%ef%bc%ad",
    "/": "%ef%bc%8f",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A client's request.

    Args:
        method: as it is written.
        path: encoded.
        root: the root path that the server, or the client of daphne, has it served under.
        is_prefixed: whether the server puts that before the path (uvicorn).
    """

    method: str
    path: str
    root: str = ""
    is_prefixed: bool = False


def targets(seed: int, count: int, rooted: bool = True, below: str = "") -> Iterator[Target]:
    """So many of them.

    Args:
        seed: the same targets for the same one.
        count: how many.
        rooted: whether to have root paths as well.
        below: what half of the paths begin with: the root path of a server.
    """
    chance = random.Random(seed)
    for _ in range(count):
        path = chance.choice(PATHS)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            path = chance.choice(_CHANGES)(chance, path)
        method = chance.choice(METHODS)
        if below and chance.random() < 0.5:
            path = below + path
        if chance.random() < 0.02:
            path = "http://test" + path  # the absolute form (RFC 9112 section 3.2.2)
        if rooted and chance.random() < 0.25:
            yield _under_a_root(chance, method, path)
        else:
            yield Target(method, path)


def _under_a_root(chance: random.Random, method: str, path: str) -> Target:
    root = chance.choice(("/api", "/api", "/v1", "/docs", path[: chance.randrange(len(path) + 1)]))
    root = unquote(root)
    place = chance.random()
    if place < 0.4:
        path = quote(root) + path
    elif place < 0.5:
        path = path + quote(root) + chance.choice(PATHS)
    return Target(method, path, root, chance.random() < 0.3)


def _insert(chance: random.Random, path: str) -> str:
    at = chance.choice((len(path), len(path), chance.randrange(1, len(path) + 1)))
    return path[:at] + chance.choice(_INSERTED) + path[at:]


def _encode(chance: random.Random, path: str) -> str:
    at = chance.randrange(1, len(path)) if len(path) > 1 else 0
    return f"{path[:at]}%{ord(path[at]):02x}{path[at + 1 :]}" if path[at].isascii() else path


def _change_case(chance: random.Random, path: str) -> str:
    at = chance.randrange(len(path))
    return chance.choice((path.upper(), path[:at] + path[at:].swapcase()))


def _change_form(chance: random.Random, path: str) -> str:
    letter = chance.choice([*_FORMS])
    return "/" + path[1:].replace(letter, _FORMS[letter], 1)


def _replace_segment(chance: random.Random, path: str) -> str:
    segments = path.split("/")
    segments[chance.randrange(len(segments))] = chance.choice(
        ("", ".", "..", "x", "export", "secret", "me", "7", "a.b")
    )
    return "/" + "/".join(segments).lstrip("/") if chance.random() < 0.8 else "/".join(segments)


def _double(chance: random.Random, path: str) -> str:
    return chance.choice(("/" + path, path.replace("/", "//", 1), path + "/", path + "//"))


_CHANGES: Final[tuple[Callable[[random.Random, str], str], ...]] = (
    *(_insert, _insert, _insert, _encode, _change_case, _change_form, _replace_segment, _double),
)


# What servers hand over


def scope_of(target: Target) -> dict[str, Any]:
    """The scope that ASGI servers make: uvicorn puts the root path first, others do not."""
    path = unquote(target.path)
    raw = target.path.encode()
    if target.is_prefixed:
        path, raw = target.root + path, quote(target.root).encode() + raw
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": target.method,
        "scheme": "http",
        "path": path,
        "raw_path": raw,
        "query_string": b"",
        "root_path": target.root,
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


def environ_of(target: Target) -> dict[str, Any]:
    """The environ that WSGI servers make."""
    return {
        "REQUEST_METHOD": target.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(target.path).decode("latin-1"),
        "QUERY_STRING": "",
        "REMOTE_ADDR": "127.0.0.1",
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "HTTP_HOST": "test",
        "wsgi.url_scheme": "http",
    }


# A twin


class TextPolicy:
    """The broken twin: the policy compares text and does not use routers."""

    public_patterns: tuple[()] = ()

    def __init__(self, public: Any = (), permissions: Any = None) -> None:
        rules = parse_rules(permissions or {}, None, [])
        self._exact = {(r.method, r.path): r.requirement for r in rules if "{" not in r.path}
        self._patterns = [(r.method, _regex(r.path), r.named) for r in rules if "{" in r.path]
        self._public = [_regex(path) for _, path in parse_public(public, [])]

    def requirement_for(self, method: str, path: str, *_: object) -> Requirement | None:
        if any(each.fullmatch(path) for each in self._public):
            return None
        method = "GET" if method == "HEAD" else method
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        matching = [
            named for on, regex, named in self._patterns if on == method and regex.fullmatch(path)
        ]
        permissions = frozenset({FULL}).union(*matching)
        return Requirement(permissions, "SENDING") if matching else ONLY_FULL

    def routed_requirement(self, method: str, path: str, *_: object) -> Requirement:
        requirement = self.requirement_for(method, path)
        return requirement or ONLY_FULL


def _regex(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"{\w+(:path)?}", lambda m: ".*" if m[1] else "[^/]+", path))
