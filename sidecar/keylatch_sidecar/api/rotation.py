"""keylatch's extensions: rotate a key, revoke all keys, revoke the caller's own key.

Errors have the shape of unsent's dialect.
"""

from typing import Annotated

from pydantic import Field
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.validation import MAX_GRACE_SECONDS, grace_of
from keylatch_sidecar.api import receipts, request_body
from keylatch_sidecar.api.access import authenticate_any, authenticate_manager
from keylatch_sidecar.api.error_responses import errors_in
from keylatch_sidecar.api.errors import found
from keylatch_sidecar.api.parameters import key_id, waits_for_propagation
from keylatch_sidecar.api.schemas import JSON, Body, Integer, Reason
from keylatch_sidecar.api.unsent import (
    CreatedKey,
    ManyRevoked,
    describe,
    fields_of,
    render_error,
    revoked_response,
)

DAY_SECONDS = 86_400


class Rotate(Body):
    """For how many seconds the previous secret is accepted; 0: not after the response."""

    grace_seconds: Annotated[
        Integer, Field(json_schema_extra={"minimum": 0, "maximum": MAX_GRACE_SECONDS})
    ] = DAY_SECONDS


class RevokeAll(Body):
    """Why; stored with every key."""

    reason: Reason | None = None


class Rotation(HTTPEndpoint):
    """`/v1/api-keys/{id}/rotate`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Give a key a new secret. No other response contains its token. The previous one is
        accepted for `graceSeconds`, a day by default."""
        caller, keyring = await authenticate_manager(request)
        body = await request_body.read(request, Rotate)
        rotated = found(
            await keyring.rotate(
                caller.organization_id,
                key_id(request),
                grace=grace_of(body.grace_seconds),
                by=caller,
                wait=waits_for_propagation(request),
            )
        )
        created = CreatedKey(token=rotated.token.reveal(), **fields_of(rotated.record))
        return JSON(created, 200, receipts.headers(rotated.receipt))


class CancelledRotation(HTTPEndpoint):
    """`/v1/api-keys/{id}/rotate/cancel`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """During the grace: restore the previous secret and revoke the new one."""
        return await _end_grace_period(request, cancels=True)


class FinishedRotation(HTTPEndpoint):
    """`/v1/api-keys/{id}/rotate/finish`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """During the grace: end it now; only the new secret is accepted."""
        return await _end_grace_period(request, cancels=False)


class AllKeys(HTTPEndpoint):
    """`/v1/api-keys/revoke-all`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Revoke every key of the organisation, including the caller's own."""
        caller, keyring = await authenticate_manager(request)
        body = await request_body.read(request, RevokeAll)
        waited = waits_for_propagation(request)
        revoked = await keyring.revoke_all(
            caller.organization_id, reason=body.reason, by=caller, wait=waited
        )
        content = ManyRevoked(
            success=True, revoked=revoked.count, revocation=receipts.revocation(revoked.receipt)
        )
        return receipts.revocation_response(content, revoked.receipt, waited=waited)


class OwnKey(HTTPEndpoint):
    """`/v1/api-keys/self`"""

    @errors_in(render_error)
    async def delete(self, request: Request) -> Response:
        """Revoke the caller's own key, whatever its permission; a request with the previous secret
        revokes only that secret."""
        caller, keyring = await authenticate_any(request)
        waited = waits_for_propagation(request)
        changed = await keyring.revoke_own_secret(
            caller, reason=request.query_params.get("reason"), wait=waited
        )
        return revoked_response(found(changed), waited=waited)


async def _end_grace_period(request: Request, *, cancels: bool) -> Response:
    caller, keyring = await authenticate_manager(request)
    await request_body.read(request, Body)
    end = keyring.cancel_rotation if cancels else keyring.finish_rotation
    wait = waits_for_propagation(request)
    changed = found(await end(caller.organization_id, key_id(request), by=caller, wait=wait))
    return JSON(describe(changed.record), 200, receipts.headers(changed.receipt))
