"""Django Ninja: `request.auth` is the principal, and OpenAPI shows the Bearer scheme.

    api = NinjaAPI(auth=APIKeyAuth())

    @api.post("/emails", auth=APIKeyAuth("SENDING"))
    def send_email(request): ...

`keylatch.django.APIKeyMiddleware` decides before Ninja has chosen an operation, so it cannot see
what the operation declares: name the routes of a permission in the setting KEYLATCH as well.
"""

import json
from typing import Any

try:
    from ninja.errors import HttpError
    from ninja.security.http import HttpAuthBase
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "ninja":
        raise
    raise ImportError(
        "keylatch.django_ninja needs the package django-ninja: pip install django-ninja"
    ) from error

from keylatch.adapters.view_permissions import all_of, any_of, principal_of, refusal_of
from keylatch.core.decisions import ANY_KEY


class APIKeyAuth(HttpAuthBase):
    """Checks the permission of a key that the middleware has accepted.

    Args:
        permissions: all of these are required; FULL includes every one. None: any key.

    Raises:
        ConfigurationError: names every malformed permission.
    """

    openapi_scheme = "bearer"

    def __init__(self, *permissions: str) -> None:
        super().__init__()
        self._requirement = all_of(permissions) if permissions else ANY_KEY

    @classmethod
    def requires_any(cls, *permissions: str) -> "APIKeyAuth":
        """Requires any one of these permissions.

        Raises:
            ConfigurationError: names every malformed permission.
        """
        auth = cls()
        auth._requirement = any_of(permissions)
        return auth

    def __call__(self, request: Any) -> Any:
        refusal = refusal_of(request.META, self._requirement)
        if refusal is not None:
            raise HttpError(refusal.status, json.loads(refusal.body)["error_description"])
        return principal_of(request.META)
