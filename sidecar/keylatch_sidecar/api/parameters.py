"""Parameters of management requests: the key id in the path, query parameters, and `Prefer`.

A query parameter that is malformed or repeated is answered with 400, which names all that are.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from starlette.requests import Request

from keylatch.storage.usage import RETENTION_DAYS
from keylatch_sidecar.api.errors import InvalidInput, invalid_input, no_such_key

MAX_LIMIT: Final = 1_000
MAX_USAGE_DAYS: Final = RETENTION_DAYS
MAX_IDLE_DAYS: Final = 9_999
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGITS: Final = re.compile(r"[0-9]{1,18}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parameter(Generic[T]):
    """A query parameter.

    Args:
        name: in the query.
        parse: from its text to its value; None: the text is invalid.
        message: what the text must be.
        schema: the same for the OpenAPI document.
    """

    name: str
    parse: Callable[[str], T | None]
    message: str
    schema: Mapping[str, Any]


def _integer(name: str, largest: int, kind: str = "number") -> Parameter[int]:
    def parse(text: str) -> int | None:
        value = int(text) if _DIGITS.fullmatch(text) else 0
        return value if 1 <= value <= largest else None

    schema = {"type": "integer", "minimum": 1, "maximum": largest}
    return Parameter(name, parse, f"must be a {kind} from 1 to {largest}", schema)


LIMIT: Final = _integer("limit", MAX_LIMIT)
BEFORE: Final = _integer("before", 2**53)
USAGE_DAYS: Final = _integer("days", MAX_USAGE_DAYS, "number of days")
IDLE_DAYS: Final = _integer("idle", MAX_IDLE_DAYS, "number of days")
DESCENDANTS: Final[Parameter[bool]] = Parameter(
    "descendants",
    {"true": True, "false": False}.get,
    "must be true or false",
    {"type": "string", "enum": ["true", "false"]},
)


def read(request: Request, parameter: Parameter[T]) -> T | None:
    """The value of a query parameter; None: not given. Raises as `read_all` does."""
    [value] = read_all(request, parameter)
    return value


def read_all(request: Request, *parameters: Parameter[T]) -> list[T | None]:
    """The values of query parameters; None: not given.

    Raises:
        Problem: 400, at least one is malformed or repeated.
    """
    values, errors = [], []
    for parameter in parameters:
        given = request.query_params.getlist(parameter.name)
        value = parameter.parse(given[0]) if len(given) == 1 else None
        if given and value is None:
            errors.append(InvalidInput(parameter.name, parameter.message, given[-1], "query"))
        values.append(value)
    if errors:
        raise invalid_input(errors)
    return values


def key_id(request: Request) -> str:
    """The key id in the path. Raises as `validated_id` does."""
    return validated_id(request.path_params["id"])


def validated_id(text: str) -> str:
    """A key id.

    Raises:
        Problem: 404, no key has such an id. PostgreSQL rejects a NUL in a text, which would be
            answered with 503 instead.
    """
    if not _ID.fullmatch(text):
        raise no_such_key()
    return text


def waits_for_propagation(request: Request) -> bool:
    """Whether the response is sent after the propagation, which is the default, or right after the
    commit: `Prefer: respond-async` (RFC 7240 section 4.1)."""
    preferences = ",".join(request.headers.getlist("prefer"))
    words = (re.split(r"[;=]", part)[0].strip().lower() for part in preferences.split(","))
    return "respond-async" not in words
