"""djangorestframework-api-key: its permission class `HasAPIKey` on a view."""

import django_project

django_project.configure("drf_api_key", "rest_framework_api_key")

from django.core.wsgi import get_wsgi_application
from django.urls import path
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework_api_key.models import APIKey
from rest_framework_api_key.permissions import HasAPIKey


class Open(APIView):
    authentication_classes = []
    permission_classes = []

    def get(self, request):
        return Response("hello")


class Protected(Open):
    permission_classes = [HasAPIKey]


urlpatterns = [path("open", Open.as_view()), path("protected", Protected.as_view())]
app = get_wsgi_application()

if __name__ == "__main__":
    django_project.migrate()
    print(APIKey.objects.create_key(name="me")[1])
