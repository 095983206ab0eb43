"""`/openapi.json`: OpenAPI 3.1, made from the very models that read bodies and write answers."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

import keylatch
from keylatch_sidecar import health, metrics
from keylatch_sidecar.api import audit, days, leaks, pagination, rotation, sendook, unsent, usage
from keylatch_sidecar.api.access import engine_of
from keylatch_sidecar.api.monitoring_access import operators_only
from keylatch_sidecar.api.schemas import JSON, REASON_PATTERN, Body
from keylatch_sidecar.forward_auth import ext_authz, verify

_CALLER_ERRORS: Final = (401, 403, 503)
_BODY_ERRORS: Final = (400, 413, 415)
_OPERATOR_ERRORS: Final = (400, *_CALLER_ERRORS)
_QUOTA_ERRORS: Final = (429,)


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    endpoint: Any
    response: type[BaseModel] | None
    body: type[BaseModel] | None = None
    is_array: bool = False
    errors: tuple[int, ...] = _CALLER_ERRORS
    error: type[BaseModel] | None = None
    query: tuple[tuple[str, str], ...] = ()
    header: tuple[tuple[str, str], ...] = ()
    status: int = 200
    has_receipt: bool = False
    """Whether it answers with a receipt, and right after the commit if that is preferred."""
    schemas: Mapping[str, Any] = field(default_factory=dict)
    """Of parameters that are not just any text, or not what `_SCHEMAS` says."""

    @property
    def is_paged(self) -> bool:
        return self.query[-2:] == PAGED


PAGED: Final = (
    ("limit", f"at most so many keys, from 1 to {pagination.MAX_LIMIT}; without it all of them"),
    ("cursor", "where to go on: from the `Link` header of the page before"),
)


_SCHEMAS: Final[Mapping[str, Any]] = {
    "id": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"},
    "limit": {"type": "integer", "minimum": 1, "maximum": pagination.MAX_LIMIT},
    "cursor": pagination.CURSOR_SCHEMAS[True],
    "reason": {"type": "string", "pattern": REASON_PATTERN},
    "key": {"type": "string", "pattern": "^[A-Za-z0-9_-]+$"},
    "before": {"type": "integer", "minimum": 1, "maximum": 2**53},
    "days": {"type": "integer", "minimum": 1, "maximum": days.MAX_USAGE_DAYS},
    "idle": {"type": "integer", "minimum": 1, "maximum": days.MAX_IDLE_DAYS},
    "descendants": {"type": "string", "enum": ["true", "false"]},
}
_OLDEST_FIRST: Final = {"cursor": pagination.CURSOR_SCHEMAS[False]}
_PREFER: Final = ("Prefer", "`respond-async`: answer with 202 right after the commit (RFC 7240)")
_DESCENDANTS: Final = (
    "descendants",
    "`true`: revoke what the key created as well, directly and indirectly; unsent's dialect tells"
    " in `revoked` how many keys that was",
)
_VERIFY_PARAMETERS: Final = (
    ("permission", "what the key must be allowed to do; repeated ones add up"),
    ("environment", "which environment the key must be for"),
)


class Refused(BaseModel):
    """Why `/verify` and `/ext_authz` say no."""

    error: str
    error_description: str


@operators_only
async def document(request: Request) -> Response:
    """This document."""
    return JSON(build(engine_of(request).settings.permissions))


OPERATIONS: Final[dict[str, dict[str, Operation]]] = {
    "/v1/api-keys": {
        "get": Operation(
            unsent.Keys.get,
            unsent.Key,
            is_array=True,
            errors=(400, *_CALLER_ERRORS),
            error=unsent.Error,
            query=(
                ("include", "`deleted`: show deleted keys as well"),
                ("idle", f"only keys not used for so many days, from 1 to {days.MAX_IDLE_DAYS}"),
                *PAGED,
            ),
        ),
        "post": Operation(
            unsent.Keys.post,
            unsent.CreatedKey,
            body=unsent.CreateKey,
            errors=(*_BODY_ERRORS, *_CALLER_ERRORS, *_QUOTA_ERRORS),
            error=unsent.Error,
        ),
    },
    "/v1/api-keys/{id}": {
        "get": Operation(
            unsent.OneKey.get, unsent.Key, errors=(400, 404, *_CALLER_ERRORS), error=unsent.Error
        ),
        "patch": Operation(
            unsent.OneKey.patch,
            unsent.Key,
            body=unsent.ChangeKey,
            errors=(404, *_BODY_ERRORS, *_CALLER_ERRORS, *_QUOTA_ERRORS),
            error=unsent.Error,
        ),
        "delete": Operation(
            unsent.OneKey.delete,
            unsent.Success,
            errors=(400, 404, *_CALLER_ERRORS),
            error=unsent.Error,
            has_receipt=True,
            query=(
                ("reason", "why, in up to 200 characters; it is kept with the key"),
                _DESCENDANTS,
            ),
        ),
    },
    "/v1/api-keys/{id}/usage": {
        "get": Operation(
            usage.OneKeyUsage.get,
            usage.KeyUsageReport,
            errors=(400, 404, *_CALLER_ERRORS),
            error=unsent.Error,
            query=(("days", f"how far back, from 1 to {days.MAX_USAGE_DAYS}; without it 30"),),
        ),
    },
    "/v1/api-keys/{id}/rotate": {
        "post": Operation(
            rotation.Rotation.post,
            unsent.CreatedKey,
            body=rotation.Rotate,
            errors=(404, *_BODY_ERRORS, *_CALLER_ERRORS, *_QUOTA_ERRORS),
            error=unsent.Error,
        )
    },
    **{
        f"/v1/api-keys/{{id}}/rotate/{word}": {
            "post": Operation(
                endpoint.post,
                unsent.Key,
                errors=(404, *_BODY_ERRORS, *_CALLER_ERRORS),
                error=unsent.Error,
            )
        }
        for word, endpoint in (
            ("cancel", rotation.CancelledRotation),
            ("finish", rotation.FinishedRotation),
        )
    },
    "/v1/api-keys/revoke-all": {
        "post": Operation(
            rotation.AllKeys.post,
            unsent.ManyRevoked,
            body=rotation.RevokeAll,
            errors=(*_BODY_ERRORS, *_CALLER_ERRORS),
            error=unsent.Error,
            has_receipt=True,
        )
    },
    "/v1/api-keys/self": {
        "delete": Operation(
            rotation.OwnKey.delete,
            unsent.Success,
            errors=(400, 401, 503),
            error=unsent.Error,
            has_receipt=True,
            query=(("reason", "why, in up to 200 characters; it is kept with the key"),),
        )
    },
    "/v1/audit": {
        "get": Operation(
            audit.Audit.get,
            audit.AuditEntry,
            is_array=True,
            errors=(400, 404, *_CALLER_ERRORS),
            error=unsent.Error,
            query=(
                ("key", "only what was done to this key"),
                ("limit", f"at most so many lines, from 1 to {pagination.MAX_LIMIT}"),
                ("before", "only lines before the one with this id"),
            ),
        )
    },
    "/v1/api_keys": {
        "get": Operation(
            sendook.Keys.get,
            sendook.Key,
            is_array=True,
            errors=(400, 401, 503),
            error=sendook.Error,
            query=PAGED,
            schemas=_OLDEST_FIRST,
        ),
        "post": Operation(
            sendook.Keys.post,
            sendook.CreatedKey,
            body=sendook.CreateKey,
            errors=(*_BODY_ERRORS, 401, 503, *_QUOTA_ERRORS),
            error=sendook.Error,
        ),
    },
    "/v1/api_keys/{id}": {
        "get": Operation(
            sendook.OneKey.get, sendook.Key, errors=(400, 401, 404, 503), error=sendook.Error
        ),
        "delete": Operation(
            sendook.OneKey.delete,
            sendook.Key,
            errors=(400, 401, 404, 503),
            error=sendook.Error,
            has_receipt=True,
            query=(_DESCENDANTS,),
        ),
    },
    "/leaked": {
        "post": Operation(
            leaks.Leaked.post,
            leaks.Accepted,
            body=leaks.Reported,
            errors=(*_BODY_ERRORS, 503),
            error=unsent.Error,
            status=202,
        ),
    },
    verify.PATH: {
        "get": Operation(
            verify.Verify,
            None,
            error=Refused,
            query=_VERIFY_PARAMETERS,
        ),
        "head": Operation(
            verify.Verify,
            None,
            query=_VERIFY_PARAMETERS,
        ),
    },
    f"{ext_authz.PATH}/{{path}}": {
        method: Operation(
            ext_authz.ExtAuthz,
            None,
            error=None if method == "head" else Refused,
            header=(
                ("X-Keylatch-Require", "what the key must be allowed to do; commas add up"),
                ("X-Keylatch-Require-Environment", "which environment the key must be for"),
            ),
        )
        for method in ("get", "head", "post", "put", "patch", "delete", "options", "trace")
    },
    "/healthz": {"get": Operation(health.healthz, health.Liveness, errors=())},
    "/readyz": {
        "get": Operation(health.readyz, health.Readiness, errors=(503,), error=health.Readiness)
    },
    "/metrics": {
        "get": Operation(metrics.metrics, None, errors=_OPERATOR_ERRORS, error=unsent.Error)
    },
    "/openapi.json": {
        "get": Operation(document, None, errors=_OPERATOR_ERRORS, error=unsent.Error)
    },
}


@cache
def build(grantable: tuple[str, ...]) -> dict[str, Any]:
    """The OpenAPI document of a sidecar that may give these permissions."""
    _, schemas = models_json_schema(
        [(model, "serialization") for model in _models()],
        ref_template="#/components/schemas/{model}",
    )
    content = {
        "openapi": "3.1.0",
        "info": {
            "title": "keylatch sidecar",
            "version": keylatch.__version__,
            "description": "Manages API keys in the dialects of unsent and Sendook, and answers"
            " reverse proxies.",
        },
        "paths": {
            path: {
                method: _operation(path, method, operation)
                for method, operation in operations.items()
            }
            for path, operations in OPERATIONS.items()
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas["$defs"],
        },
    }
    # Both dialects have a Key: pydantic tells them apart by the module's full name.
    text = json.dumps(content).replace("keylatch_sidecar__api__", "")
    document: dict[str, Any] = json.loads(re.sub(r"\b(unsent|sendook)__", r"\1.", text))
    for model in {model for model in _models() if issubclass(model, Body)}:
        described = document["components"]["schemas"][_name(model)]["properties"]
        if "permission" in described:
            described["permission"]["enum"] = list(grantable)
    return document


def _models() -> Iterator[type[BaseModel]]:
    for operations in OPERATIONS.values():
        for operation in operations.values():
            for model in (operation.response, operation.body, operation.error):
                if model is not None:
                    yield model
    yield sendook.FieldErrors


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{_name(model)}"}


def _name(model: type[BaseModel]) -> str:
    dialect = model.__module__.rpartition(".")[2]
    namesakes = [other for other in _models() if other.__name__ == model.__name__]
    ambiguous = any(other is not model for other in namesakes)
    return f"{dialect}.{model.__name__}" if ambiguous else model.__name__


def _operation(path: str, method: str, operation: Operation) -> dict[str, Any]:
    summary = inspect.getdoc(operation.endpoint) or ""
    headers = (*operation.header, *([_PREFER] if operation.has_receipt else []))
    described: dict[str, Any] = {
        "operationId": f"{method} {path}",
        "summary": summary.splitlines()[0],
        "responses": {str(operation.status): _success(operation)}
        | {str(status): _failure(operation, status) for status in operation.errors},
        "parameters": [
            {"name": name, "in": place, "description": text, "schema": _schema(operation, name)}
            for place, parameters in (("query", operation.query), ("header", headers))
            for name, text in parameters
        ],
    }
    if operation.has_receipt:
        described["responses"]["202"] = _success(operation)
    if 401 in operation.errors:
        described["security"] = [{"key": []}]
    for name in re.findall(r"{(\w+)}", path):
        described["parameters"].append(
            {"name": name, "in": "path", "required": True, "schema": _schema(operation, name)}
        )
    if operation.body is not None:
        described["requestBody"] = {
            "required": _is_body_required(operation.body),
            "content": {"application/json": {"schema": _reference(operation.body)}},
        }
    return described


def _is_body_required(body: type[BaseModel]) -> bool:
    """Whether a call says too little without one: an empty body counts as an empty object."""
    return not {"required", "minProperties", "anyOf"}.isdisjoint(body.model_json_schema())


def _schema(operation: Operation, parameter: str) -> Any:
    schema = operation.schemas.get(parameter) or _SCHEMAS.get(parameter)
    return schema or {"type": "string"}


def _success(operation: Operation) -> dict[str, Any]:
    if operation.response is None:
        return {"description": "Yes"}
    schema = _reference(operation.response)
    if operation.is_array:
        schema = {"type": "array", "items": schema}
    success: dict[str, Any] = {
        "description": "Done",
        "content": {"application/json": {"schema": schema}},
    }
    if operation.is_paged:
        success["headers"] = {"Link": {"description": _LINK, "schema": {"type": "string"}}}
    if operation.has_receipt:
        described = {"description": _REVOCATION, "schema": {"type": "string"}, "required": True}
        success["headers"] = {"X-Keylatch-Revocation": described}
    return success


def _failure(operation: Operation, status: int) -> dict[str, Any]:
    described: dict[str, Any] = {"description": _DESCRIPTIONS[status]}
    if operation.error is not None:
        schema = _reference(operation.error)
        if operation.error is sendook.Error and status == 400:
            schema = {"anyOf": [_reference(sendook.FieldErrors), schema]}
        described["content"] = {"application/json": {"schema": schema}}
    if status in _QUOTA_ERRORS:
        described["headers"] = {
            "Retry-After": {"description": _RETRY_AFTER, "schema": {"type": "integer"}}
        }
    return described


_LINK: Final = (
    'Of a page after which there is more: `<?limit=…&cursor=…>; rel="next"` (RFC 8288), relative to'
    " the URL that was asked"
)
_RETRY_AFTER: Final = "Seconds until there is room again; without it, waiting does not help"
_REVOCATION: Final = "How far the change has spread: a dictionary (RFC 9651)"
_DESCRIPTIONS: Final = {
    400: "The request is malformed",
    401: "There is no good key, or (Sendook's dialect) its permission does not suffice",
    403: "The key's permission does not suffice",
    404: "No such key in the caller's organisation",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The organisation has as many keys, or its keys made as many changes, as it may have",
    503: "This cannot be decided now; try again in a moment",
}
