"""The sites of `path_sites` in this process, and which view a request gets to."""

import asyncio
import contextlib
import io
from collections.abc import Mapping
from typing import Any, Final

from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.test import override_settings

from keylatch.asgi import ProxyIdentityMiddleware
from keylatch.django import APIKeyMiddleware as DjangoMiddleware
from keylatch.testing import Keys
from tests import test_django  # which sets Django up
from tests.adapters.path_space import Target, TextPolicy, environ_of, scope_of
from tests.support import path_sites
from tests.support.path_sites import ANONYMOUS, FULL, RULES, SENDING, SITES, VIEW

assert test_django

IN_PROCESS: Final = (*SITES, "django_wsgi", "django_asgi", "proxied")
HANDLERS: Final = {"django_wsgi": WSGIHandler, "django_asgi": ASGIHandler}
IDENTITY: Final = {
    "x-keylatch-key-id": "key_a",
    "x-keylatch-key-name": "ci",
    "x-keylatch-organization-id": "acme",
    "x-keylatch-environment": "live",
}
PERMISSION: Final = "x-keylatch-permission"
OVER_WSGI: Final = ("flask", "flask_declared", "django_wsgi")


class DjangoTwin(DjangoMiddleware):
    """Compares text."""

    def __init__(self, get_response: Any) -> None:
        super().__init__(get_response)
        self._policy = TextPolicy(**RULES)  # type: ignore[assignment]


class Site:
    """A site with keys of every kind, in this process.

    Args:
        name: one of `IN_PROCESS`.
        is_twin: whether it compares text.
    """

    def __init__(self, name: str, is_twin: bool = False) -> None:
        self._name = name
        self._is_twin = is_twin
        self._keys = Keys()
        self._headers: dict[str, Mapping[str, str]] = {
            permission: self._keys.create(permission=permission).headers
            for permission in (SENDING, FULL)
        }
        if name == "proxied":
            self._headers = {each: IDENTITY | {PERMISSION: each} for each in (SENDING, FULL)}
        self._headers[ANONYMOUS] = {}
        self._stack = contextlib.ExitStack()
        self._runner = self._stack.enter_context(asyncio.Runner())
        self._app = self._django() if name in HANDLERS else self._made()

    def _made(self) -> Any:
        def protect(app: Any, **rules: Any) -> Any:
            if self._name == "proxied":
                made: Any = ProxyIdentityMiddleware(app, trusted=["127.0.0.1"], **rules)
            else:
                made = path_sites.middleware_of(self._name)(
                    app, engine=self._keys.engine(), **rules
                )
            if self._is_twin:
                made._policy = TextPolicy(**rules)
            return made

        return SITES["starlette" if self._name == "proxied" else self._name](protect)

    def _django(self) -> Any:
        middleware = DjangoTwin if self._is_twin else DjangoMiddleware
        self._stack.enter_context(
            override_settings(
                ROOT_URLCONF="tests.support.path_sites",
                APPEND_SLASH=True,
                MIDDLEWARE=[
                    f"{middleware.__module__}.{middleware.__name__}",
                    "django.middleware.common.CommonMiddleware",
                ],
                KEYLATCH={"engine": self._keys.engine(), **RULES},
            )
        )
        return HANDLERS[self._name]()

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def view(self, target: Target, caller: str) -> str | None:
        """Which view was called, if one was."""
        headers = self._headers[caller]
        if self._name in OVER_WSGI:
            return over_wsgi(self._app, target, headers)
        return self._runner.run(over_asgi(self._app, target, headers))


def over_wsgi(app: Any, target: Target, headers: Mapping[str, str]) -> str | None:
    """Which view of an app is called for a target."""
    environ = {
        **environ_of(target),
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers.items()},
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
    }
    said: list[tuple[str, str]] = []

    def start_response(status: str, fields: list[tuple[str, str]], error: Any = None) -> Any:
        said.extend(fields)

    answer = app(environ, start_response)
    list(answer)
    getattr(answer, "close", lambda: None)()
    return next((value for name, value in said if name.lower() == VIEW), None)


async def over_asgi(app: Any, target: Target, headers: Mapping[str, str]) -> str | None:
    """Which view of an app is called for a target."""
    scope = scope_of(target)
    scope["headers"] += [(name.lower().encode(), text.encode()) for name, text in headers.items()]
    said: list[tuple[bytes, bytes]] = []
    body = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        said.extend(message.get("headers", ()))

    await app(scope, receive, send)
    return next((value.decode() for name, value in said if name.lower() == VIEW.encode()), None)
