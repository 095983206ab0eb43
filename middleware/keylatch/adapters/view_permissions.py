"""The permissions that a view requires: declared at the view, read by the middleware before the
view is called, and checked again by the view.

Each framework's `requires` is built from these functions. `environ` is that of WSGI, or Django's
`request.META`. A view that declares nothing requires FULL.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.authentication import UnauthenticatedUser

from keylatch.adapters.environ import PRINCIPAL, REFUSALS, client_info_of
from keylatch.core.decisions import (
    ONLY_FULL,
    Deny,
    Principal,
    Reason,
    Requirement,
    missing_scope,
)
from keylatch.core.refusals import Refusal, Refusals
from keylatch.core.rules import permission_mistakes
from keylatch.errors import ConfigurationError


def all_of(permissions: Sequence[str]) -> Requirement:
    """All of these permissions; for none of them: FULL.

    Raises:
        ConfigurationError: names every malformed permission.
    """
    _check_words(permissions)
    return Requirement.all_of(permissions) if permissions else ONLY_FULL


def any_of(permissions: Sequence[str]) -> Requirement:
    """Any one of these permissions, or FULL.

    Raises:
        ConfigurationError: names every malformed permission.
    """
    _check_words(permissions)
    return Requirement.any_of(permissions)


def _check_words(permissions: Sequence[str]) -> None:
    mistakes = [mistake for each in permissions for mistake in permission_mistakes(each)]
    if mistakes:
        raise ConfigurationError(mistakes)


def principal_of(environ: Mapping[str, Any]) -> Principal | UnauthenticatedUser:
    """The principal of the request; unauthenticated on a public path.

    Raises:
        RuntimeError: no middleware has checked this request.
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
    """The refusal of a request that passed the middleware but does not satisfy the view; None if
    it does."""
    principal = principal_of(environ)
    if isinstance(principal, Principal):
        deny = missing_scope(principal.permission, requirement)
    else:
        deny = Deny(Reason.MISSING)
    if deny is None:
        return None
    refusals: Refusals = environ[REFUSALS]
    return refusals.refuse(deny, lambda: client_info_of(environ))
