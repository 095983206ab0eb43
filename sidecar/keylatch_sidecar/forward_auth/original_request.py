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
class OriginalRequest:
    """The request that a proxy asks about, as it came."""

    method: str
    uri: str


RequestSource = Callable[[Scope], OriginalRequest | None]
"""Reads the facts; None where the proxy does not send them, or sends them twice."""

NO_REQUEST: Final = OriginalRequest("", "")


def _from_headers(method: bytes, uri: bytes) -> RequestSource:
    def read(scope: Scope) -> OriginalRequest | None:
        methods, uris = [], []
        for name, value in scope["headers"]:
            if name == method:
                methods.append(value)
            elif name == uri:
                uris.append(value)
        if len(methods) != 1 or len(uris) != 1 or not methods[0] or not uris[0]:
            return None
        return OriginalRequest(methods[0].decode("latin-1"), uris[0].decode("latin-1"))

    return read


def _from_request_line(scope: Scope) -> OriginalRequest:
    return OriginalRequest(scope["method"], scope["path"].removeprefix("/ext_authz") or "/")


SOURCES: Final[dict[str, RequestSource]] = {
    "none": lambda scope: NO_REQUEST,
    "forwarded": _from_headers(b"x-forwarded-method", b"x-forwarded-uri"),
    "original": _from_headers(b"x-original-method", b"x-original-url"),
    "envoy": _from_request_line,
}
