"""Django REST framework: `request.user` is the principal of the key.

    REST_FRAMEWORK = {
        "DEFAULT_AUTHENTICATION_CLASSES": ["keylatch.django_rest.APIKeyAuthentication"],
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    }

`keylatch.django.APIKeyMiddleware` decides. Views declare permissions with
`keylatch.django.requires`: on an `@api_view`, or with `method_decorator` on a class, on its methods
or on the actions of a view set.
"""

from typing import Any

try:
    from rest_framework.authentication import BaseAuthentication
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "rest_framework":
        raise
    raise ImportError(
        "keylatch.django_rest needs the package djangorestframework: "
        "pip install djangorestframework"
    ) from error

from keylatch.adapters.environ import REFUSALS
from keylatch.adapters.view_permissions import principal_of
from keylatch.core.decisions import Deny, Principal, Reason


class PrincipalUser(Principal):
    """A principal with `pk`, by which REST framework's throttles count users."""

    @property
    def pk(self) -> str:
        """The key id."""
        return self.key_id


class APIKeyAuthentication(BaseAuthentication):
    """`request.user` is the principal, `request.auth` its permission.

    On a public path the request is not authenticated: a view that requires a user answers 401.

    Raises:
        RuntimeError: the middleware has not checked this request.
    """

    def authenticate(self, request: Any) -> tuple[PrincipalUser, str] | None:
        """The principal and its permission, or None on a public path."""
        principal = principal_of(request.META)
        if not isinstance(principal, Principal):
            return None
        fields = {field: getattr(principal, field) for field in Principal.__slots__}
        return PrincipalUser(**fields), principal.permission

    def authenticate_header(self, request: Any) -> str:
        """The challenge; with it REST framework answers 401 and not 403 (RFC 6750 section 3)."""
        refusal = request.META[REFUSALS].refusal_for(Deny(Reason.MISSING))
        return str(dict(refusal.headers)[b"www-authenticate"].decode("latin-1"))
