"""Models of request and response bodies: what both dialects and keylatch's extensions share."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from starlette.responses import Response

from keylatch.core.decisions import KeyRecord
from keylatch.core.tokens import ENVIRONMENT_PATTERN, redact_tokens
from keylatch.core.validation import MAX_NAME_LENGTH, MAX_REASON_LENGTH

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ISO: Final = re.compile(r"\d{4}-\d\d-\d\dT")


def _only_iso(value: Any) -> Any:
    """Rejects seconds since the epoch, which pydantic accepts, also as a string of digits."""
    if value is not None and not (isinstance(value, str) and _ISO.match(value)):
        raise ValueError("must be an ISO 8601 time with an offset")
    return value


def _to_utc(instant: datetime) -> datetime:
    """Rejects times that are after the year 9999 in UTC: a response could not represent them."""
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        raise ValueError("must lie between the years 1 and 9999") from None


Instant = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_only_iso), AfterValidator(_to_utc)
]


def _to_integer(value: Any) -> Any:
    """60.0 is an integer for JSON Schema, because JSON has one type of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_to_integer)]

# The rules of `keylatch.core.validation` for names and reasons, for clients that are generated from
# the OpenAPI document: no control and formatting characters, except white space at the ends.
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

# Patterns for the OpenAPI document only: `keylatch.core.validation` checks the values.
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
    """A response body: names in camelCase."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class JSON(Response):
    """A JSON response that no cache stores."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: dict[str, str] | None = None):
        super().__init__(content, status, {"Cache-Control": "no-store", **(headers or {})})

    def render(self, content: Any) -> bytes:
        return encode_json(content)


class ErrorJSON(JSON):
    """A JSON response that may quote the request, with tokens redacted: a client may send a token
    as a name or a field by mistake, and proxies may log responses."""

    def render(self, content: Any) -> bytes:
        return redact_tokens(super().render(content).decode()).encode()


def encode_json(content: Any) -> bytes:
    """JSON of a model, of a list of models, or of any JSON value."""
    if isinstance(content, ResponseBody):
        content = content.model_dump(by_alias=True)
    elif isinstance(content, list):
        content = [model.model_dump(by_alias=True) for model in content]
    # ASCII: an error may quote a lone surrogate, which UTF-8 cannot encode.
    return json.dumps(content, separators=(",", ":")).encode()


def common_fields(record: KeyRecord) -> dict[str, Any]:
    """The fields of a key that both dialects have."""
    return {
        "id": record.id,
        "name": record.name,
        "organization_id": record.organization_id,
        "active": record.active,
        "created_at": iso(record.created_at),
        "updated_at": iso(record.updated_at),
    }


def iso(milliseconds: int) -> str:
    """ISO 8601 in UTC with milliseconds and `Z`, from milliseconds since the epoch."""
    instant = _EPOCH + timedelta(milliseconds=milliseconds)
    return instant.isoformat(timespec="milliseconds").replace("+00:00", "Z")
