"""`/verify`: a proxy asks whether a request may pass. Raw ASGI, ahead of the router.

An allow is `200` with an empty body and every identity header, every time: a proxy that copies
only what it gets would otherwise let the client's own copy through. Permissions can only add up,
because some proxies append the client's query to ours. A malformed credential is 401 and not 400,
because nginx's `auth_request` turns 400 into 500.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import parse_qsl, quote

from starlette.types import Receive, Scope, Send

from keylatch.asgi import refuse
from keylatch.engine import Engine
from keylatch.model import ONLY_FULL, Deny, Principal, Wanted
from keylatch.refusals import Header, Refusal, Refusals
from keylatch.settings import PERMISSION_PATTERN

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
        engine: judges the tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._refusals = Refusals(engine.settings.realm, malformed_status=401)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await refuse(_WRONG_METHOD, scope, receive, send)
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        verdict = await self._engine.check(values, wanted_by(scope["query_string"]))
        if isinstance(verdict, Deny):
            await refuse(self._refusals.of(verdict), scope, receive, send)
            return
        headers = identity_headers(verdict.principal)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def wanted_by(query: bytes) -> Wanted:
    """What `?permission=P` asks for."""
    # A proxy may append its client's query: nobody shall fill the memory with long ones.
    return _remembered(query) if len(query) <= _REMEMBERED_BYTES else _read(query)


def _read(query: bytes) -> Wanted:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return wanted_of([value for name, value in pairs if name == "permission"])


_remembered = lru_cache(maxsize=256)(_read)


def wanted_of(permissions: Sequence[str]) -> Wanted:
    """Permissions add up, and a malformed one leaves only FULL.

    An empty one is malformed: it is what a proxy sends whose variable was never set.
    """
    if all(re.fullmatch(PERMISSION_PATTERN, permission) for permission in permissions):
        return Wanted.all_of(permissions)
    return ONLY_FULL


def identity_headers(principal: Principal) -> list[Header]:
    """All headers of an allow: names in lower case, values in ASCII, the name percent-encoded."""
    return [
        (b"content-length", b"0"),
        (b"cache-control", b"no-store"),
        (b"x-keylatch-key-id", principal.key_id.encode()),
        (b"x-keylatch-key-name", quote(principal.key_name, safe="").encode()),
        (b"x-keylatch-organization-id", principal.organization_id.encode()),
        (b"x-keylatch-permission", principal.permission.encode()),
        (b"x-keylatch-environment", principal.environment.encode()),
    ]
