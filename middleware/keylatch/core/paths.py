"""Paths as text: how rules spell them, which are unambiguous, and which are equivalent.

The law of this file: no request and no framework, only text. A path is decoded (RFC 3986 section
2.1) and relative to the place where the app is mounted.
"""

import re
import unicodedata
from collections import Counter
from itertools import zip_longest
from typing import Final

from starlette.convertors import CONVERTOR_TYPES
from starlette.routing import compile_path

# Flask and Django write <int:id> and <id>, Starlette, FastAPI and Litestar {id:int} and {id}.
_ANGLE_PARAMETER: Final = re.compile(r"<(?:([a-z]+):)?([A-Za-z_]\w*)>")
_BRACE_PARAMETER: Final = re.compile(r"{([A-Za-z_]\w*)(?::([a-z]+))?}")
_FLASK_CONVERTERS: Final = {"string": "str"}
_FORBIDDEN_CHARACTERS: Final = frozenset("*?# <>{}")

# Routers, servers and proxies interpret these differently: control characters (`$` of a regular
# expression also matches before a newline), backslashes, a percent sign after decoding, bytes that
# are not UTF-8, empty and dot segments.
_AMBIGUOUS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\%\ufffd\ud800-\udfff]|//|/\.\.?(?:[/;]|\Z)")
_SUFFIX: Final = re.compile(r"\.[^./]*\Z")
_PARAMETER: Final = re.compile(
    r"<(?:([A-Za-z_]\w*)(?:\(.*?\))?:)?[A-Za-z_]\w*>|{[A-Za-z_]\w*(?::([A-Za-z_]\w*))?}"
)
_NARROWING_CONVERTERS: Final = frozenset(("int", "float", "uuid"))
_SEGMENT_PARAMETER: Final = re.compile(r"{\w+(:(str|int|float|uuid))?}")


def to_starlette_path(path: str) -> str | None:
    """The path of a rule with parameters in Starlette's spelling; None: it is not a path."""
    braced = _ANGLE_PARAMETER.sub(_to_braces, path)
    parameters = _BRACE_PARAMETER.findall(braced)
    literal = _BRACE_PARAMETER.sub("", braced)
    names = Counter(name for name, _ in parameters)
    is_valid = (
        is_canonical(_BRACE_PARAMETER.sub("x", braced))
        and not _FORBIDDEN_CHARACTERS.intersection(literal)
        and all(kind in CONVERTOR_TYPES for _, kind in parameters if kind)
        and all(count == 1 for count in names.values())
    )
    return braced if is_valid else None


def _to_braces(match: re.Match[str]) -> str:
    converter = _FLASK_CONVERTERS.get(match[1], match[1])
    return f"{{{match[2]}:{converter}}}" if converter else f"{{{match[2]}}}"


def compile_pattern(path: str) -> re.Pattern[str]:
    """An expression for `fullmatch`; `path` as `to_starlette_path` returns it."""
    return compile_path(path)[0]


def is_canonical(path: str) -> bool:
    """Whether routers, servers and proxies all interpret the path in the same way."""
    return path[:1] == "/" and _AMBIGUOUS.search(path) is None


def has_unambiguous_root(path: str, root: str) -> bool:
    """Whether all frameworks remove the same root path: the path begins with it once, or does not
    contain it. Litestar removes everything up to its first occurrence; Quart also removes a prefix
    that ends within a segment; a proxy and a server may each have added it."""
    if not root.strip("/"):
        return True
    if path.startswith(root + "/"):
        rest = path[len(root) :]
        return rest != root and not rest.startswith(root + "/")
    return root not in path


def fold_path(path: str) -> str:
    """The same text for paths that an app may treat as equal: they differ only in letter case,
    Unicode form, a trailing slash, or a suffix such as `.json`."""
    folded = unicodedata.normalize("NFKC", path).casefold().rstrip("/")
    return _SUFFIX.sub("", folded)


def shape(path: str) -> str:
    """The path of a rule or a route without the names of its parameters, in any spelling. Two paths
    of the same shape match the same requests, for every converter that a rule can name."""
    return _PARAMETER.sub(_shape_parameter, path)


def _shape_parameter(match: re.Match[str]) -> str:
    converter = match[1] or match[2]
    return f"{{{converter}}}" if converter in _NARROWING_CONVERTERS else "{}"


def overlaps(one: str, other: str) -> bool:
    """Whether some path matches both rules; in doubt, yes."""
    for pair in zip_longest(one.split("/"), other.split("/")):
        if any("{" in _SEGMENT_PARAMETER.sub("", segment or "") for segment in pair):
            return True  # `path`, or an app's own converter: it may match slashes
        if not _segments_overlap(*pair):
            return False
    return True


def _segments_overlap(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return False
    if "{" in one and "{" in other:
        return True
    template, literal = (one, other) if "{" in one else (other, one)
    return compile_path("/" + template)[0].match("/" + literal) is not None
