"""Django: one middleware for WSGI and ASGI, and what REST framework and Ninja make of its key."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import django
import pytest
from django.conf import settings
from django.http import HttpRequest
from django.test import AsyncClient, Client, override_settings

from conftest import MakeEngine
from keylatch.django import APIKeyMiddleware
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.hashing import CHEAPEST, Hasher
from keylatch.testing import Keys
from keylatch.tokens import Token
from servers import said_without

RULES = {"SENDING": ["POST /v1/batch", "POST /ninja/emails", "GET /ninja/emails"]}
PUBLIC = ["/open", "/open/strict", "/rest/open", "/ninja/openapi.json"]

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF="worker_django",
    MIDDLEWARE=[f"{__name__}.Remembered"],
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": ["keylatch.django_rest.APIKeyAuthentication"],
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
        "UNAUTHENTICATED_USER": None,
    },
)
django.setup()


class Remembered(APIKeyMiddleware):
    """Django hides its middlewares; the tests want to close them."""

    opened: ClassVar[list[APIKeyMiddleware]] = []

    def _prepare(self) -> None:
        super()._prepare()
        self.opened.append(self)


def look_at_headers(get_response: Any) -> Any:
    """A middleware that stands before keylatch's and reads the headers."""

    def middleware(request: HttpRequest) -> Any:
        assert request.headers
        return get_response(request)

    return middleware


def project(engine: Engine) -> Any:
    """The setting of a project whose keys this engine knows."""
    return override_settings(KEYLATCH={"engine": engine, "public": PUBLIC, "permissions": RULES})


@pytest.fixture
def keys() -> Iterator[Keys]:
    """Keys of a project."""
    keys = Keys(permissions="FULL,SENDING,READING")
    with project(keys.engine()):
        yield keys
    while Remembered.opened:
        Remembered.opened.pop().close()


def test_a_view_knows_its_caller(keys: Keys) -> None:
    """`request.api_key` is the principal; nobody on a public path; async views as well."""
    key = keys.create("Ada")
    client = Client()
    assert client.get("/", headers=key.headers).content == b"Ada"
    assert client.get("/async", headers=key.headers).content == b"Ada"
    assert client.get("/open", headers=key.headers).content == b"nobody"
    assert client.get("/").status_code == 401
    keys.revoke(key)
    assert client.get("/", headers=key.headers).status_code == 401


def test_over_asgi_it_is_the_same(keys: Keys) -> None:
    """Allowed, refused, public and declared, by the async side of the middleware."""
    small = keys.create("Ada", permission="SENDING").headers

    async def ask(path: str, **headers: str) -> tuple[int, bytes]:
        answer = await AsyncClient().get(path, headers=headers)
        return answer.status_code, answer.content

    async def story() -> None:
        assert await ask("/v1/emails/async", **small) == (200, b"Ada")
        assert await ask("/v1/emails", **small) == (200, b"Ada")
        assert await ask("/open") == (200, b"nobody")
        assert (await ask("/async"))[0] == 401
        assert (await ask("/async", **small))[0] == 403
        assert (await ask("/v1/drafts/async", **small))[0] == 403
        reader = keys.create("Bo", permission="READING").headers
        assert await ask("/v1/drafts/async", **reader) == (200, b"Bo")

    asyncio.run(story())


class HeldHasher(Hasher):
    """Holds its verifications until told."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST)
        self.held = threading.Event()
        self.go = threading.Event()
        self.go.set()

    async def verify(self, hashed: str, token: Token) -> bool:
        self.held.set()
        await asyncio.to_thread(self.go.wait, 20)
        return await super().verify(hashed, token)


def test_a_miss_does_not_block_the_loop(make_engine: MakeEngine) -> None:
    """While one request waits for a hash, another on the same loop is answered from memory."""
    hasher = HeldHasher()

    async def story() -> None:
        manager = make_engine()
        keyring = await manager.keyring()
        tokens = [(await keyring.create("default", name)).token.reveal() for name in "ab"]
        await manager.stop()
        cached, cold = ({"Authorization": f"Bearer {token}"} for token in tokens)
        client = AsyncClient()
        assert (await client.get("/async", headers=cached)).content == b"a"
        hasher.go.clear()
        hasher.held.clear()
        slow = asyncio.create_task(client.get("/async", headers=cold))
        assert await asyncio.to_thread(hasher.held.wait, 20)
        assert (await client.get("/async", headers=cached)).content == b"a"
        assert not slow.done()
        hasher.go.set()
        assert (await slow).content == b"b"

    with project(make_engine(hasher=hasher)):
        asyncio.run(story())
    while Remembered.opened:
        Remembered.opened.pop().close()


def test_a_key_may_call_what_views_declare(keys: Keys) -> None:
    """Functions, classes and methods of classes; whatever declares nothing is for FULL."""
    client = Client()
    sender = keys.create(permission="SENDING").headers
    reader = keys.create(permission="READING").headers
    full = keys.create().headers
    for method, where, allowed in (
        ("post", "/v1/emails", sender),
        ("get", "/v1/emails/7", sender),
        ("get", "/v1/emails/async", reader),
        ("get", "/v1/drafts", reader),
        ("head", "/v1/drafts", reader),
        ("get", "/v1/drafts/async", reader),
        ("get", "/v1/outbox", sender),
        ("post", "/v1/drafts", full),
        ("get", "/", full),
    ):
        for headers in (sender, reader, full):
            status = client.generic(method.upper(), where, headers=headers).status_code
            may = headers in (full, allowed) or where == "/v1/emails/async"
            assert status == (200 if may else 403), (method, where)
    assert client.get("/nowhere", headers=sender).status_code == 403
    assert client.get("/nowhere", headers=full).status_code == 404


def test_the_view_refuses_as_the_middleware_does(keys: Keys) -> None:
    """Where the settings let more pass than a view asks for: the very same answer."""
    sender = keys.create(permission="SENDING").headers
    by_view = Client().post("/v1/batch", headers=sender)
    by_middleware = Client().get("/v1/batch", headers=sender)
    assert by_view.status_code == by_middleware.status_code == 403
    assert by_view.content == by_middleware.content
    assert by_view.headers == by_middleware.headers
    assert by_view.headers["www-authenticate"].endswith('scope="READING"')

    async def story() -> None:
        answer = await AsyncClient().get("/v1/batch", headers=sender)
        assert (answer.content, answer.headers) == (by_view.content, by_view.headers)

    asyncio.run(story())


def test_a_public_path_is_for_nobody_where_a_view_requires_somebody(keys: Keys) -> None:
    """The contradiction is refused: no key is looked at on a public path. HEAD has no body."""
    answer = Client().get("/open/strict", headers=keys.create().headers)
    assert (answer.status_code, answer["x-keylatch-error"]) == (401, "unauthorized")
    head = Client().head("/open/strict")
    assert (head.status_code, head.headers, head.content) == (401, answer.headers, b"")


def test_headers_that_pose_as_identity_are_gone(keys: Keys) -> None:
    """Also where somebody has looked at the headers before."""
    headers = {**keys.create().headers, "X-Keylatch-Key-Id": "key_boss"}
    assert Client().get("/headers", headers=headers).content == b"none"
    with override_settings(MIDDLEWARE=[f"{__name__}.look_at_headers", f"{__name__}.Remembered"]):
        assert Client().get("/headers", headers=headers).content == b"none"


def test_many_handlers_share_an_engine(keys: Keys) -> None:
    """Django builds its middleware for each test client; the engine still has one loop."""
    key = keys.create().headers
    answered = [Client().get("/", headers=key).status_code for _ in range(3)]
    assert answered == [200] * 3
    assert len({id(each._portal) for each in Remembered.opened}) == 1


def test_all_mistakes_at_once() -> None:
    """Unknown names, wrong settings and wrong rules: each with a hint."""
    wrong = {"stor": "x", "lease": -1, "public": ["open"], "permissions": {"SENDING": ["POST"]}}
    with override_settings(KEYLATCH=wrong), pytest.raises(ConfigurationError) as raised:
        APIKeyMiddleware(lambda request: request)
    mistakes = [mistake for mistake, _ in raised.value.mistakes]
    assert [mistake.split(" ")[0].rstrip(":") for mistake in mistakes] == [
        "KEYLATCH['stor']",
        "KEYLATCH_LEASE",
        "public",
        "rule",
    ]


def test_rest_framework_knows_the_key(keys: Keys) -> None:
    """`request.user` is the principal, `request.auth` its permission, by view or by action."""
    client = Client()
    sender = keys.create("Ada", permission="SENDING").headers
    reader = keys.create("Bo", permission="READING").headers
    answer = client.post("/rest/emails", headers=sender)
    assert answer.json() == {"name": "Ada", "permission": "SENDING"}
    assert client.get("/rest/me", headers=sender).status_code == 403
    assert client.get("/rest/me", headers=keys.create("Cy").headers).json() == {"name": "Cy"}
    assert client.get("/rest/drafts", headers=reader).json() == ["a", "b"]
    assert client.post("/rest/drafts", headers=reader).status_code == 403


def test_rest_framework_throttles_by_the_key(keys: Keys) -> None:
    """Each key has its own allowance."""
    ada, bo = keys.create().headers, keys.create().headers
    asked = [Client().get("/rest/me", headers=headers).status_code for headers in (ada, ada, bo)]
    assert asked == [200, 429, 200]


def test_rest_framework_answers_401_on_public_paths(keys: Keys) -> None:
    """A view that wants somebody there gives the challenge."""
    answer = Client().get("/rest/open", headers=keys.create().headers)
    assert (answer.status_code, answer["WWW-Authenticate"]) == (401, 'Bearer realm="keylatch"')


def test_ninja_knows_the_key(keys: Keys) -> None:
    """`request.auth` is the principal; an operation may ask for more than the settings do."""
    client = Client()
    sender = keys.create("Ada", permission="SENDING").headers
    assert client.post("/ninja/emails", headers=sender).json() == {"name": "Ada"}
    refused = client.get("/ninja/emails", headers=sender)
    assert (refused.status_code, refused.json()) == (
        403,
        {"detail": "The API key may not do this"},
    )
    assert client.get("/ninja/emails", headers=keys.create("Bo").headers).json() == {"name": "Bo"}


def test_ninja_shows_the_scheme(keys: Keys) -> None:
    """OpenAPI says how to send the key, and so does the documentation's Authorize button."""
    schema = Client().get("/ninja/openapi.json").json()
    assert schema["components"]["securitySchemes"] == {
        "APIKeyAuth": {"type": "http", "scheme": "bearer"}
    }
    assert schema["paths"]["/ninja/emails"]["post"]["security"] == [{"APIKeyAuth": []}]


def test_without_the_middleware_nobody_is_let_in(keys: Keys) -> None:
    """Decorators and authentication classes alone say what is missing."""
    with override_settings(MIDDLEWARE=[]):
        for where in ("/v1/emails", "/rest/me", "/ninja/emails"):
            with pytest.raises(RuntimeError, match="MIDDLEWARE"):
                Client().post(where, headers=keys.create().headers)


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "module", "name"),
    [
        ("django", "keylatch.django", "Django"),
        ("rest_framework", "keylatch.django_rest", "djangorestframework"),
        ("ninja", "keylatch.django_ninja", "django-ninja"),
    ],
)
def test_without_a_package_it_says_what_to_install(package: str, module: str, name: str) -> None:
    """The import fails with the name of the package."""
    assert said_without(package, f"import {module}").endswith(f"pip install {name}")
