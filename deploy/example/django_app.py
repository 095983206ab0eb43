"""Django: the middleware is a setting, a view's permission is declared at the view.

    keylatch keys create --name me
    gunicorn --pythonpath deploy/example django_app:wsgi

Over ASGI, without blocking the event loop for a key that this process does not know yet:

    uvicorn --app-dir deploy/example django_app:asgi
"""

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from keylatch.django import get_asgi_application, requires

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=[
        "keylatch.django.APIKeyMiddleware",  # the first of them
        "django.middleware.common.CommonMiddleware",
    ],
    KEYLATCH={"public": ["/healthz"]},  # the store comes from KEYLATCH_STORE
)


def healthz(request: HttpRequest) -> JsonResponse:
    """Needs no key."""
    return JsonResponse({"status": "ok"})


def me(request: HttpRequest) -> JsonResponse:
    """Needs a key with FULL: nothing else is declared."""
    return JsonResponse({"key": request.api_key.key_id, "name": request.api_key.key_name})


@require_POST
@requires("SENDING")
async def send_email(request: HttpRequest) -> JsonResponse:
    """Needs a key with FULL or SENDING."""
    return JsonResponse({"sent by": request.api_key.key_name})


urlpatterns = [path("healthz", healthz), path("v1/me", me), path("v1/emails", send_email)]

wsgi = get_wsgi_application()
asgi = get_asgi_application()
