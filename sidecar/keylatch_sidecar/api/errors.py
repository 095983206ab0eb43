"""Errors of the management API, independent of a dialect; each dialect renders them its own way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from keylatch.core.decisions import Deny, Reason
from keylatch.core.refusals import ANSWERS, Answer, challenge
from keylatch.core.tokens import redact_tokens

T = TypeVar("T")

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
    """An invalid field of a body, or an invalid query parameter."""

    path: str
    message: str
    value: Any = NOT_GIVEN
    location: str = "body"


class Problem(Exception):
    """A management request that is answered with an error.

    Args:
        status: the HTTP status.
        message: one sentence, for people.
        errors: the invalid fields and parameters, if any.
        headers: additional header fields of the response.
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
        self.errors = errors
        self.headers = dict(headers or {})


def invalid_input(errors: Sequence[InvalidInput]) -> Problem:
    """400, naming every invalid field or parameter."""
    message = "; ".join(f"{error.path}: {error.message}" for error in errors)
    return Problem(400, message, tuple(errors))


def refused(deny: Deny, realm: str) -> Problem:
    """The caller's key is missing, not accepted, or lacks the permission."""
    answer = ANSWERS[deny.reason]
    return Problem(answer.status, answer.description, headers=_headers(answer, realm, deny.scope))


def insufficient_scope(message: str, realm: str) -> Problem:
    """The caller would grant more rights than its own key has."""
    answer = ANSWERS[Reason.INSUFFICIENT_SCOPE]
    return Problem(answer.status, message, headers=_headers(answer, realm))


def quota_exceeded(message: str, retry_after_seconds: int | None) -> Problem:
    """The caller's organisation has reached a quota (RFC 6585 section 4); None: waiting does not
    help."""
    after = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return Problem(429, message, headers=after)


def unavailable() -> Problem:
    """The store or the hash queue does not answer; changes that were confirmed are stored."""
    return Problem(
        503,
        "The key store does not answer; try again in a moment",
        headers={"Retry-After": "1", "X-Keylatch-Error": "unavailable"},
    )


def no_such_key() -> Problem:
    """The same for unknown and malformed ids, and ids of another organisation's keys."""
    return Problem(404, "API key not found")


def found(value: T | None) -> T:
    """The value. Raises `no_such_key` if it is None."""
    if value is None:
        raise no_such_key()
    return value


def _headers(answer: Answer, realm: str, scope: str = "") -> dict[str, str]:
    headers = {"X-Keylatch-Error": answer.error}
    value = challenge(answer, realm, scope)
    if value is not None:
        headers["WWW-Authenticate"] = value
    if answer.status == 503:
        headers["Retry-After"] = "1"
    return headers
