"""django-rest-knox: its `TokenAuthentication` and REST framework's `IsAuthenticated` on a view."""

import django_project

django_project.configure("drf_knox", "knox")

from django.contrib.auth import get_user_model
from django.core.wsgi import get_wsgi_application
from django.urls import path
from knox.auth import TokenAuthentication
from knox.models import AuthToken
from rest_framework.permissions import IsAuthenticated
from rest_framework.response import Response
from rest_framework.views import APIView


class Open(APIView):
    authentication_classes = []
    permission_classes = []

    def get(self, request):
        return Response("hello")


class Protected(Open):
    authentication_classes = [TokenAuthentication]
    permission_classes = [IsAuthenticated]


urlpatterns = [path("open", Open.as_view()), path("protected", Protected.as_view())]
app = get_wsgi_application()

if __name__ == "__main__":
    django_project.migrate()
    print(AuthToken.objects.create(get_user_model().objects.create_user("me"))[1])
