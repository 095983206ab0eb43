"""Answers to requests that no app gets to see, because they cannot be read or come too slowly."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Final


@dataclass(frozen=True, slots=True)
class Rejection:
    """A complete answer, after which the connection ends.

    Args:
        status: of HTTP.
        wire: the answer's bytes.
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
