"""keylatch: the middleware on Django, and its authentication on a view of REST framework."""

import django_project

django_project.configure("keylatch_drf")

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import path
from rest_framework.permissions import IsAuthenticated
from rest_framework.response import Response
from rest_framework.views import APIView

from keylatch.django_rest import APIKeyAuthentication


class Open(APIView):
    authentication_classes = []
    permission_classes = []

    def get(self, request):
        return Response("hello")


class Protected(Open):
    authentication_classes = [APIKeyAuthentication]
    permission_classes = [IsAuthenticated]


urlpatterns = [path("open", Open.as_view()), path("protected", Protected.as_view())]

unguarded = get_wsgi_application()
settings.MIDDLEWARE = ["keylatch.django.APIKeyMiddleware", *settings.MIDDLEWARE]
guarded = get_wsgi_application()


def app(environ, start_response):
    """The open route meets no middleware."""
    chosen = unguarded if environ["PATH_INFO"] == "/open" else guarded
    return chosen(environ, start_response)
