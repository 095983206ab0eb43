"""Who may manage keys: the holder of a good key with FULL, within its own organisation; and any
good key may end itself.

And which key is meant: ids go into the database only if they look like one.
"""

import re
from functools import partial
from typing import Final

from starlette.requests import Request

from keylatch.asgi import client_info_of
from keylatch.core.decisions import ANY_KEY, ONLY_FULL, Deny, Principal, Requirement
from keylatch.engine import Engine
from keylatch.management.keyring import Keyring
from keylatch_sidecar.api.errors import no_such_key, refused

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def engine_of(request: Request) -> Engine:
    """The engine that the sidecar was made with."""
    engine: Engine = request.app.state.engine
    return engine


async def authenticate_manager(request: Request) -> tuple[Principal, Keyring]:
    """The caller of a management endpoint, and the keyring it may use.

    Raises:
        Problem: there is no such caller.
        StoreUnavailable: that cannot be found out now.
    """
    return await _authenticate(request, ONLY_FULL)


async def authenticate_any(request: Request) -> tuple[Principal, Keyring]:
    """The caller, with whatever permission. Raises as `authenticate_manager` does."""
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


def key_id(request: Request) -> str:
    """The id in the path.

    Raises:
        Problem: no key can have it. PostgreSQL would refuse a NUL, and that would look like an
            outage instead of an unknown key.
    """
    return validated_id(request.path_params["id"])


def validated_id(given: str) -> str:
    """An id that a key can have. Raises as `key_id` does."""
    if not _ID.fullmatch(given):
        raise no_such_key()
    return given
