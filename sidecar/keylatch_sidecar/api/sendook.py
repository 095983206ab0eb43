"""Sendook's dialect: `/v1/api_keys` (with an underscore)."""

from typing import Any

from pydantic import Field
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.core.decisions import KeyRecord
from keylatch.errors import InvalidValue
from keylatch_sidecar.api import pagination, receipts, schemas
from keylatch_sidecar.api.access import authenticate_manager, key_id
from keylatch_sidecar.api.dialects import errors_in
from keylatch_sidecar.api.errors import NOT_GIVEN, InvalidInput, Problem, no_such_key
from keylatch_sidecar.api.schemas import JSON, Body, ErrorJSON, Name, ResponseBody


class CreateKey(Body):
    """Sendook's keys have a name and nothing else to choose."""

    name: Name


class Key(ResponseBody):
    """A key, without its token. `_id` is what raw clients of the real server read."""

    id: str
    mongo_id: str = Field(alias="_id")
    name: str
    organization_id: str
    active: bool
    created_at: str
    updated_at: str


class CreatedKey(Key):
    """A new key, with its token this once."""

    key: str


class FieldError(ResponseBody):
    """One field that cannot be accepted."""

    type: str
    value: Any = None
    msg: str
    path: str
    location: str


class FieldErrors(ResponseBody):
    """A body that cannot be accepted."""

    errors: list[FieldError]


class Error(ResponseBody):
    """Any other error."""

    error: str
    message: str
    code: str


def render_error(problem: Problem) -> ErrorJSON:
    """An error in Sendook's shape.

    Its page lists "API key doesn't have permission" under 401, so here a key whose permission
    does not suffice gets 401; the challenge says `insufficient_scope`.
    """
    status = 401 if problem.status == 403 else problem.status
    if problem.faults:
        return ErrorJSON({"errors": [_field_error(error) for error in problem.faults]}, status)
    body = {"error": problem.message, "message": problem.message, "code": problem.code}
    return ErrorJSON(body, status, problem.headers)


class Keys(HTTPEndpoint):
    """`/v1/api_keys`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """List the organisation's keys, oldest first; with `?limit=` in pages."""
        caller, keyring = await authenticate_manager(request)
        return await pagination.list_response(
            request, keyring, caller.organization_id, _key, newest_first=False, by=caller
        )

    @errors_in(render_error)
    async def post(self, request: Request) -> Response:
        """Create a key. Its token is in this answer and nowhere else, ever."""
        caller, keyring = await authenticate_manager(request)
        body = await schemas.read(request, CreateKey)
        try:
            created = await keyring.create(
                caller.organization_id, body.name, environment=caller.environment, by=caller
            )
        except InvalidValue as error:
            raise schemas.invalid_input(
                [InvalidInput(error.field, error.message, body.name)]
            ) from None
        return JSON(CreatedKey(key=created.secret, **_fields(created.record)))


class OneKey(HTTPEndpoint):
    """`/v1/api_keys/{id}`"""

    @errors_in(render_error)
    async def get(self, request: Request) -> Response:
        """Show a key, deleted or not."""
        caller, keyring = await authenticate_manager(request)
        key = await keyring.get(caller.organization_id, key_id(request), by=caller)
        if key is None:
            raise no_such_key()
        return JSON(_key(key.record))

    @errors_in(render_error)
    async def delete(self, request: Request) -> Response:
        """Revoke a key, at once and finally; `?descendants=true` what it created as well.
        Repeating it changes nothing."""
        caller, keyring = await authenticate_manager(request)
        waited = receipts.waits_for_propagation(request)
        changed = await keyring.delete(
            caller.organization_id,
            key_id(request),
            descendants=receipts.with_descendants(request),
            by=caller,
            wait=waited,
        )
        if changed is None:
            raise no_such_key()
        return receipts.revocation_response(_key(changed.record), changed.receipt, waited=waited)


def _key(record: KeyRecord) -> Key:
    return Key(**_fields(record))


def _fields(record: KeyRecord) -> dict[str, Any]:
    return schemas.common_fields(record) | {"mongo_id": record.id}


def _field_error(error: InvalidInput) -> dict[str, Any]:
    given = {} if error.value is NOT_GIVEN else {"value": error.value}
    return {
        "type": "field",
        **given,
        "msg": "Invalid value",
        "path": error.path,
        "location": error.location,
    }
