"""`/verify`: for proxies whose sub-request has a fixed path. Raw ASGI, ahead of the router.

What the route asks of a key is in the query, which the proxy writes: `?permission=P`, repeatable.
"""

from collections.abc import Awaitable
from functools import lru_cache
from typing import Final
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from keylatch.asgi import refuse
from keylatch.model import ANY_KEY, Wanted
from keylatch.refusals import Refusal
from keylatch_sidecar.proxies.answers import Proxies, wanted_of
from keylatch_sidecar.proxies.facts import Profile

PATH: Final = "/verify"
_REMEMBERED_BYTES: Final = 256

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
        proxies: answers.
        profile: where proxies say what they were asked.
    """

    def __init__(self, proxies: Proxies, profile: Profile) -> None:
        self._proxies = proxies
        self._profile = profile

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # No coroutine of its own: amid real requests each one costs a microsecond.
        if scope["method"] not in ("GET", "HEAD"):
            return refuse(_WRONG_METHOD, scope, receive, send)
        query = scope["query_string"]
        wanted = wanted_by(query) if query else ANY_KEY
        return self._proxies.answer(scope, receive, send, wanted, self._profile)


def wanted_by(query: bytes) -> Wanted:
    """What `?permission=P&environment=E` asks for."""
    # A proxy may append its client's query: nobody shall fill the memory with long ones.
    return _remembered(query) if len(query) <= _REMEMBERED_BYTES else _read(query)


def _read(query: bytes) -> Wanted:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    permissions = [value for name, value in pairs if name == "permission"]
    return wanted_of(permissions, [value for name, value in pairs if name == "environment"])


_remembered = lru_cache(maxsize=256)(_read)
