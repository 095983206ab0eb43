"""`/verify`: for proxies whose sub-request has a fixed path. Raw ASGI, ahead of the router.

What the route asks of a key is in the query, which the proxy writes: `?permission=P`, repeatable.
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
        forward_auth: answers.
        source: where proxies say what they were asked.
    """

    def __init__(self, forward_auth: ForwardAuth, source: RequestSource) -> None:
        self._forward_auth = forward_auth
        self._source = source

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # No coroutine of its own: amid real requests each one costs a microsecond.
        if scope["method"] not in ("GET", "HEAD"):
            return refuse(_WRONG_METHOD, scope, receive, send)
        query = scope["query_string"]
        requirement = requirement_from_query(query) if query else ANY_KEY
        return self._forward_auth.respond(scope, receive, send, requirement, self._source)


def requirement_from_query(query: bytes) -> Requirement:
    """What `?permission=P&environment=E` asks for."""
    # A proxy may append its client's query: nobody shall fill the memory with long ones.
    return _parse_cached(query) if len(query) <= _MAX_CACHED_BYTES else _parse(query)


def _parse(query: bytes) -> Requirement:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    permissions = [value for name, value in pairs if name == "permission"]
    return all_of(permissions, [value for name, value in pairs if name == "environment"])


_parse_cached = lru_cache(maxsize=256)(_parse)
