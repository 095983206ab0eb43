"""Django's views are judged as Django chooses them: in the request's language, and after whatever
the middlewares in between have made of it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from django.conf.urls.i18n import i18n_patterns
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from django.utils import translation
from werkzeug.test import Client as WSGIClient

from keylatch.django import APIKeyMiddleware, requires
from keylatch.testing import Keys
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware
from tests import test_django  # which sets Django up

assert test_django

LOCALE = "django.middleware.locale.LocaleMiddleware"
LANGUAGES = [("en", "English"), ("de", "German")]


def say(name: str) -> Callable[..., HttpResponse]:
    def view(request: HttpRequest, **_: str) -> HttpResponse:
        return HttpResponse(name)

    return view


def urls(**how: Any) -> tuple[Any, ...]:
    translated = (
        path("export", say("export, for FULL")),
        path("mail", requires("SENDING")(say("mail"))),
    )
    return (
        *i18n_patterns(*translated, **how),
        path("hidden/export", say("export, for FULL")),
        path("<path:page>", requires("SENDING")(say("page"))),
    )


class Twin(APIKeyMiddleware):
    """Looks views up before the language and the path are settled, and never again."""

    def __init__(self, get_response: Any) -> None:
        super().__init__(get_response)
        self.process_view = lambda *_: None


def moved(get_response: Any) -> Any:
    """A middleware after keylatch's that changes the path, the method or the URLconf."""

    def change(request: HttpRequest) -> HttpRequest:
        what = request.META.get("HTTP_X_MOVE")
        if what == "path":
            request.path_info = "/hidden/export"
        if what == "urlconf":
            request.urlconf = (path("page", say("export, for FULL")),)
        if what == "language":
            translation.activate("de")
        return request

    async def awaited(request: HttpRequest) -> Any:
        return await get_response(change(request))

    is_async = asyncio.iscoroutinefunction(get_response)
    return awaited if is_async else lambda request: get_response(change(request))


moved.sync_capable = moved.async_capable = True  # type: ignore[attr-defined]


def project(
    keys: Keys, *after: str, first: str = "keylatch.django.APIKeyMiddleware", **more: Any
) -> Any:
    how = {"ROOT_URLCONF": urls(), **more}
    given = {"engine": keys.engine(), "public": ["/open"]}
    return override_settings(
        MIDDLEWARE=[first, *after],
        KEYLATCH=given,
        USE_I18N=True,
        LANGUAGE_CODE="en",
        LANGUAGES=LANGUAGES,
        **how,
    )


PLACES = {"/en/export": 403, "/de/export": 403, "/en/mail": 200, "/de/mail": 200, "/page": 200}


@pytest.mark.parametrize("left", ["en", "de"])
@pytest.mark.parametrize("over", ["wsgi", "asgi"])
def test_a_view_is_looked_up_in_the_language_of_the_request(left: str, over: str) -> None:
    """Not in the one that another request has left in the thread, nor in the default one."""
    keys = Keys()
    headers = keys.create(permission="SENDING").headers

    def get(where: str) -> Any:
        if over == "wsgi":
            return Client().get(where, headers=headers)
        return asyncio.run(AsyncClient().get(where, headers=headers))

    with project(keys, LOCALE), translation.override(left):
        statuses = {where: get(where).status_code for where in PLACES}
        without_key = [Client().get(where).status_code for where in (*PLACES, "/nowhere")]
    assert statuses == PLACES
    assert without_key == [401] * 6


def test_a_default_language_without_a_prefix() -> None:
    """`/export` is English whatever the client prefers; nothing resolves below `/en/`."""
    keys = Keys()
    headers = {**keys.create(permission="SENDING").headers, "Accept-Language": "de"}
    with project(keys, LOCALE, ROOT_URLCONF=urls(prefix_default_language=False)[:2]):
        places = ("/export", "/de/export", "/mail", "/de/mail", "/en/mail", "/nowhere")
        statuses = [Client().get(each, headers=headers).status_code for each in places]
    assert statuses == [403, 403, 200, 200, 403, 403]


@pytest.mark.parametrize("what", ["path", "urlconf", "language"])
@pytest.mark.parametrize("over", ["wsgi", "asgi"])
def test_what_a_middleware_in_between_changes_allows_nothing(what: str, over: str) -> None:
    """The path, the URLconf, or the language by its own rules; not for keys without FULL, and on a
    public path for no request. A twin that checks only once lets each of them through."""
    keys = Keys()
    where = "/de/export" if what == "language" else "/page"

    def get(permission: str, first: str, path: str = where) -> Any:
        headers = {"X-Move": what}
        headers |= keys.create(permission=permission).headers if permission else {}
        with project(keys, f"{__name__}.moved", first=first), translation.override("en"):
            if over == "wsgi":
                return Client().get(path, headers=headers).status_code
            answer = AsyncClient().get(path, headers=headers)
            return asyncio.run(answer).status_code

    ours, twin = "keylatch.django.APIKeyMiddleware", f"{__name__}.Twin"
    assert [get("SENDING", ours), get("FULL", ours), get("", ours)] == [403, 200, 401]
    assert get("SENDING", twin) == 200
    if what == "path":
        assert [get("", each, "/open") for each in (ours, twin)] == [401, 200]


def test_wrapped_as_a_whole_django_is_asked_in_the_language_of_the_request() -> None:
    """By the middleware for WSGI, whose rules have a parameter."""
    keys = Keys()
    headers = keys.create(permission="SENDING").headers
    rules = {"FULL": ["GET /de/export"], "SENDING": ["GET /{a}/{b}"]}
    with project(keys, ROOT_URLCONF=urls()[:2]), override_settings(MIDDLEWARE=[LOCALE]):
        app = WSGIMiddleware(WSGIHandler(), engine=keys.engine(), permissions=rules)
        places = ("/de/export", "/en/export", "/de/mail", "/en/mail")
        with translation.override("en"):
            statuses = [WSGIClient(app).get(each, headers=headers).status_code for each in places]
    app.close()
    assert statuses == [403, 403, 200, 200]
