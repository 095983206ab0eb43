"""A Django project for tests: views that declare, in plain Django, REST framework and Ninja."""

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View
from ninja import NinjaAPI
from rest_framework.decorators import api_view
from rest_framework.response import Response
from rest_framework.throttling import UserRateThrottle
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from keylatch.django import requires, requires_any
from keylatch.django_ninja import APIKeyAuth


def who(request: HttpRequest, **_: Any) -> HttpResponse:
    """Returns the principal."""
    return HttpResponse(request.api_key.display_name or "anonymous")


async def who_async(request: HttpRequest) -> HttpResponse:
    """Returns the principal, on the loop."""
    return who(request)


class Drafts(View):
    """Declares by method."""

    @method_decorator(requires("READING"))
    def get(self, request: HttpRequest) -> HttpResponse:
        return who(request)

    def post(self, request: HttpRequest) -> HttpResponse:
        return who(request)


class AsyncDrafts(View):
    """The same, on the loop."""

    @method_decorator(requires("READING"))
    async def get(self, request: HttpRequest) -> HttpResponse:
        return who(request)


@method_decorator(requires("SENDING"), name="dispatch")
class Outbox(View):
    """Declares for every method."""

    def get(self, request: HttpRequest) -> HttpResponse:
        return who(request)


def headers_seen(request: HttpRequest) -> HttpResponse:
    """What is left of headers that pose as keylatch's."""
    return HttpResponse(request.headers.get("X-Keylatch-Key-Id", "none"))


class OncePerMinute(UserRateThrottle):
    """Counts by the user, which is the key."""

    rate = "1/min"


@requires("SENDING")
@api_view(["POST"])
def rest_emails(request: Any) -> Response:
    """A function of REST framework."""
    return Response({"name": request.user.key_name, "permission": request.auth})


class RestMe(APIView):
    """A class of REST framework, for FULL."""

    throttle_classes = (OncePerMinute,)

    def get(self, request: Any) -> Response:
        return Response({"name": request.user.key_name})


class RestDrafts(ViewSet):
    """Actions of REST framework, each with its own permission."""

    @method_decorator(requires("READING"))
    def list(self, request: Any) -> Response:
        return Response(["a", "b"])

    def create(self, request: Any) -> Response:
        return Response("c")


api = NinjaAPI(auth=APIKeyAuth())


@api.post("/emails", auth=APIKeyAuth("SENDING"))
def ninja_emails(request: Any) -> dict[str, str]:
    """An operation of Ninja."""
    return {"name": request.auth.key_name}


@api.get("/emails", auth=APIKeyAuth("FULL"))
async def ninja_sent(request: Any) -> dict[str, str]:
    """An operation for FULL, on the loop."""
    return {"name": request.auth.key_name}


urlpatterns = [
    path("", who),
    path("async", who_async),
    path("open", who),
    path("open/strict", requires("SENDING")(who)),
    path("headers", headers_seen),
    path("v1/batch", requires("READING")(who)),
    path("v1/emails", requires("SENDING")(who)),
    path("v1/emails/<int:number>", requires("SENDING")(who)),
    path("v1/emails/async", requires_any("SENDING", "READING")(who_async)),
    path("v1/drafts", Drafts.as_view()),
    path("v1/drafts/async", AsyncDrafts.as_view()),
    path("v1/outbox", Outbox.as_view()),
    path("rest/emails", rest_emails),
    path("rest/me", RestMe.as_view()),
    path("rest/open", RestMe.as_view()),
    path("rest/drafts", RestDrafts.as_view({"get": "list", "post": "create"})),
    path("ninja/", api.urls),
]
