"""One meaning for a path: the view that a router chooses is one that this key may call.

The property is tried on generated targets (`path_space`) against one site in every framework
(`path_sites`), in this process and on real servers. A twin that compares text must be caught by it.
"""

import asyncio
import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.test import override_settings

import path_sites
import test_django  # which sets Django up
from conftest import Times
from keylatch.django import APIKeyMiddleware as DjangoMiddleware
from keylatch.testing import Keys
from path_sites import ALLOWED, FULL, NOBODY, RULES, SENDING, SITES, VIEW
from path_space import Target, TextPolicy, environ_of, scope_of, targets

assert test_django

IN_PROCESS: Final = (*SITES, "django_wsgi", "django_asgi")
HANDLERS: Final = {"django_wsgi": WSGIHandler, "django_asgi": ASGIHandler}
OVER_WSGI: Final = ("flask", "flask_declared", "django_wsgi")
CALLERS: Final = (NOBODY, SENDING)


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
        self._headers[NOBODY] = {}
        self._stack = contextlib.ExitStack()
        self._runner = self._stack.enter_context(asyncio.Runner())
        self._app = self._made() if name in SITES else self._django()

    def _made(self) -> Any:
        gate = path_sites.gate_of(self._name)

        def protect(app: Any, **rules: Any) -> Any:
            made = gate(app, engine=self._keys.engine(), **rules)
            if self._is_twin:
                made._policy = TextPolicy(**rules)
            return made

        return SITES[self._name](protect)

    def _django(self) -> Any:
        middleware = DjangoTwin if self._is_twin else DjangoMiddleware
        self._stack.enter_context(
            override_settings(
                ROOT_URLCONF="path_sites",
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
        **{f"HTTP_{name.upper()}": value for name, value in headers.items()},
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


def wrong_calls(site: Any, tried: Iterator[Target]) -> tuple[list[str], Counter[tuple[str, str]]]:
    """Every call of a view that this caller may not call, and how often each was called at all."""
    wrong: list[str] = []
    called: Counter[tuple[str, str]] = Counter()
    for target in tried:
        for caller in CALLERS:
            name = site.view(target, caller)
            if name is not None:
                called[name, caller] += 1
                if caller not in callers_of(name, target.method):
                    wrong.append(f"{caller} called {name!r} by {target}")
    return wrong, called


def callers_of(name: str, method: str) -> frozenset[str]:
    """Who may call a view by a method. Frameworks take `get` for GET."""
    method = method.upper()
    return ALLOWED[name].get("GET" if method == "HEAD" else method, frozenset({FULL}))


@pytest.mark.parametrize("name", IN_PROCESS)
def test_no_path_leads_to_a_view_that_the_key_may_not_call(name: str, times: Times) -> None:
    """Control characters, slashes, dots, encodings, letter case, Unicode forms, suffixes, root
    paths and mounts: whatever the router makes of them, with a SENDING key and with none."""
    with Site(name) as site:
        wrong, called = wrong_calls(site, targets(seed=1, count=times(400, 12_000)))
    assert wrong == []
    assert called["docs", NOBODY] > 0, "what is public is served"
    assert called["email", SENDING] > 0, "and what the rules open"


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_twin_that_compares_text_is_caught(name: str) -> None:
    """The same property fails for it, on every router."""
    with Site(name, is_twin=True) as twin:
        wrong, _ = wrong_calls(twin, targets(seed=1, count=400))
    assert len(wrong) >= 1
