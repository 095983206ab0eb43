"""Who may manage keys: the holder of a good key with FULL, within its own organisation."""

from typing import Final

from starlette.requests import Request

from keylatch.engine import Engine
from keylatch.keyring import Keyring
from keylatch.model import FULL, Deny, Principal, Wanted
from keylatch_sidecar.problems import refused

_MANAGER: Final = Wanted(frozenset((FULL,)), FULL)


async def manager(request: Request) -> tuple[Principal, Keyring]:
    """The caller of a management endpoint, and the keyring it may use.

    Raises:
        Problem: there is no such caller.
        StoreUnavailable: that cannot be found out now.
    """
    engine: Engine = request.app.state.engine
    values = [value for name, value in request.headers.raw if name == b"authorization"]
    verdict = await engine.check(values, _MANAGER)
    if isinstance(verdict, Deny):
        raise refused(verdict, engine.settings.realm)
    return verdict.principal, await engine.keyring()
