"""What can be wrong with a management call, in neutral words. Each profile spells it its way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from keylatch.core.decisions import Deny, Reason
from keylatch.core.refusals import ANSWERS, Answer, challenge
from keylatch.core.tokens import redact_tokens

NOT_GIVEN: Final = object()
"""The value of a field that was not sent."""

CODES: Final = {
    400: "BAD_REQUEST",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    409: "NOT_UNIQUE",
    413: "PAYLOAD_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "RATE_LIMITED",
    500: "INTERNAL_SERVER_ERROR",
    503: "UNAVAILABLE",
}


@dataclass(frozen=True, slots=True)
class InvalidInput:
    """One field of a body, or one parameter of a query, that cannot be accepted."""

    path: str
    message: str
    value: Any = NOT_GIVEN
    location: str = "body"


class Problem(Exception):
    """A management call that is answered with an error.

    Args:
        status: of HTTP.
        message: for people, in one sentence.
        errors: the fields at fault, where the body was wrong.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        errors: tuple[InvalidInput, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(redact_tokens(message))
        self.status = status
        self.code = CODES.get(status, "BAD_REQUEST")
        self.message = message
        self.faults = errors
        self.headers = dict(headers or {})


def refused(deny: Deny, realm: str) -> Problem:
    """A caller whose key does not open this door."""
    answer = ANSWERS[deny.reason]
    return Problem(answer.status, answer.description, headers=_headers(answer, realm, deny.scope))


def insufficient_scope(message: str, realm: str) -> Problem:
    """A caller who would hand out more rights than its own key has."""
    answer = ANSWERS[Reason.INSUFFICIENT_SCOPE]
    return Problem(answer.status, message, headers=_headers(answer, realm))


def quota_exceeded(message: str, retry_after_seconds: int | None) -> Problem:
    """A caller whose organisation has as much as it may have (RFC 6585 section 4). Without a number
    of seconds, waiting does not help."""
    after = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return Problem(429, message, headers=after)


def _headers(answer: Answer, realm: str, scope: str = "") -> dict[str, str]:
    headers = {"X-Keylatch-Error": answer.error}
    value = challenge(answer, realm, scope)
    if value is not None:
        headers["WWW-Authenticate"] = value
    if answer.status == 503:
        headers["Retry-After"] = "1"
    return headers


def unavailable() -> Problem:
    """Something behind keylatch does not answer; nothing that was answered is lost."""
    return Problem(
        503,
        "The key store does not answer; try again in a moment",
        headers={"Retry-After": "1", "X-Keylatch-Error": "unavailable"},
    )


def no_such_key() -> Problem:
    """Unknown, malformed and foreign ids look the same."""
    return Problem(404, "API key not found")
