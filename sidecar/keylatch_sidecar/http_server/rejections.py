"""Responses to requests that never reach the app: malformed, too large or too slow."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final


@dataclass(frozen=True, slots=True)
class Rejection:
    """A complete response, after which the connection is closed.

    Args:
        status: the HTTP status.
        wire: all bytes of the response.
    """

    status: int
    wire: bytes


def _rejection(status: HTTPStatus, error: str, description: str) -> Rejection:
    body = f'{{"error":"{error}","error_description":"{description}"}}'
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "cache-control: no-store",
        "connection: close",
    )
    return Rejection(status.value, "\r\n".join((*head, "", body)).encode())


INVALID: Final = _rejection(
    HTTPStatus.BAD_REQUEST, "invalid_request", "Invalid HTTP request received."
)
TOO_SLOW: Final = _rejection(
    HTTPStatus.REQUEST_TIMEOUT, "request_timeout", "The request did not arrive in time"
)
TOO_LARGE: Final = _rejection(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "request_header_fields_too_large",
    "The request line and the header fields are too large",
)
