"""What a view asks of a key: declared at the view, read at the door, asked again at the call.

A framework's `requires` is spelled with these few functions. `environ` is that of WSGI, or Django's
`request.META`. What a view does not declare is for FULL only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.authentication import UnauthenticatedUser

from keylatch.adapters.environ import PRINCIPAL, REFUSALS, client_info_of
from keylatch.core.decisions import Deny, Principal, Reason, Requirement, missing_scope
from keylatch.core.policy import Policy
from keylatch.core.refusals import Refusal, Refusals


def any_of(permissions: Sequence[str]) -> Requirement:
    """What a view asks that names these permissions: any one of them suffices, and FULL always.

    Raises:
        ConfigurationError: naming every word that is no permission.
    """
    route = ["GET /"]
    return Policy(permissions=dict.fromkeys(permissions, route)).requirement_by_rules("GET", "/")


def principal_of(environ: Mapping[str, Any]) -> Principal | UnauthenticatedUser:
    """Whom the middleware let in; on a public path: nobody.

    Raises:
        RuntimeError: the middleware has not seen this request.
    """
    principal: Principal | UnauthenticatedUser | None = environ.get(PRINCIPAL)
    if principal is None:
        raise RuntimeError(
            "no API key was checked for this request: put the app behind "
            "keylatch.wsgi.APIKeyMiddleware (Flask: app.wsgi_app = APIKeyMiddleware(app.wsgi_app)),"
            " or name keylatch.django.APIKeyMiddleware in MIDDLEWARE"
        )
    return principal


def refusal_of(environ: dict[str, Any], requirement: Requirement) -> Refusal | None:
    """The refusal for a request that was let in and may not do this, or None if it may."""
    principal = principal_of(environ)
    if isinstance(principal, Principal):
        deny = missing_scope(principal.permission, requirement)
    else:
        deny = Deny(Reason.MISSING)
    if deny is None:
        return None
    refusals: Refusals = environ[REFUSALS]
    return refusals.refuse(deny, lambda: client_info_of(environ))
