"""What a proxy says of the request that it asks about: from one agreed place, never from another.

A sidecar that takes `X-Forwarded-Method`, else `X-Original-Method`, else the method, believes the
client behind every proxy that sends only one of them. So an operator names the profile of each
endpoint, and whatever is missing there is missing: the proxy is misconfigured, and nothing passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class Facts:
    """The request that a proxy asks about, as it came."""

    method: str
    uri: str


Profile = Callable[[Scope], Facts | None]
"""Reads the facts; None where the proxy does not send them, or sends them twice."""

NOTHING: Final = Facts("", "")


def _headers(method: bytes, uri: bytes) -> Profile:
    def read(scope: Scope) -> Facts | None:
        methods, uris = [], []
        for name, value in scope["headers"]:
            if name == method:
                methods.append(value)
            elif name == uri:
                uris.append(value)
        if len(methods) != 1 or len(uris) != 1 or not methods[0] or not uris[0]:
            return None
        return Facts(methods[0].decode("latin-1"), uris[0].decode("latin-1"))

    return read


def _request_line(scope: Scope) -> Facts:
    return Facts(scope["method"], scope["path"].removeprefix("/ext_authz") or "/")


PROFILES: Final[dict[str, Profile]] = {
    "none": lambda scope: NOTHING,
    "forwarded": _headers(b"x-forwarded-method", b"x-forwarded-uri"),
    "original": _headers(b"x-original-method", b"x-original-url"),
    "envoy": _request_line,
}
