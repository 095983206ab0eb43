"""All operations of the sidecar, and `/openapi.json`, which serves them as an OpenAPI document."""

from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from keylatch_sidecar import health, metrics
from keylatch_sidecar.api import audit, leaks, parameters, rotation, sendook, unsent, usage
from keylatch_sidecar.api.access import engine_of
from keylatch_sidecar.api.monitoring_access import operators_only
from keylatch_sidecar.api.pagination import CURSORS
from keylatch_sidecar.api.schemas import JSON
from keylatch_sidecar.forward_auth import ext_authz, verify
from keylatch_sidecar.openapi.document import build
from keylatch_sidecar.openapi.operation import (
    BODY_ERRORS,
    CALLER_ERRORS,
    OPERATOR_ERRORS,
    PAGED,
    QUOTA_ERRORS,
    Operation,
)

_REASON: Final = ("reason", "why, in up to 200 characters; stored with the key")
_DESCENDANTS: Final = (
    "descendants",
    "`true`: revoke the keys that the key created too, directly or indirectly; in unsent's dialect,"
    " `revoked` is the number of revoked keys",
)
_VERIFY_PARAMETERS: Final = (
    ("permission", "what the key must permit; repeated ones must all be permitted"),
    ("environment", "the environment that the key must be for"),
)


class Refused(BaseModel):
    """Why `/verify` and `/ext_authz` refuse a request."""

    error: str
    error_description: str


@operators_only
async def document(request: Request) -> Response:
    """This document."""
    return JSON(_document(engine_of(request).settings.permissions))


@cache
def _document(permissions: tuple[str, ...]) -> dict[str, Any]:
    return build(OPERATIONS, permissions)


OPERATIONS: Final[dict[str, dict[str, Operation]]] = {
    "/v1/api-keys": {
        "get": Operation(
            unsent.Keys.get,
            unsent.Key,
            is_array=True,
            errors=(400, *CALLER_ERRORS),
            error=unsent.Error,
            query=(
                ("include", "`deleted`: list deleted keys too"),
                ("idle", f"only keys unused for so many days, 1 to {parameters.MAX_IDLE_DAYS}"),
                *PAGED,
            ),
        ),
        "post": Operation(
            unsent.Keys.post,
            unsent.CreatedKey,
            body=unsent.CreateKey,
            errors=(*BODY_ERRORS, *CALLER_ERRORS, *QUOTA_ERRORS),
            error=unsent.Error,
        ),
    },
    "/v1/api-keys/{id}": {
        "get": Operation(
            unsent.OneKey.get, unsent.Key, errors=(400, 404, *CALLER_ERRORS), error=unsent.Error
        ),
        "patch": Operation(
            unsent.OneKey.patch,
            unsent.Key,
            body=unsent.ChangeKey,
            errors=(404, *BODY_ERRORS, *CALLER_ERRORS, *QUOTA_ERRORS),
            error=unsent.Error,
        ),
        "delete": Operation(
            unsent.OneKey.delete,
            unsent.Success,
            errors=(400, 404, *CALLER_ERRORS),
            error=unsent.Error,
            has_receipt=True,
            query=(
                _REASON,
                _DESCENDANTS,
            ),
        ),
    },
    "/v1/api-keys/{id}/usage": {
        "get": Operation(
            usage.OneKeyUsage.get,
            usage.KeyUsageReport,
            errors=(400, 404, *CALLER_ERRORS),
            error=unsent.Error,
            query=(("days", f"the last days, from 1 to {parameters.MAX_USAGE_DAYS}; default 30"),),
        ),
    },
    "/v1/api-keys/{id}/rotate": {
        "post": Operation(
            rotation.Rotation.post,
            unsent.CreatedKey,
            body=rotation.Rotate,
            errors=(404, *BODY_ERRORS, *CALLER_ERRORS, *QUOTA_ERRORS),
            error=unsent.Error,
        )
    },
    **{
        f"/v1/api-keys/{{id}}/rotate/{word}": {
            "post": Operation(
                endpoint.post,
                unsent.Key,
                errors=(404, *BODY_ERRORS, *CALLER_ERRORS),
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
            errors=(*BODY_ERRORS, *CALLER_ERRORS),
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
            query=(_REASON,),
        )
    },
    "/v1/audit": {
        "get": Operation(
            audit.Audit.get,
            audit.AuditEntry,
            is_array=True,
            errors=(400, 404, *CALLER_ERRORS),
            error=unsent.Error,
            query=(
                ("key", "only events of this key"),
                ("limit", f"the events of a page, from 1 to {parameters.MAX_LIMIT}; default 100"),
                ("before", "only events before the one with this id"),
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
            schemas={"cursor": CURSORS[False].schema},
        ),
        "post": Operation(
            sendook.Keys.post,
            sendook.CreatedKey,
            body=sendook.CreateKey,
            errors=(*BODY_ERRORS, 401, 503, *QUOTA_ERRORS),
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
            errors=(*BODY_ERRORS, 503),
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
                ("X-Keylatch-Require", "what the key must permit: a list, separated by commas"),
                ("X-Keylatch-Require-Environment", "the environment that the key must be for"),
            ),
        )
        for method in ("get", "head", "post", "put", "patch", "delete", "options", "trace")
    },
    "/healthz": {"get": Operation(health.healthz, health.Liveness, errors=())},
    "/readyz": {
        "get": Operation(health.readyz, health.Readiness, errors=(503,), error=health.Readiness)
    },
    "/metrics": {
        "get": Operation(metrics.metrics, None, errors=OPERATOR_ERRORS, error=unsent.Error)
    },
    "/openapi.json": {"get": Operation(document, None, errors=OPERATOR_ERRORS, error=unsent.Error)},
}
