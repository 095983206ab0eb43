"""The original request of a proxy's request, from one configured source and never from another.

A sidecar that tries `X-Forwarded-Method`, then `X-Original-Method`, then its own request's method
would trust the client behind every proxy that sets only one of them. So the operator configures the
source of each endpoint. If the source has no value, the proxy is misconfigured, and every request
is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class OriginalRequest:
    """The method and URI of the client's request, as the proxy received it."""

    method: str
    uri: str


RequestSource = Callable[[Scope], OriginalRequest | None]
"""Reads the original request; None if the proxy does not send it, or sends it twice."""

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
