"""Several permissions mean the same everywhere: all of them, unless the name says `any`."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import path
from fastapi import Depends, FastAPI, Security
from flask import Flask
from starlette.applications import Starlette
from starlette.authentication import requires as starlette_requires
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from keylatch import flask as keylatch_flask
from keylatch.asgi import APIKeyMiddleware
from keylatch.core.decisions import Principal
from keylatch.django import requires, requires_any
from keylatch.errors import ConfigurationError
from keylatch.fastapi import APIKey, permissions_of
from keylatch.testing import Keys
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from keylatch_sidecar.app import create_app
from keylatch_sidecar.settings import ProxySettings
from tests import test_django  # which sets Django up
from tests.support.raw_http import asgi_request

assert test_django

ALLOWED = {"FULL": 200, "SENDING": 403, "READING": 403, "OTHER": 403}
"""Of `SENDING` and `READING` together: a key has one permission, and only FULL includes both."""
ALLOWED_ANY = {"FULL": 200, "SENDING": 200, "READING": 200, "OTHER": 403}
NUMBERS = itertools.count()
RULES = {"SENDING": ["GET /x"], "READING": ["GET /x"]}


@pytest.fixture
def keys() -> Keys:
    return Keys(permissions=("FULL", "SENDING", "READING", "OTHER"))


async def asgi_status(app: Any, headers: dict[str, str], target: str = "/x") -> int:
    where, _, query = target.partition("?")
    fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return (await asgi_request(app, where, fields, query_string=query.encode())).status


async def starlette(keys: Keys, headers: dict[str, str]) -> int:
    @starlette_requires(["SENDING", "READING"])
    async def view(request: Request) -> Response:
        return Response("x")

    app = Starlette(routes=[Route("/x", view)])
    app.add_middleware(APIKeyMiddleware, engine=keys.engine(), permissions=RULES)
    return await asgi_status(app, headers)


async def starlette_rules(keys: Keys, headers: dict[str, str]) -> int:
    """A route that is named for two permissions: each of them can call it."""
    app = Starlette(routes=[Route("/x", lambda _: Response("x"))])
    app.add_middleware(APIKeyMiddleware, engine=keys.engine(), permissions=RULES)
    return await asgi_status(app, headers)


async def fastapi(keys: Keys, headers: dict[str, str]) -> int:
    app, api_key = FastAPI(), APIKey()

    @app.get("/x")
    async def view(
        key: Annotated[Principal, Security(api_key, scopes=["SENDING", "READING"])],
    ) -> str:
        return key.key_name

    app.add_middleware(APIKeyMiddleware, engine=keys.engine(), permissions=permissions_of(app))
    return await asgi_status(app, headers)


async def fastapi_any(keys: Keys, headers: dict[str, str]) -> int:
    app = FastAPI()

    @app.get("/x")
    async def view(
        key: Annotated[Principal, Depends(APIKey().requires_any("SENDING", "READING"))],
    ) -> str:
        return key.key_name

    app.add_middleware(APIKeyMiddleware, engine=keys.engine(), permissions=permissions_of(app))
    return await asgi_status(app, headers)


def flask_with(decorator: Callable[..., Any]) -> Callable[..., Awaitable[int]]:
    async def status(keys: Keys, headers: dict[str, str]) -> int:
        app = Flask("app")
        app.add_url_rule("/x", view_func=decorator("SENDING", "READING")(lambda: "x"))
        permissions = keylatch_flask.permissions_of(app)
        guarded = WSGIMiddleware(app.wsgi_app, engine=keys.engine(), permissions=permissions)
        app.wsgi_app = guarded  # type: ignore[method-assign]
        return app.test_client().get("/x", headers=headers).status_code

    return status


def django_with(route: Callable[[], Any]) -> Callable[..., Awaitable[int]]:
    async def status(keys: Keys, headers: dict[str, str]) -> int:
        def get() -> int:
            with override_settings(
                ROOT_URLCONF=(route(),),
                MIDDLEWARE=["keylatch.django.APIKeyMiddleware"],
                KEYLATCH={"engine": keys.engine(), "permissions": RULES},
            ):
                return int(Client().get("/x", headers=headers).status_code)

        return await asyncio.to_thread(get)

    return status


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse("x")


def rest_page(decorator: Any) -> Callable[[], Any]:
    def route() -> Any:
        from rest_framework.decorators import api_view
        from rest_framework.response import Response as RestResponse

        return path("x", decorator(api_view(["GET"])(lambda _: RestResponse("x"))))

    return route


def ninja(name: str) -> Callable[[], Any]:
    def route() -> Any:
        from ninja import NinjaAPI

        from keylatch.django_ninja import APIKeyAuth

        api = NinjaAPI(urls_namespace=f"{name}{next(NUMBERS)}")
        auth = APIKeyAuth if name == "all" else APIKeyAuth.requires_any
        api.get("/x", auth=auth("SENDING", "READING"))(lambda request: "x")
        return path("", api.urls)

    return route


async def verify(keys: Keys, headers: dict[str, str]) -> int:
    app = create_app(keys.engine(), ProxySettings())
    return await asgi_status(app, headers, "/verify?permission=SENDING&permission=READING")


async def ext_authz(keys: Keys, headers: dict[str, str]) -> int:
    app = create_app(keys.engine(), ProxySettings(ext_authz_request="none"))
    required = {"X-Keylatch-Require": "SENDING, READING"}
    return await asgi_status(app, headers | required, "/ext_authz/x")


ALL = {
    "Starlette's requires": starlette,
    "FastAPI scopes": fastapi,
    "Flask": flask_with(keylatch_flask.requires),
    "Django": django_with(lambda: path("x", requires("SENDING", "READING")(page))),
    "REST framework": django_with(rest_page(requires("SENDING", "READING"))),
    "Ninja": django_with(ninja("all")),
    "/verify": verify,
    "/ext_authz": ext_authz,
}
ANY = {
    "rules": starlette_rules,
    "FastAPI": fastapi_any,
    "Flask": flask_with(keylatch_flask.requires_any),
    "Django": django_with(lambda: path("x", requires_any("SENDING", "READING")(page))),
    "REST framework": django_with(rest_page(requires_any("SENDING", "READING"))),
    "Ninja": django_with(ninja("any")),
}


@pytest.mark.anyio
@pytest.mark.parametrize("permission", ALLOWED)
@pytest.mark.parametrize("framework", ALL)
async def test_several_permissions_are_all_required(
    keys: Keys, framework: str, permission: str
) -> None:
    """So a list that grows never lets more keys in. gRPC is compared with `/ext_authz`."""
    key = keys.create(permission=permission)
    assert await ALL[framework](keys, key.headers) == ALLOWED[permission]


@pytest.mark.anyio
@pytest.mark.parametrize("permission", ALLOWED_ANY)
@pytest.mark.parametrize("framework", ANY)
async def test_any_one_permission_suffices_where_the_name_says_so(
    keys: Keys, framework: str, permission: str
) -> None:
    """As for a route that rules name for each of several permissions."""
    key = keys.create(permission=permission)
    assert await ANY[framework](keys, key.headers) == ALLOWED_ANY[permission]


@pytest.mark.parametrize("declare", [keylatch_flask.requires, keylatch_flask.requires_any])
def test_a_view_that_names_no_permission_requires_full(declare: Callable[..., Any]) -> None:
    """An empty list does not mean every permission."""
    app = Flask("app")
    app.add_url_rule("/x", view_func=declare()(lambda: "x"))
    keys = Keys()
    app.wsgi_app = WSGIMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, engine=keys.engine(), permissions={"SENDING": ["GET /x"]}
    )
    get = app.test_client().get
    assert get("/x", headers=keys.create(permission="SENDING").headers).status_code == 403
    assert get("/x", headers=keys.create().headers).status_code == 200


def test_a_route_of_fastapi_combines_what_its_dependencies_require() -> None:
    """Each must be satisfied; what is left is what the middleware is given."""
    app, api_key = FastAPI(), APIKey()
    either = Security(api_key.requires_any("SENDING", "READING"))
    sending = Security(api_key, scopes=["SENDING"])
    other = Security(api_key, scopes=["OTHER"])
    app.add_api_route("/either", lambda: "x", dependencies=[either])
    app.add_api_route("/one", lambda: "x", dependencies=[either, sending])
    app.add_api_route("/none", lambda: "x", dependencies=[either, other])
    assert permissions_of(app) == {
        "READING": ["GET /either"],
        "SENDING": ["GET /either", "GET /one"],
    }
    with pytest.raises(ConfigurationError, match="'sending'"):
        api_key.requires_any("sending")
