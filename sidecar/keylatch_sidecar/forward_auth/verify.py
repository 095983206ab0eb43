"""`/verify`: for reverse proxies whose sub-request has a fixed path. Raw ASGI, before the router.

The requirement is in the query, which the proxy sets: `?permission=P`, repeatable, and
`?environment=E`.
"""

from collections.abc import Awaitable
from functools import lru_cache
from typing import Final
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from keylatch.asgi import refuse
from keylatch.core.decisions import ANY_KEY, Requirement
from keylatch.core.refusals import Refusal
from keylatch_sidecar.forward_auth.decision import ForwardAuth, all_of
from keylatch_sidecar.forward_auth.original_request import RequestSource

PATH: Final = "/verify"
_MAX_CACHED_BYTES: Final = 256

_WRONG_METHOD_BODY: Final = b'{"error":"method_not_allowed","error_description":"GET or HEAD"}'
_WRONG_METHOD: Final = Refusal(
    405,
    (
        (b"allow", b"GET, HEAD"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_WRONG_METHOD_BODY)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-keylatch-error", b"method_not_allowed"),
    ),
    _WRONG_METHOD_BODY,
)


class Verify:
    """The endpoint.

    Args:
        forward_auth: answers the proxy.
        source: reads the original request.
    """

    def __init__(self, forward_auth: ForwardAuth, source: RequestSource) -> None:
        self._forward_auth = forward_auth
        self._source = source

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # Not a coroutine: under load each coroutine costs a microsecond.
        if scope["method"] not in ("GET", "HEAD"):
            return refuse(_WRONG_METHOD, scope, receive, send)
        query = scope["query_string"]
        requirement = requirement_from_query(query) if query else ANY_KEY
        return self._forward_auth.respond(scope, receive, send, requirement, self._source)


def requirement_from_query(query: bytes) -> Requirement:
    """The requirement of `?permission=P&environment=E`."""
    # A proxy may append its client's query: long ones must not fill the memory.
    return _parse_cached(query) if len(query) <= _MAX_CACHED_BYTES else _parse(query)


def _parse(query: bytes) -> Requirement:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    permissions = [value for name, value in pairs if name == "permission"]
    return all_of(permissions, [value for name, value in pairs if name == "environment"])


_parse_cached = lru_cache(maxsize=256)(_parse)
