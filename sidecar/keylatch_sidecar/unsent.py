"""unsent's dialect, and keylatch's own extensions of it: `/v1/api-keys` (with a hyphen)."""

from typing import Any, TypeVar

from pydantic import ConfigDict
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from keylatch.keyring import InvalidValue
from keylatch.model import FULL, KeyRecord
from keylatch_sidecar import bodies, listing, receipts
from keylatch_sidecar.access import key_id, manager
from keylatch_sidecar.bodies import JSON, Body, Environment, ErrorJSON, Instant, Name, Shape, iso
from keylatch_sidecar.problems import Fault, Problem, no_such_key
from keylatch_sidecar.profile import speaking

T = TypeVar("T")


class CreateKey(Body):
    """`environment` and `expiresAt` are keylatch's."""

    name: Name
    permission: str = FULL
    environment: Environment | None = None
    expires_at: Instant | None = None


def _without_defaults(schema: dict[str, Any]) -> None:
    """A client made from the document must not send the defaults of what it leaves out."""
    for field in schema["properties"].values():
        field.pop("default", None)
    schema["minProperties"] = 1


class ChangeKey(Body):
    """Whatever is not given stays as it is."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    name: Name = ""
    active: bool = True
    permission: str = FULL
    expires_at: Instant | None = None


class Key(Shape):
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


class CreatedKey(Key):
    """A new key, with its token this once."""

    token: str


class Success(Shape):
    """What deleting answers. `revocation` is keylatch's."""

    success: bool
    revocation: receipts.Revocation


class ErrorDetail(Shape):
    """Why a call failed."""

    code: str
    message: str


class Error(ErrorDetail):
    """The superset that every official SDK of unsent can read."""

    error: ErrorDetail


def spell(problem: Problem) -> ErrorJSON:
    """An error in unsent's shape: nested for most SDKs, flat for the Rust one."""
    detail = {"code": problem.code, "message": problem.message}
    return ErrorJSON({"error": detail, **detail}, problem.status, problem.headers)


class Keys(HTTPEndpoint):
    """`/v1/api-keys`"""

    @speaking(spell)
    async def get(self, request: Request) -> Response:
        """List the organisation's keys, newest first, with `?limit=` in pages;
        `?include=deleted` shows those as well."""
        caller, keyring = await manager(request)
        deleted = request.query_params.get("include") == "deleted"
        return await listing.answer(
            request, keyring, caller.organization_id, describe, deleted=deleted
        )

    @speaking(spell)
    async def post(self, request: Request) -> Response:
        """Create a key. Its token is in this answer and nowhere else, ever."""
        caller, keyring = await manager(request)
        body = await bodies.read(request, CreateKey)
        try:
            created = await keyring.create(
                caller.organization_id,
                body.name,
                permission=body.permission,
                environment=caller.environment if body.environment is None else body.environment,
                expires_at=bodies.milliseconds_of(body.expires_at),
                by=caller,
            )
        except InvalidValue as error:
            raise bodies.invalid([Fault(error.field, error.message)]) from None
        return JSON(CreatedKey(token=created.token.reveal(), **_fields(created.record)))


class OneKey(HTTPEndpoint):
    """`/v1/api-keys/{id}`"""

    @speaking(spell)
    async def get(self, request: Request) -> Response:
        """Show a key, deleted or not."""
        caller, keyring = await manager(request)
        return JSON(describe(_found(await keyring.get(caller.organization_id, key_id(request)))))

    @speaking(spell)
    async def patch(self, request: Request) -> Response:
        """Change a key's name, permission, expiry, or whether it is active."""
        caller, keyring = await manager(request)
        body = await bodies.read(request, ChangeKey)
        values: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
        if "expires_at" in values:
            values["expires_at"] = bodies.milliseconds_of(body.expires_at)
        if not values:
            raise Problem(400, "Nothing to change: send name, active, permission or expiresAt")
        try:
            changed = _found(
                await keyring.change(caller.organization_id, key_id(request), by=caller, **values)
            )
        except InvalidValue as error:
            raise bodies.invalid([Fault(error.field, error.message)]) from None
        if changed.record.deleted_at is not None:
            raise Problem(400, "The API key was deleted; that is final")
        return JSON(describe(changed.record))

    @speaking(spell)
    async def delete(self, request: Request) -> Response:
        """Revoke a key, at once and finally. Repeating it changes nothing."""
        caller, keyring = await manager(request)
        waited = receipts.waits(request)
        changed = _found(
            await keyring.delete(caller.organization_id, key_id(request), by=caller, wait=waited)
        )
        content = Success(success=True, revocation=receipts.revocation(changed.receipt))
        return receipts.answer(content, changed.receipt, waited=waited)


def _found(what: T | None) -> T:
    if what is None:
        raise no_such_key()
    return what


def describe(record: KeyRecord) -> Key:
    """A key as it is shown to people who may manage it."""
    return Key(**_fields(record))


def _fields(record: KeyRecord) -> dict[str, Any]:
    return bodies.common_fields(record) | {
        "partial_token": record.partial_token,
        "permission": record.permission,
        "environment": record.environment,
        "last_used": None if record.last_used is None else iso(record.last_used),
        "expires_at": None if record.expires_at is None else iso(record.expires_at),
    }
