"""Maps a reason to status, headers and body, for all adapters.

Many reasons have the same response: a client with an invalid token does not learn why it is
invalid (RFC 6750 section 3.1). 503 means that the key could not be checked; it is never a 401.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from keylatch.core.decisions import ClientGetter, Deny, Reason

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A complete response. Header names are in lower case."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """The response to a reason: status, error code and one sentence."""

    status: int
    error: str
    description: str
    challenge: str | None = None
    """The `error` attribute of the challenge; empty: without it; None: no challenge."""


_NO_CREDENTIAL: Final = Answer(
    401, "unauthorized", "Send an API key: Authorization: Bearer <key>", ""
)
_MALFORMED: Final = Answer(
    400,
    "invalid_request",
    "Send exactly one Authorization header of the form: Bearer <key>",
    "invalid_request",
)
_INVALID: Final = Answer(401, "invalid_token", "The API key is not valid", "invalid_token")
_INSUFFICIENT: Final = Answer(
    403, "insufficient_scope", "The API key may not do this", "insufficient_scope"
)
_UNAVAILABLE: Final = Answer(
    503, "unavailable", "The API key could not be checked; try again in a moment"
)

ANSWERS: Final = {
    Reason.MISSING: _NO_CREDENTIAL,
    Reason.MALFORMED: _MALFORMED,
    Reason.FORGED: _INVALID,
    Reason.UNKNOWN: _INVALID,
    Reason.WRONG_SECRET: _INVALID,
    Reason.REVOKED: _INVALID,
    Reason.DISABLED: _INVALID,
    Reason.ORGANIZATION_DISABLED: _INVALID,
    Reason.EXPIRED: _INVALID,
    Reason.WRONG_ENVIRONMENT: _INVALID,
    Reason.INSUFFICIENT_SCOPE: _INSUFFICIENT,
    Reason.UNAVAILABLE: _UNAVAILABLE,
    Reason.BUSY: _UNAVAILABLE,
}


def challenge(answer: Answer, realm: str, scope: str = "") -> str | None:
    """The value of `WWW-Authenticate` (RFC 6750 section 3); None: no challenge."""
    if answer.challenge is None:
        return None
    attributes = [f'realm="{realm}"']
    if answer.challenge:
        attributes.append(f'error="{answer.challenge}"')
    if scope:
        attributes.append(f'scope="{scope}"')
    return "Bearer " + ", ".join(attributes)


LogFailure = Callable[[Reason, ClientGetter], None]
"""Logs a refused request: the reason and the client."""


class Refusals:
    """Builds and caches refusals; the same reason and scope always give the same bytes.

    Args:
        realm: named in every challenge.
        malformed_status: 400 by RFC 6750; 401 behind proxies, because nginx's `auth_request`
            turns 400 into 500.
        log_failure: logs a refused request; None: refusals are not logged.
    """

    def __init__(
        self, realm: str, malformed_status: int = 400, log_failure: LogFailure | None = None
    ) -> None:
        self._realm = realm
        self._malformed_status = malformed_status
        self._log_failure = log_failure
        self.refusal_for = lru_cache(maxsize=256)(self._build)
        """The refusal for a `Deny`."""

    def refuse(self, deny: Deny, client: ClientGetter) -> Refusal:
        """The refusal for a `Deny`; also logs it, if refusals are logged."""
        if self._log_failure is not None:
            self._log_failure(deny.reason, client)
        return self.refusal_for(deny)

    def _build(self, deny: Deny) -> Refusal:
        answer = ANSWERS[deny.reason]
        body = json.dumps(
            {"error": answer.error, "error_description": answer.description},
            separators=(",", ":"),
        ).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"x-keylatch-error", answer.error.encode()),
        ]
        value = challenge(answer, self._realm, deny.scope)
        if value is not None:
            headers.append((b"www-authenticate", value.encode()))
        if answer.status == 503:
            headers.append((b"retry-after", b"1"))
        status = self._malformed_status if answer is _MALFORMED else answer.status
        return Refusal(status, tuple(headers), body)
