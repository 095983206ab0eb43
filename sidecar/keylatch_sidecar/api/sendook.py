"""Sendook's dialect: `/v1/api_keys` (with an underscore)."""

from typing import Any

from pydantic import Field
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.decisions import KeyRecord
from keylatch.errors import InvalidValue
from keylatch_sidecar.api import pagination, parameters, receipts, request_body
from keylatch_sidecar.api.access import authenticate_manager
from keylatch_sidecar.api.error_responses import errors_in
from keylatch_sidecar.api.errors import NOT_GIVEN, InvalidInput, Problem, found, invalid_input
from keylatch_sidecar.api.parameters import key_id
from keylatch_sidecar.api.schemas import (
    JSON,
    Body,
    ErrorJSON,
    Name,
    ResponseBody,
    common_fields,
)


class CreateKey(Body):
    """Only the name of a key can be chosen in Sendook's dialect."""

    name: Name


class Key(ResponseBody):
    """A key, without its token. Clients of the real server that use no SDK read `_id`."""

    id: str
    mongo_id: str = Field(alias="_id")
    name: str
    organization_id: str
    active: bool
    created_at: str
    updated_at: str


class CreatedKey(Key):
    """A new key, with its token. No other response contains it."""

    key: str


class FieldError(ResponseBody):
    """An invalid field."""

    type: str
    value: Any = None
    msg: str
    path: str
    location: str


class FieldErrors(ResponseBody):
    """All invalid fields of a body, or parameters of a query."""

    errors: list[FieldError]


class Error(ResponseBody):
    """Any other error."""

    error: str
    message: str
    code: str


def render_error(problem: Problem) -> ErrorJSON:
    """An error in Sendook's shape.

    Sendook documents "API key doesn't have permission" under 401, so a key that lacks the
    permission gets 401 here; the challenge says `insufficient_scope`.
    """
    status = 401 if problem.status == 403 else problem.status
    if problem.errors:
        return ErrorJSON({"errors": [_field_error(error) for error in problem.errors]}, status)
    body = {"error": problem.message, "message": problem.message, "code": problem.code}
    return ErrorJSON(body, status, problem.headers)


class Keys(HTTPEndpoint):
    """`/v1/api_keys`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """List the organisation's keys, oldest first; in pages with `?limit=`."""
        caller, keyring = await authenticate_manager(request)
        return await pagination.list_response(request, keyring, _key, newest_first=False, by=caller)

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Create a key. No other response contains its token."""
        caller, keyring = await authenticate_manager(request)
        body = await request_body.read(request, CreateKey)
        try:
            created = await keyring.create(
                caller.organization_id, body.name, environment=caller.environment, by=caller
            )
        except InvalidValue as error:
            raise invalid_input([InvalidInput(error.field, error.message, body.name)]) from None
        return JSON(CreatedKey(key=created.token.reveal(), **_fields(created.record)))


class OneKey(HTTPEndpoint):
    """`/v1/api_keys/{id}`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """Show a key, deleted or not."""
        caller, keyring = await authenticate_manager(request)
        key = await keyring.get(caller.organization_id, key_id(request), by=caller)
        return JSON(_key(found(key).record))

    @errors_in(render_error)
    async def delete(self, request: Request) -> Response:
        """Revoke a key, at once and irrevocably; `?descendants=true` revokes its descendants too.
        Idempotent."""
        caller, keyring = await authenticate_manager(request)
        waited = parameters.waits_for_propagation(request)
        deleted = await keyring.delete(
            caller.organization_id,
            key_id(request),
            descendants=parameters.read(request, parameters.DESCENDANTS) or False,
            by=caller,
            wait=waited,
        )
        changed = found(deleted)
        return receipts.revocation_response(_key(changed.record), changed.receipt, waited=waited)


def _key(record: KeyRecord) -> Key:
    return Key(**_fields(record))


def _fields(record: KeyRecord) -> dict[str, Any]:
    return common_fields(record) | {"mongo_id": record.id}


def _field_error(error: InvalidInput) -> dict[str, Any]:
    given = {} if error.value is NOT_GIVEN else {"value": error.value}
    return {
        "type": "field",
        **given,
        "msg": "Invalid value",
        "path": error.path,
        "location": error.location,
    }
