"""Django Ninja: the key that the middleware let in is `request.auth`, and OpenAPI says Bearer.

    api = NinjaAPI(auth=APIKeyAuth())

    @api.post("/emails", auth=APIKeyAuth("SENDING"))
    def send_email(request): ...

`keylatch.django.APIKeyMiddleware` decides, before Ninja has chosen an operation: it cannot see what
that declares. So name the routes of a permission in the setting KEYLATCH too.
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

from keylatch.adapters.view_permissions import any_of, principal_of, refusal_of
from keylatch.core.decisions import ANY_KEY


class APIKeyAuth(HttpAuthBase):
    """Lets an operation be called by keys that the middleware let in; `request.auth` is which.

    Args:
        permissions: those that suffice, any one of them, and FULL always; none: any key will do.

    Raises:
        ConfigurationError: naming every word that is no permission.
    """

    openapi_scheme = "bearer"

    def __init__(self, *permissions: str) -> None:
        super().__init__()
        self._requirement = any_of(permissions) if permissions else ANY_KEY

    def __call__(self, request: Any) -> Any:
        refusal = refusal_of(request.META, self._requirement)
        if refusal is not None:
            raise HttpError(refusal.status, json.loads(refusal.body)["error_description"])
        return principal_of(request.META)
