"""Who may manage keys: the holder of a good key with FULL, within its own organisation.

And which key is meant: ids go into the database only if they look like one.
"""

import re
from functools import partial
from typing import Final

from starlette.requests import Request

from keylatch.asgi import caller_of
from keylatch.engine import Engine
from keylatch.keyring import Keyring
from keylatch.model import ONLY_FULL, Deny, Principal
from keylatch_sidecar.problems import no_such_key, refused

_ID: Final = re.compile(r"[A-Za-z0-9_-]+")


def engine_of(request: Request) -> Engine:
    """The engine that the sidecar was made with."""
    engine: Engine = request.app.state.engine
    return engine


async def manager(request: Request) -> tuple[Principal, Keyring]:
    """The caller of a management endpoint, and the keyring it may use.

    Raises:
        Problem: there is no such caller.
        StoreUnavailable: that cannot be found out now.
    """
    engine = engine_of(request)
    values = [value for name, value in request.headers.raw if name == b"authorization"]
    verdict = await engine.check(values, ONLY_FULL)
    if isinstance(verdict, Deny):
        raise refused(verdict, engine.settings.realm)
    if engine.sees_clients:
        engine.see(verdict.principal.key_id, partial(caller_of, request.scope))
    return verdict.principal, await engine.keyring()


def key_id(request: Request) -> str:
    """The id in the path.

    Raises:
        Problem: no key can have it. PostgreSQL would refuse a NUL, and that would look like an
            outage instead of an unknown key.
    """
    given: str = request.path_params["id"]
    if not _ID.fullmatch(given):
        raise no_such_key()
    return given
