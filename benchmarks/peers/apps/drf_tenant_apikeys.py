"""django-tenant-apikeys: its authentication and its scopes on a view, a tenant for each key."""

import django_project

django_project.configure(
    "drf_tenant_apikeys",
    "django_tenant_apikeys",
    "tenants",
    TENANT_API_KEY_MODEL="tenants.OrganizationAPIKey",
)

from django.core.wsgi import get_wsgi_application
from django.urls import path
from django_tenant_apikeys.authentication import TenantAPIKeyAuthentication
from django_tenant_apikeys.permissions import HasAPIKeyScope
from rest_framework.response import Response
from rest_framework.views import APIView
from tenants.models import Organization, OrganizationAPIKey


class Open(APIView):
    authentication_classes = []
    permission_classes = []

    def get(self, request):
        return Response("hello")


class Protected(Open):
    authentication_classes = [TenantAPIKeyAuthentication]
    permission_classes = [HasAPIKeyScope]
    required_scopes = ["hello:read"]


urlpatterns = [path("open", Open.as_view()), path("protected", Protected.as_view())]
app = get_wsgi_application()

if __name__ == "__main__":
    django_project.migrate()
    tenant = Organization.objects.create(name="acme")
    given = {"name": "me", "tenant": tenant, "scopes": ["hello:read"]}
    print(OrganizationAPIKey.generate_key(**given)[1])
