"""keylatch's own calls beside unsent's: a new secret for a key, the end of all keys or one's own.

Errors are spelled as in unsent's dialect.
"""

from typing import Annotated

from pydantic import Field
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.validation import MAX_GRACE_SECONDS, grace_of
from keylatch_sidecar.api import receipts, schemas
from keylatch_sidecar.api.access import authenticate_any, authenticate_manager, key_id
from keylatch_sidecar.api.dialects import errors_in
from keylatch_sidecar.api.errors import no_such_key
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
    """How long the present secret stays good, in seconds; 0: it ends with the answer."""

    grace_seconds: Annotated[
        Integer, Field(json_schema_extra={"minimum": 0, "maximum": MAX_GRACE_SECONDS})
    ] = DAY_SECONDS


class RevokeAll(Body):
    """Why all keys end; it is kept with each."""

    reason: Reason | None = None


class Rotation(HTTPEndpoint):
    """`/v1/api-keys/{id}/rotate`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Give a key a new secret. Its token is in this answer and nowhere else, ever; the one
        before stays good for `graceSeconds`, a day unless told otherwise."""
        caller, keyring = await authenticate_manager(request)
        body = await schemas.read(request, Rotate)
        rotated = await keyring.rotate(
            caller.organization_id,
            key_id(request),
            grace=grace_of(body.grace_seconds),
            by=caller,
            wait=receipts.waits_for_propagation(request),
        )
        if rotated is None:
            raise no_such_key()
        created = CreatedKey(token=rotated.secret, **fields_of(rotated.record))
        return JSON(created, 200, receipts.headers(rotated.receipt))


class CancelledRotation(HTTPEndpoint):
    """`/v1/api-keys/{id}/rotate/cancel`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """While the grace runs: the secret before is the key's again, and the new one ends."""
        return await _end_grace_period(request, cancels=True)


class FinishedRotation(HTTPEndpoint):
    """`/v1/api-keys/{id}/rotate/finish`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """While the grace runs: end it now; the new secret alone is good."""
        return await _end_grace_period(request, cancels=False)


class AllKeys(HTTPEndpoint):
    """`/v1/api-keys/revoke-all`"""

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Revoke every key of the organisation, the caller's own among them."""
        caller, keyring = await authenticate_manager(request)
        body = await schemas.read(request, RevokeAll)
        waited = receipts.waits_for_propagation(request)
        done = await keyring.revoke_all(
            caller.organization_id, reason=body.reason, by=caller, wait=waited
        )
        content = ManyRevoked(
            success=True, revoked=done.count, revocation=receipts.revocation(done.receipt)
        )
        return receipts.revocation_response(content, done.receipt, waited=waited)


class OwnKey(HTTPEndpoint):
    """`/v1/api-keys/self`"""

    @errors_in(render_error)
    async def delete(self, request: Request) -> Response:
        """Revoke the key that asks, whatever its permission; asked with the secret before a
        rotation, that secret alone."""
        caller, keyring = await authenticate_any(request)
        waited = receipts.waits_for_propagation(request)
        changed = await keyring.revoke_own_secret(
            caller, reason=request.query_params.get("reason"), wait=waited
        )
        if changed is None:
            raise no_such_key()
        return revoked_response(changed, waited=waited)


async def _end_grace_period(request: Request, *, cancels: bool) -> Response:
    caller, keyring = await authenticate_manager(request)
    await schemas.read(request, Body)
    end = keyring.cancel_rotation if cancels else keyring.finish_rotation
    changed = await end(
        caller.organization_id,
        key_id(request),
        by=caller,
        wait=receipts.waits_for_propagation(request),
    )
    if changed is None:
        raise no_such_key()
    return JSON(describe(changed.record), 200, receipts.headers(changed.receipt))
