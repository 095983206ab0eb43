"""Authentication of management requests.

Managing keys needs a FULL key, and reaches the keys of its organisation only. Any accepted key may
revoke itself.
"""

from functools import partial

from starlette.requests import Request

from keylatch.asgi import client_info_of
from keylatch.core.decisions import ANY_KEY, ONLY_FULL, Deny, Principal, Requirement
from keylatch.engine import Engine
from keylatch.management.keyring import Keyring
from keylatch_sidecar.api.errors import refused


def engine_of(request: Request) -> Engine:
    """The engine that `create_app` was called with."""
    engine: Engine = request.app.state.engine
    return engine


async def authenticate_manager(request: Request) -> tuple[Principal, Keyring]:
    """The principal of a request whose key has FULL, and the keyring.

    Raises:
        Problem: the key is missing, not accepted, or has not FULL.
        StoreUnavailable: the key cannot be checked now.
    """
    return await _authenticate(request, ONLY_FULL)


async def authenticate_any(request: Request) -> tuple[Principal, Keyring]:
    """The same for a key with any permission. Raises as `authenticate_manager` does."""
    return await _authenticate(request, ANY_KEY)


async def _authenticate(request: Request, requirement: Requirement) -> tuple[Principal, Keyring]:
    engine = engine_of(request)
    values = [value for name, value in request.headers.raw if name == b"authorization"]
    decision = await engine.authenticate(values, requirement)
    if isinstance(decision, Deny):
        if engine.log_failure is not None:
            engine.log_failure(decision.reason, partial(client_info_of, request.scope))
        raise refused(decision, engine.settings.realm)
    if engine.records_clients:
        engine.record_client(decision.principal.key_id, partial(client_info_of, request.scope))
    return decision.principal, await engine.keyring()
