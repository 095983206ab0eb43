"""One operation of the OpenAPI document: a method of a path, with its parameters and responses."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel

from keylatch_sidecar.api import parameters, sendook
from keylatch_sidecar.api.pagination import CURSORS
from keylatch_sidecar.api.parameters import Parameter
from keylatch_sidecar.api.schemas import REASON_PATTERN

CALLER_ERRORS: Final = (401, 403, 503)
BODY_ERRORS: Final = (400, 413, 415)
OPERATOR_ERRORS: Final = (400, *CALLER_ERRORS)
QUOTA_ERRORS: Final = (429,)

PAGED: Final = (
    ("limit", f"the keys of a page, from 1 to {parameters.MAX_LIMIT}; by default all keys"),
    ("cursor", "the start of the page: from the `Link` header of the previous page"),
)
_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"}
_PARAMETERS: Final[tuple[Parameter[Any], ...]] = (
    parameters.LIMIT,
    parameters.BEFORE,
    parameters.USAGE_DAYS,
    parameters.IDLE_DAYS,
    parameters.DESCENDANTS,
    CURSORS[True],
)
_SCHEMAS: Final[Mapping[str, Any]] = {
    "id": _ID,
    "key": _ID,
    "reason": {"type": "string", "pattern": REASON_PATTERN},
    **{parameter.name: parameter.schema for parameter in _PARAMETERS},
}
_TEXT: Final = {"type": "string"}
_PREFER: Final = ("Prefer", "`respond-async`: answer with 202 right after the commit (RFC 7240)")
_LINK: Final = (
    'Of a page that has a next one: `<?limit=…&cursor=…>; rel="next"` (RFC 8288), relative to'
    " the URL of the request"
)
_RETRY_AFTER: Final = "Seconds until the quota has room again; without it, waiting does not help"
_REVOCATION: Final = "How far the change has propagated: a dictionary (RFC 9651)"
_DESCRIPTIONS: Final = {
    400: "The request is malformed",
    401: "The key is missing or not accepted, or (Sendook's dialect) lacks the permission",
    403: "The key lacks the permission",
    404: "No such key in the caller's organisation",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The organisation has reached its quota of keys, or of changes by its keys",
    503: "The key cannot be checked now; try again in a moment",
}

Reference = Callable[[type[BaseModel]], dict[str, Any]]
"""From a model to a reference to its schema."""


@dataclass(frozen=True)
class Operation:
    """A method of a path.

    Args:
        endpoint: its docstring is the summary.
        response: the model of the response body; None: no body.
        body: the model of the request body; None: no body.
        is_array: whether the response is an array of `response`.
        errors: status codes.
        error: the model of their bodies; None: no body.
        query: names and descriptions of query parameters.
        header: names and descriptions of header parameters.
        status: the status code of success.
        has_receipt: whether the response has a receipt, and `Prefer: respond-async` is supported.
        schemas: of parameters, instead of the common schema for the name.
    """

    endpoint: Any
    response: type[BaseModel] | None
    body: type[BaseModel] | None = None
    is_array: bool = False
    errors: tuple[int, ...] = CALLER_ERRORS
    error: type[BaseModel] | None = None
    query: tuple[tuple[str, str], ...] = ()
    header: tuple[tuple[str, str], ...] = ()
    status: int = 200
    has_receipt: bool = False
    schemas: Mapping[str, Any] = field(default_factory=dict)


def describe(path: str, method: str, operation: Operation, reference: Reference) -> dict[str, Any]:
    """The Operation Object of OpenAPI 3.1."""
    summary = inspect.getdoc(operation.endpoint) or ""
    described: dict[str, Any] = {
        "operationId": f"{method} {path}",
        "summary": summary.splitlines()[0],
        "responses": _responses(operation, reference),
        "parameters": _parameters(path, operation),
    }
    if 401 in operation.errors:
        described["security"] = [{"key": []}]
    if operation.body is not None:
        described["requestBody"] = {
            "required": _is_body_required(operation.body),
            "content": {"application/json": {"schema": reference(operation.body)}},
        }
    return described


def _parameters(path: str, operation: Operation) -> list[dict[str, Any]]:
    headers = (*operation.header, *([_PREFER] if operation.has_receipt else []))
    schemas = {**_SCHEMAS, **operation.schemas}
    optional = [
        {"name": name, "in": place, "description": text, "schema": schemas.get(name, _TEXT)}
        for place, described in (("query", operation.query), ("header", headers))
        for name, text in described
    ]
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": schemas.get(name, _TEXT)}
        for name in re.findall(r"{(\w+)}", path)
    ]
    return optional + in_path


def _is_body_required(body: type[BaseModel]) -> bool:
    """Whether the model rejects an empty object, which an empty body is."""
    return not {"required", "minProperties", "anyOf"}.isdisjoint(body.model_json_schema())


def _responses(operation: Operation, reference: Reference) -> dict[str, Any]:
    success = _success(operation, reference)
    responses = {str(operation.status): success}
    for status in operation.errors:
        responses[str(status)] = _failure(operation, status, reference)
    return responses | ({"202": success} if operation.has_receipt else {})


def _success(operation: Operation, reference: Reference) -> dict[str, Any]:
    if operation.response is None:
        return {"description": "Allowed"}
    schema = reference(operation.response)
    if operation.is_array:
        schema = {"type": "array", "items": schema}
    success: dict[str, Any] = {
        "description": "Done",
        "content": {"application/json": {"schema": schema}},
    }
    if operation.query[-2:] == PAGED:
        success["headers"] = {"Link": {"description": _LINK, "schema": _TEXT}}
    if operation.has_receipt:
        described = {"description": _REVOCATION, "schema": _TEXT, "required": True}
        success["headers"] = {"X-Keylatch-Revocation": described}
    return success


def _failure(operation: Operation, status: int, reference: Reference) -> dict[str, Any]:
    described: dict[str, Any] = {"description": _DESCRIPTIONS[status]}
    if operation.error is not None:
        schema = reference(operation.error)
        if operation.error is sendook.Error and status == 400:
            schema = {"anyOf": [reference(sendook.FieldErrors), schema]}
        described["content"] = {"application/json": {"schema": schema}}
    if status in QUOTA_ERRORS:
        described["headers"] = {
            "Retry-After": {"description": _RETRY_AFTER, "schema": {"type": "integer"}}
        }
    return described
