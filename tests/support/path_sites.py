"""One small site in every framework, behind the middleware: views say which of them was called.

The same paths, rules and public paths everywhere, with what is special to a router beside them:
slashes that do not matter, suffixes, mounted apps, expressions that ignore letter case. `ALLOWED`
says who may get to which view; `path_space` makes the paths.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from keylatch.asgi import APIKeyMiddleware
from keylatch.engine import Engine
from keylatch.settings import Settings
from keylatch.wsgi import APIKeyMiddleware as WSGIMiddleware

ANONYMOUS: Final = "anonymous"
SENDING: Final = "SENDING"
FULL: Final = "FULL"
VIEW: Final = "x-view"
"""The header by which a view says that it was called."""

BuildMiddleware = Callable[..., Any]

RULES: Final[dict[str, Any]] = {
    "public": ["/healthz", "/docs/{page}", "/users/{name}"],
    "permissions": {
        SENDING: [
            *("GET /v1/emails/{id}", "POST /v1/emails/{id}", "POST /v1/batch"),
            *("GET /v1/files/{p:path}", "GET /alias/{a}/{b}", "GET /mounted/{id}"),
        ],
        FULL: [
            *("GET /v1/emails/export", "POST /v1/emails/purge", "GET /users/me"),
            *("GET /v1/files/export", "GET /mounted/export"),
        ],
    },
}

_EVERY_CALLER: Final = frozenset({ANONYMOUS, SENDING, FULL})
_SENDERS: Final = frozenset({SENDING, FULL})
_FULL: Final = frozenset({FULL})

ALLOWED: Final[Mapping[str, Mapping[str, frozenset[str]]]] = {
    "healthz": {"GET": _EVERY_CALLER},
    "docs": {"GET": _EVERY_CALLER, "DELETE": _FULL},
    "profile": {"GET": _EVERY_CALLER, "DELETE": _FULL},
    "me": {"GET": _FULL},
    "email": {"GET": _SENDERS, "POST": _SENDERS, "DELETE": _FULL},
    "file": {"GET": _SENDERS},
    "batch": {"POST": _SENDERS},
    "export": {"GET": _FULL},
    "files export": {"GET": _FULL},
    "purge": {"POST": _FULL},
    "secret": {"GET": _FULL},
    "mounted": {"GET": _SENDERS},
    "mounted export": {"GET": _FULL},
}
"""For each view and method the keys that may call it; HEAD follows GET."""

ROUTES: Final = (
    ("/healthz", "healthz", "GET"),
    ("/secret", "secret", "GET"),
    ("/users/me", "me", "GET"),
    ("/v1/emails/export", "export", "GET"),
    ("/v1/emails/purge", "purge", "POST"),
    ("/v1/files/export", "files export", "GET"),
    ("/v1/batch", "batch", "POST"),
    ("/alias/<x>/export", "export", "GET"),
    ("/docs/<page>", "docs", "GET"),
    ("/docs/<page>", "docs", "DELETE"),
    ("/users/<name>", "profile", "GET"),
    ("/users/<name>", "profile", "DELETE"),
    ("/v1/emails/<id>", "email", "GET"),
    ("/v1/emails/<id>", "email", "POST"),
    ("/v1/emails/<id>", "email", "DELETE"),
    ("/v1/files/<path:p>", "file", "GET"),
)
MOUNTED: Final = (("/export", "mounted export"), ("/<id>", "mounted"))


def _braced(path: str) -> str:
    return path.replace("<path:p>", "{p:path}").replace("<", "{").replace(">", "}")


def starlette_app() -> Any:
    """With a mounted router."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route

    def say(name: str) -> Any:
        async def view(request: Request) -> PlainTextResponse:
            return PlainTextResponse(name, headers={VIEW: name})

        return view

    views = {name: say(name) for name in ALLOWED}
    routes = [Route(_braced(path), views[name], methods=[on]) for path, name, on in ROUTES]
    inner = [Route(_braced(path), views[name]) for path, name in MOUNTED]
    return Starlette(routes=[*routes, Mount("/mounted", routes=inner)])


def fastapi_app() -> Any:
    """With routers in routers, and a mounted app."""
    from fastapi import APIRouter, FastAPI, Request
    from fastapi.responses import PlainTextResponse

    def say(name: str) -> Any:
        async def view(request: Request) -> PlainTextResponse:
            return PlainTextResponse(name, headers={VIEW: name})

        return view

    views = {name: say(name) for name in ALLOWED}
    app, mounted = FastAPI(openapi_url=None), FastAPI(openapi_url=None)
    outer, emails = APIRouter(prefix="/v1"), APIRouter(prefix="/emails")
    for path, name, method in ROUTES:
        within: Any = app
        shortened = _braced(path)
        for router, prefix in ((outer, "/v1"), (emails, "/v1/emails")):
            if path.startswith(prefix + "/"):
                within, shortened = router, _braced(path)[len(prefix) :]
        within.add_api_route(shortened, views[name], methods=[method])
    outer.include_router(emails)
    app.include_router(outer)
    for path, name in MOUNTED:
        mounted.add_api_route(_braced(path), views[name])
    app.mount("/mounted", mounted)
    return app


def fastapi_declared(gate: BuildMiddleware) -> Any:
    """Permissions from the routes, and public paths that name a route each."""
    from fastapi import FastAPI, Request, Security
    from fastapi.responses import PlainTextResponse

    from keylatch.fastapi import APIKey, permissions_of

    def say(name: str) -> Any:
        async def view(request: Request) -> PlainTextResponse:
            return PlainTextResponse(name, headers={VIEW: name})

        return view

    app, api_key = FastAPI(openapi_url=None), APIKey()
    for path, name, method in ROUTES:
        callers = ALLOWED[name][method]
        scope = SENDING if SENDING in callers and ANONYMOUS not in callers else FULL
        is_bare = name == "secret" or ANONYMOUS in ALLOWED[name].get("GET", ())
        dependencies = [] if is_bare else [Security(api_key, scopes=[scope])]
        app.add_api_route(_braced(path), say(name), methods=[method], dependencies=dependencies)
    return gate(app, public=RULES["public"], permissions=permissions_of(app))


def litestar_app() -> Any:
    """Its router takes a path with a slash at the end for the one without."""
    from litestar import Litestar, Request, Response
    from litestar.handlers import HTTPRouteHandler

    def say(name: str) -> Any:
        async def view(request: Request[Any, Any, Any]) -> Response[str]:
            return Response(name, headers={VIEW: name})

        return view

    paths: dict[tuple[str, str], list[str]] = {}
    for path, name, method in (*ROUTES, *((f"/mounted{p}", n, "GET") for p, n in MOUNTED)):
        braced = _braced(path).replace("}", ":str}").replace(":path:str", ":path")
        paths.setdefault((name, method), []).append(braced)
    handlers = [
        HTTPRouteHandler(
            named,
            http_method=method,  # type: ignore[arg-type]
            status_code=200,
        )(say(name))
        for (name, method), named in paths.items()
    ]
    return Litestar(handlers, openapi_config=None)


def _with_rules(app: Any, respond: Callable[[str], Any], mounts: bool = True) -> Any:
    """Flask's and Quart's routes; endpoints of one name are one view."""
    mounted = [(f"/mounted{path}", name, "GET") for path, name in MOUNTED if mounts]
    for path, name, method in (*ROUTES, *mounted):
        endpoint = f"{name} {method}"
        app.add_url_rule(path, endpoint, respond(name), methods=[method])
    return app


def flask_app() -> Any:
    """A slash at the end does not matter; and another Flask is dispatched to."""
    from flask import Flask, make_response
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    views: dict[str, Any] = {}

    def respond(name: str) -> Any:
        def view(**_: str) -> Any:
            return make_response(name, {VIEW: name})

        return views.setdefault(name, view)

    app, mounted = Flask("app", static_folder=None), Flask("mounted", static_folder=None)
    for each in (app, mounted):
        each.url_map.strict_slashes = False
    _with_rules(app, respond, mounts=False)
    for path, name in MOUNTED:
        mounted.add_url_rule(path, name, respond(name))
    return DispatcherMiddleware(app.wsgi_app, {"/mounted": mounted.wsgi_app})


def flask_declared(gate: BuildMiddleware) -> Any:
    """Permissions from the views, some of which declare nothing: those are for FULL."""
    from flask import Flask, make_response

    from keylatch.flask import permissions_of, requires

    app = Flask("app", static_folder=None)
    app.url_map.strict_slashes = False

    def say(name: str) -> Any:
        def view(**_: str) -> Any:
            return make_response(name, {VIEW: name})

        return view

    for path, name, method in ROUTES:
        callers = ALLOWED[name][method]
        view = say(name)
        if SENDING in callers and ANONYMOUS not in callers:
            view = requires(SENDING)(view)
        elif name == "me" or (name, method) == ("email", "DELETE"):
            view = requires(FULL)(view)
        bare_path = path + "/" if name in ("export", "purge") else path
        if name != "files export":
            app.add_url_rule(bare_path, f"{name} {method} {path}", view, methods=[method])
    app.wsgi_app = gate(  # type: ignore[method-assign]
        app.wsgi_app, public=RULES["public"], permissions=permissions_of(app)
    )
    return app


def quart_app() -> Any:
    """Flask's router over ASGI."""
    from quart import Quart, make_response

    views: dict[str, Any] = {}

    def respond(name: str) -> Any:
        async def view(**_: str) -> Any:
            response = await make_response(name)
            response.headers[VIEW] = name
            return response

        return views.setdefault(name, view)

    app = Quart("app", static_folder=None)
    app.url_map.strict_slashes = False
    return _with_rules(app, respond)


def plain_app() -> Any:
    """What is written by hand: letter case, a slash at the end and a suffix do not matter."""
    literal = {path: name for path, name, method in ROUTES if "<" not in path and method == "GET"}
    literal["/mounted/export"] = "mounted export"
    prefixes = {"/docs/": "docs", "/users/": "profile", "/v1/emails/": "email"}
    prefixes |= {"/v1/files/": "file", "/mounted/": "mounted"}

    def name_of(path: str) -> str | None:
        plain = path.lower().rstrip("/")
        plain = plain.rsplit(".", 1)[0] if "." in plain.rsplit("/", 1)[-1] else plain
        if plain in literal:
            return literal[plain]
        return next((name for each, name in prefixes.items() if path.startswith(each)), None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        name = name_of(scope["path"]) if scope["method"] in ("GET", "HEAD") else None
        headers = [(VIEW.encode(), name.encode())] if name else []
        status = 200 if name else 404
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    return app


def _django_urls() -> Sequence[Any]:
    """Expressions that end in `$`, one without regard to letter case, REST framework's suffixes."""
    from django.http import HttpRequest, HttpResponse
    from django.urls import path, re_path
    from rest_framework.decorators import (
        api_view,
        authentication_classes,
        permission_classes,
        renderer_classes,
    )
    from rest_framework.renderers import JSONRenderer
    from rest_framework.response import Response
    from rest_framework.urlpatterns import format_suffix_patterns

    def say(*names: tuple[str, str]) -> Any:
        by_method = dict(names)

        def view(request: HttpRequest, **_: str) -> HttpResponse:
            method = "GET" if request.method == "HEAD" else str(request.method)
            name = by_method.get(method)
            return HttpResponse(name, headers={VIEW: name}) if name else HttpResponse(status=405)

        return view

    def rest(name: str) -> Any:
        @api_view(["GET"])
        @renderer_classes([JSONRenderer])
        @authentication_classes([])
        @permission_classes([])
        def view(request: Any, **_: str) -> Response:
            return Response(name, headers={VIEW: name})

        return view

    export = say(("GET", "export"))
    return [
        path("healthz", say(("GET", "healthz"))),
        re_path(r"^secret$", say(("GET", "secret"))),
        re_path(r"(?i)^users/me$", say(("GET", "me"))),
        re_path(r"^v1/emails/export/?$", export),
        re_path(r"^v1/emails/purge$", say(("POST", "purge"))),
        path("v1/files/export", say(("GET", "files export"))),
        path("v1/batch", say(("POST", "batch"))),
        path("alias/<x>/export", export),
        path("docs/<page>", say(("GET", "docs"), ("DELETE", "docs"))),
        re_path(r"^users/(?P<name>[^/]+)$", say(("GET", "profile"), ("DELETE", "profile"))),
        path("v1/emails/<id>", say(("GET", "email"), ("POST", "email"), ("DELETE", "email"))),
        path("v1/files/<path:p>", say(("GET", "file"))),
        *format_suffix_patterns(
            [path("mounted/export", rest("mounted export")), path("mounted/<id>", rest("mounted"))]
        ),
    ]


def configure_django(engine: Engine) -> None:
    """The settings of the project; once in a process."""
    import django
    from django.conf import settings

    settings.configure(
        ALLOWED_HOSTS=["*"],
        DEBUG=False,
        APPEND_SLASH=True,
        ROOT_URLCONF="tests.support.path_sites",
        MIDDLEWARE=[
            "keylatch.django.APIKeyMiddleware",
            "django.middleware.common.CommonMiddleware",
        ],
        KEYLATCH={"engine": engine, **RULES},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "rest_framework"],
        REST_FRAMEWORK={"DEFAULT_AUTHENTICATION_CLASSES": []},
        LOGGING_CONFIG=None,
    )
    django.setup()


def __getattr__(name: str) -> Any:
    """`urlpatterns`, when Django looks for them."""
    if name != "urlpatterns":
        raise AttributeError(name)
    return _django_urls()


def built(name: str) -> Any:
    """A site for a server, with the keys of its environment."""
    engine = Engine(Settings.load())
    if name in DJANGO:
        configure_django(engine)
        return DJANGO[name]()
    return SITES[name](partial(middleware_of(name), engine=engine))


def middleware_of(name: str) -> BuildMiddleware:
    """The middleware in the protocol of a site."""
    return WSGIMiddleware if name.startswith("flask") else APIKeyMiddleware


def _site(build: Callable[[], Any]) -> Callable[[BuildMiddleware], Any]:
    return lambda gate: gate(build(), **RULES)


def _django_wsgi() -> Any:
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()


def _django_asgi() -> Any:
    from keylatch.django import get_asgi_application

    return get_asgi_application()


SITES: Final[Mapping[str, Callable[[BuildMiddleware], Any]]] = {
    "starlette": _site(starlette_app),
    "fastapi": _site(fastapi_app),
    "fastapi_declared": fastapi_declared,
    "litestar": _site(litestar_app),
    "quart": _site(quart_app),
    "plain": _site(plain_app),
    "flask": _site(flask_app),
    "flask_declared": flask_declared,
}
DJANGO: Final[Mapping[str, Callable[[], Any]]] = {
    "django_wsgi": _django_wsgi,
    "django_asgi": _django_asgi,
}
