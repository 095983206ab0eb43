"""Request bodies: read within bounds, parsed strictly, checked by models; and JSON answers.

Strict means: at most 16 KiB within 10 s, UTF-8, no name twice in an object (parsers disagree on
which one counts, and two layers that disagree can be played against each other), no unknown fields,
and nothing that an error could not quote: no number beyond a float, no nesting without end.
"""

import asyncio
import json
import math
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic.alias_generators import to_camel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from keylatch.core.decisions import KeyRecord
from keylatch.core.tokens import ENVIRONMENT_PATTERN, redact_tokens
from keylatch.core.validation import MAX_NAME_LENGTH, MAX_REASON_LENGTH
from keylatch_sidecar.api.errors import NOT_GIVEN, InvalidInput, Problem
from keylatch_sidecar.http_server.limits import BODY_SECONDS

MAX_BODY_BYTES: Final = 16 * 1024
_MAX_LEVELS: Final = 32  # no field of ours nests at all
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

M = TypeVar("M", bound="Body")


_ISO: Final = re.compile(r"\d{4}-\d\d-\d\dT")


def _only_iso(value: Any) -> Any:
    """Pydantic would also take seconds since the epoch, in digits too."""
    if value is not None and not (isinstance(value, str) and _ISO.match(value)):
        raise ValueError("must be an ISO 8601 time with an offset")
    return value


def _to_utc(instant: datetime) -> datetime:
    """Past the year 9999 there is no way to write it, and a list that holds it would fail."""
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999") from None


Instant = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_only_iso), AfterValidator(_to_utc)
]


def _to_integer(value: Any) -> Any:
    """JSON Schema takes 60.0 for an integer, because JSON has one kind of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_to_integer)]

# What `drafts` says of names and reasons, for clients made from the document: control characters,
# and whatever makes a text read as another one, have no place but (blanks only) around it.
_BLANK_CLASS: Final = (
    r"\t-\r\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
)
_FORBIDDEN_CLASS: Final = (
    r"\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
)


def _text_pattern(longest: int) -> str:
    end = f"[^{_BLANK_CLASS}{_FORBIDDEN_CLASS}]"
    return (
        f"^[{_BLANK_CLASS}]*{end}([^{_FORBIDDEN_CLASS}]{{0,{longest - 2}}}{end})?[{_BLANK_CLASS}]*$"
    )


NAME_PATTERN: Final = _text_pattern(MAX_NAME_LENGTH)
REASON_PATTERN: Final = _text_pattern(MAX_REASON_LENGTH)

# Checked by `drafts`, described here.
Name = Annotated[str, Field(json_schema_extra={"pattern": NAME_PATTERN})]
Reason = Annotated[str, Field(json_schema_extra={"pattern": REASON_PATTERN})]
Duration = Annotated[str, Field(json_schema_extra={"pattern": "^[1-9][0-9]{0,8}[smhdw]$"})]
Environment = Annotated[str, Field(json_schema_extra={"pattern": f"^{ENVIRONMENT_PATTERN}$"})]
Scalar = str | bool | int | float | None


class Body(BaseModel):
    """A request body: exact types, no unknown fields, names in camelCase."""

    model_config = ConfigDict(
        strict=True, extra="forbid", alias_generator=to_camel, hide_input_in_errors=True
    )


class ResponseBody(BaseModel):
    """An answer: names in camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class JSON(Response):
    """A JSON answer that is not kept by anybody on the way."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: dict[str, str] | None = None):
        super().__init__(content, status, {"Cache-Control": "no-store", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return encode_json(content)


def encode_json(content: Any) -> bytes:
    """JSON of a shape, of a list of shapes, or of what JSON knows."""
    if isinstance(content, ResponseBody):
        content = content.model_dump(by_alias=True)
    elif isinstance(content, list):
        content = [model.model_dump(by_alias=True) for model in content]
    # ASCII: an error may quote a lone surrogate, which has no UTF-8.
    return json.dumps(content, separators=(",", ":")).encode()


class ErrorJSON(JSON):
    """A JSON answer that may quote what was sent, but for tokens: who mistakes one for a name or a
    field must not find it in the logs of whoever is on the way."""

    def render(self, content: Any) -> bytes:
        return redact_tokens(super().render(content).decode()).encode()


async def read(request: Request, model: type[M]) -> M:
    """The request's body as a model; an empty body counts as an empty object.

    Raises:
        Problem: 408, 413, 415, or 400 with the fields at fault.
    """
    content = await read_json(request)
    if not isinstance(content, dict):
        raise Problem(400, "The body must be a JSON object")
    return validated(content, model)


async def read_json(request: Request) -> Any:
    """The request's body as JSON of whatever shape; an empty body counts as an empty object.

    Raises:
        Problem: 408, 413, 415, or 400.
    """
    return _parse(request, await _read_body(request))


def validated(content: dict[str, Any], model: type[M]) -> M:
    """What a JSON object says, as a model.

    Raises:
        Problem: 400, with the fields at fault.
    """
    names = {field.alias or name for name, field in model.model_fields.items()}
    # Unknown fields are told here, because pydantic's exception would quote their names.
    errors = [
        InvalidInput(name, "is no field of this body", value)
        for name, value in content.items()
        if name not in names
    ]
    given = {name: value for name, value in content.items() if name in names}
    try:
        validated = model.model_validate(given)
    except ValidationError as error:
        errors = [*_validation_errors(error, given), *errors]
    if errors:
        raise invalid_input(errors)
    return validated


def invalid_input(errors: Sequence[InvalidInput]) -> Problem:
    """A body whose fields are at fault."""
    message = "; ".join(f"{error.path}: {error.message}" for error in errors)
    return Problem(400, message, tuple(errors))


def iso(milliseconds: int) -> str:
    """ISO 8601, UTC, with milliseconds and `Z`, as both profiles write times."""
    instant = _EPOCH + timedelta(milliseconds=milliseconds)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def milliseconds_of(instant: datetime) -> int:
    """Milliseconds since the epoch."""
    return (instant - _EPOCH) // timedelta(milliseconds=1)


def common_fields(record: KeyRecord) -> dict[str, Any]:
    """What both profiles say of a key."""
    return {
        "id": record.id,
        "name": record.name,
        "organization_id": record.organization_id,
        "active": record.active,
        "created_at": iso(record.created_at),
        "updated_at": iso(record.updated_at),
    }


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise Problem(
                        413,
                        f"The body must not exceed {MAX_BODY_BYTES} bytes",
                        headers={"Connection": "close"},
                    )
    except TimeoutError:
        raise Problem(
            408, f"The body did not arrive in {BODY_SECONDS:g} s", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:  # no fault of ours: nobody hears the answer, and no trace is logged
        raise Problem(400, "The body ended early") from None
    return bytes(body)


def _parse(request: Request, body: bytes) -> Any:
    if not body:
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise Problem(415, "Send JSON: Content-Type: application/json")
    try:
        content = json.loads(
            body.decode(),
            object_pairs_hook=without_duplicates,
            parse_constant=_reject_constant,
            parse_float=_parse_finite,
        )
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Problem(415, "The body is not JSON") from None
    except (ValueError, RecursionError):
        raise _beyond_limits() from None
    if not _is_shallow(content):
        raise _beyond_limits()
    return content


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads`; a `Problem` where a name is there twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise invalid_input(
            [
                InvalidInput(name, "is there twice", content[name])
                for name in content
                if names.count(name) > 1
            ]
        )
    return content


def _reject_constant(name: str) -> Any:
    raise Problem(415, f"{name} is not JSON")


def _parse_finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999: JSON may hold it, but an answer could not quote it
        raise ValueError("beyond a float")
    return number


def _is_shallow(content: Any) -> bool:
    layer = [content]
    for _ in range(_MAX_LEVELS):
        layer = [inner for value in layer for inner in _children(value)]
    return not layer


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _beyond_limits() -> Problem:
    return Problem(400, "The body holds a number or a nesting beyond reason")


def _validation_errors(error: ValidationError, content: dict[str, Any]) -> list[InvalidInput]:
    errors = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        path = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        errors.append(InvalidInput(path, message, content.get(path, NOT_GIVEN)))
    return errors
