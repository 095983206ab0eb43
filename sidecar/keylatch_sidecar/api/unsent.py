"""unsent's dialect with keylatch's extensions: `/v1/api-keys` (with a hyphen)."""

import json
from datetime import datetime
from typing import Any

from pydantic import ConfigDict
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.decisions import FULL, KeyRecord
from keylatch.core.timestamps import datetime_of
from keylatch.core.validation import expiry_after
from keylatch.errors import InvalidValue
from keylatch.management.keyring import Changed
from keylatch_sidecar.api import pagination, parameters, receipts, request_body
from keylatch_sidecar.api.access import authenticate_manager, engine_of
from keylatch_sidecar.api.error_responses import errors_in
from keylatch_sidecar.api.errors import Problem, found
from keylatch_sidecar.api.parameters import key_id
from keylatch_sidecar.api.schemas import (
    JSON,
    Body,
    Duration,
    Environment,
    ErrorJSON,
    Instant,
    Name,
    ResponseBody,
    Scalar,
    common_fields,
    iso,
)


class CreateKey(Body):
    """The fields after `permission` are keylatch's. An expiry is an instant, or a duration from now
    such as `90d`."""

    name: Name
    permission: str = FULL
    environment: Environment | None = None
    expires_at: Instant | None = None
    expires_in: Duration | None = None
    metadata: dict[str, Scalar] | None = None


def _without_defaults(schema: dict[str, Any]) -> None:
    """A client that is generated from the document must not send defaults for omitted fields."""
    for field in schema["properties"].values():
        field.pop("default", None)
    schema["minProperties"] = 1


class ChangeKey(Body):
    """Fields that are omitted stay as they are."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    name: Name = ""
    active: bool = True
    permission: str = FULL
    expires_at: Instant | None = None
    expires_in: Duration = ""
    metadata: dict[str, Scalar] | None = None


class PreviousSecret(ResponseBody):
    """The secret before the last rotation: when its grace ends or ended, and its last use."""

    partial_token: str
    expires_at: str
    last_used: str | None


class Key(ResponseBody):
    """A key, without its token. The fields after `lastUsed` are keylatch's."""

    id: str
    name: str
    partial_token: str
    permission: str
    created_at: str
    last_used: str | None
    organization_id: str
    active: bool
    environment: str
    expires_at: str | None
    updated_at: str
    metadata: dict[str, Scalar]
    revoked_reason: str | None
    rotated_at: str | None
    previous: PreviousSecret | None
    created_by: str | None


class CreatedKey(Key):
    """A new key, with its token. No other response contains it."""

    token: str


class Success(ResponseBody):
    """A key was revoked. `revocation` is keylatch's."""

    success: bool
    revocation: receipts.Revocation


class ManyRevoked(Success):
    """`revoked` keys were revoked."""

    revoked: int


class ErrorDetail(ResponseBody):
    """Why a call failed."""

    code: str
    message: str


class Error(ErrorDetail):
    """All fields that any official SDK of unsent reads."""

    error: ErrorDetail


def render_error(problem: Problem) -> ErrorJSON:
    """An error in unsent's shape: nested for most SDKs, flat for the Rust SDK."""
    detail = {"code": problem.code, "message": problem.message}
    return ErrorJSON({"error": detail, **detail}, problem.status, problem.headers)


class Keys(HTTPEndpoint):
    """`/v1/api-keys`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """List the organisation's keys, newest first; in pages with `?limit=`;
        `?include=deleted` lists deleted keys too, `?idle=30` only keys not used for 30 days."""
        caller, keyring = await authenticate_manager(request)
        deleted = request.query_params.get("include") == "deleted"
        return await pagination.list_response(
            request,
            keyring,
            describe,
            deleted=deleted,
            idle_days=parameters.read(request, parameters.IDLE_DAYS),
            by=caller,
        )

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Create a key. No other response contains its token."""
        caller, keyring = await authenticate_manager(request)
        body = await request_body.read(request, CreateKey)
        created = await keyring.create(
            caller.organization_id,
            body.name,
            permission=body.permission,
            environment=caller.environment if body.environment is None else body.environment,
            expires_at=_expiry_of(request, body.expires_at, body.expires_in),
            metadata=body.metadata,
            by=caller,
        )
        return JSON(CreatedKey(token=created.secret, **fields_of(created.record)))


class OneKey(HTTPEndpoint):
    """`/v1/api-keys/{id}`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """Show a key, deleted or not."""
        caller, keyring = await authenticate_manager(request)
        key = await keyring.get(caller.organization_id, key_id(request), by=caller)
        return JSON(describe(found(key).record))

    @errors_in(render_error)
    async def patch(self, request: Request) -> Response:
        """Change a key's name, permission, expiry, metadata, or whether it is active."""
        caller, keyring = await authenticate_manager(request)
        body = await request_body.read(request, ChangeKey)
        values: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
        if not values:
            raise Problem(400, "Nothing to change: send a field of the key")
        duration = values.pop("expires_in", None)
        if "expires_at" in values or duration is not None:
            values["expires_at"] = _expiry_of(request, body.expires_at, duration)
        changed = found(
            await keyring.change(caller.organization_id, key_id(request), by=caller, **values)
        )
        if changed.record.deleted_at is not None:
            raise Problem(400, "The API key was deleted; that is final")
        return JSON(describe(changed.record))

    @errors_in(render_error)
    async def delete(self, request: Request) -> Response:
        """Revoke a key, at once and irrevocably; `?reason=` is stored with the key, and
        `?descendants=true` revokes its descendants too. Idempotent."""
        caller, keyring = await authenticate_manager(request)
        waited = parameters.waits_for_propagation(request)
        descendants = parameters.read(request, parameters.DESCENDANTS) or False
        changed = found(
            await keyring.delete(
                caller.organization_id,
                key_id(request),
                reason=request.query_params.get("reason"),
                descendants=descendants,
                by=caller,
                wait=waited,
            )
        )
        return revoked_response(changed, waited=waited, with_count=descendants)


def revoked_response(changed: Changed, *, waited: bool, with_count: bool = False) -> Response:
    """The response to a revocation; `with_count`: with the number of revoked keys."""
    content = Success(success=True, revocation=receipts.revocation(changed.receipt))
    if with_count:
        content = ManyRevoked(**dict(content), revoked=changed.count)
    return receipts.revocation_response(content, changed.receipt, waited=waited)


def _expiry_of(request: Request, instant: datetime | None, duration: str | None) -> datetime | None:
    if duration is None:
        return instant
    if instant is not None:
        raise InvalidValue("expiresIn", "cannot be combined with expiresAt")
    return datetime_of(expiry_after(duration, engine_of(request).now_ms()))


def describe(record: KeyRecord) -> Key:
    """A key for a response body."""
    return Key(**fields_of(record))


def fields_of(record: KeyRecord) -> dict[str, Any]:
    """The fields of a `Key`."""
    return common_fields(record) | {
        "partial_token": record.partial_token,
        "permission": record.permission,
        "environment": record.environment,
        "last_used": _iso(record.last_used),
        "expires_at": _iso(record.expires_at),
        "metadata": json.loads(record.metadata) if record.metadata else {},
        "revoked_reason": record.revoked_reason,
        "rotated_at": _iso(record.rotated_at),
        "previous": previous_of(record),
        "created_by": record.created_by,
    }


def previous_of(record: KeyRecord) -> PreviousSecret | None:
    """The secret before the last rotation; None: there is none, or it had no grace."""
    if record.previous_expires_at is None:
        return None
    return PreviousSecret(
        partial_token=record.previous_partial_token or "",
        expires_at=iso(record.previous_expires_at),
        last_used=_iso(record.previous_last_used),
    )


def _iso(milliseconds: int | None) -> str | None:
    return None if milliseconds is None else iso(milliseconds)
