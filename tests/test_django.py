"""Django: one middleware for WSGI and ASGI, and what REST framework and Ninja make of its key."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import django
import pytest
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path, register_converter
from django.utils.asyncio import async_unsafe

from keylatch.adapters.portal import Portal
from keylatch.authentication.hashing import CHEAPEST, Hasher, VerifyResult
from keylatch.core.decisions import FULL, Principal
from keylatch.core.tokens import Token
from keylatch.django import APIKeyMiddleware, keyring, requires
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError
from keylatch.management.keyring import Created
from keylatch.testing import Keys
from tests.support.engines import MakeEngine
from tests.support.servers import error_without_package
from tests.test_metrics import decided

RULES = {
    "SENDING": [
        "POST /v1/batch",
        "POST /ninja/emails",
        "GET /ninja/emails",
        "PUT /v1/books/{book}",
    ]
}
PUBLIC = ["/open", "/open/strict", "/rest/open", "/ninja/openapi.json"]

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF="tests.support.worker_django",
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

    def _on_engine_bound(self) -> None:
        super()._on_engine_bound()
        self.opened.append(self)


def look_at_headers(get_response: Any) -> Any:
    """A middleware that stands before keylatch's and reads the headers."""

    def middleware(request: HttpRequest) -> Any:
        assert request.headers
        return get_response(request)

    return middleware


def who(request: HttpRequest, **_: Any) -> HttpResponse:
    """A view that returns the principal."""
    return HttpResponse(request.api_key.display_name)


class BookConverter:
    """Asks a database, which Django permits on no thread with a running loop."""

    regex = "[a-z]+"
    threads: ClassVar[list[str]] = []

    def to_python(self, value: str) -> str:
        async_unsafe(self.threads.append)(threading.current_thread().name)
        return value

    def to_url(self, value: str) -> str:
        return value


register_converter(BookConverter, "book")


def for_a_tenant(get_response: Any) -> Any:
    """A middleware that stands before keylatch's and chooses the views."""

    def middleware(request: HttpRequest) -> Any:
        request.urlconf = (path("tenant", requires("SENDING")(who)),)
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
    """`request.api_key` is the principal; None on a public path; async views as well."""
    key = keys.create("Ada")
    client = Client()
    assert client.get("/", headers=key.headers).content == b"Ada"
    assert client.get("/async", headers=key.headers).content == b"Ada"
    assert client.get("/open", headers=key.headers).content == b"anonymous"
    assert client.get("/").status_code == 401
    keys.revoke(key)
    assert client.get("/", headers=key.headers).status_code == 401


def test_over_asgi_it_is_the_same(keys: Keys) -> None:
    """Allowed, refused, public and declared, by the async side of the middleware."""
    small = keys.create("Ada", permission="SENDING").headers

    async def request(path: str, **headers: str) -> tuple[int, bytes]:
        answer = await AsyncClient().get(path, headers=headers)
        return answer.status_code, answer.content

    async def scenario() -> None:
        assert await request("/v1/emails/async", **small) == (200, b"Ada")
        assert await request("/v1/emails", **small) == (200, b"Ada")
        assert await request("/open") == (200, b"anonymous")
        assert (await request("/async"))[0] == 401
        assert (await request("/async", **small))[0] == 403
        assert (await request("/v1/drafts/async", **small))[0] == 403
        reader = keys.create("Bo", permission="READING").headers
        assert await request("/v1/drafts/async", **reader) == (200, b"Bo")

    asyncio.run(scenario())


class HeldHasher(Hasher):
    """Blocks its verifications until released."""

    def __init__(self) -> None:
        super().__init__("argon2id", CHEAPEST)
        self.held = threading.Event()
        self.go = threading.Event()
        self.go.set()

    async def verify(self, hashed: str, token: Token) -> VerifyResult:
        self.held.set()
        await asyncio.to_thread(self.go.wait, 20)
        return await super().verify(hashed, token)


def test_a_miss_does_not_block_the_loop(make_engine: MakeEngine) -> None:
    """While one request waits for a hash, another on the same loop is answered from memory."""
    hasher = HeldHasher()

    async def scenario() -> None:
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
        asyncio.run(scenario())
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


async def over_asgi(method: str, where: str, key: Created) -> int:
    answer: Any = await AsyncClient().generic(method, where, headers=bearer(key))
    return int(answer.status_code)


def over_wsgi(method: str, where: str, key: Created) -> int:
    answer: Any = Client().generic(method, where, headers=bearer(key))
    return int(answer.status_code)


def bearer(key: Created) -> dict[str, str]:
    return {"Authorization": f"Bearer {key.token.reveal()}"}


@pytest.mark.parametrize("over", ["wsgi", "asgi"])
def test_a_request_counts_once_as_what_it_was(over: str, make_engine: MakeEngine) -> None:
    """Allowed or refused, by the view or by the rules, cached or not: metrics and the
    key's own usage agree with the answer."""
    engine = make_engine(permissions="FULL,SENDING,READING")
    portal = Portal.for_engine(engine)

    async def create(permission: str) -> Created:
        return await (await engine.keyring()).create("acme", "ci", permission=permission)

    async def uses(key: Created) -> tuple[int, dict[str, int]]:
        found = await (await engine.keyring()).usage("acme", key.record.id)
        assert found is not None
        return found.days[0].allowed, dict(found.days[0].refused)

    def request(method: str, where: str, key: Created) -> int:
        if over == "wsgi":
            return over_wsgi(method, where, key)
        return asyncio.run(over_asgi(method, where, key))

    sender, reader, full = (portal.run(create(each)) for each in ("SENDING", "READING", FULL))
    with project(engine):
        assert request("POST", "/v1/emails", sender) == 200  # the view's word, and the store's
        assert request("POST", "/v1/emails", sender) == 200
        assert request("POST", "/ninja/emails", sender) == 200  # the rules' word
        assert request("GET", "/v1/drafts", sender) == 403  # the view's
        assert request("GET", "/v1/emails", reader) == 403  # uncached
        assert request("GET", "/", reader) == 403  # nothing is declared
        assert request("GET", "/nowhere", reader) == 403
        assert request("GET", "/v1/drafts", reader) == 200
        assert request("GET", "/", full) == 200
        assert request("GET", "/nowhere", full) == 404
    assert decided(engine) == {
        "allow store": 2,
        "allow l1": 4,
        "insufficient_scope store": 1,
        "insufficient_scope l1": 3,
    }
    portal.close()
    assert portal.run(uses(sender)) == (3, {"INSUFFICIENT_SCOPE": 1})
    assert portal.run(uses(reader)) == (1, {"INSUFFICIENT_SCOPE": 3})
    assert portal.run(uses(full)) == (2, {})
    portal.close()


def test_a_view_is_looked_up_where_that_decides_and_nowhere_else(keys: Keys) -> None:
    """A path converter may ask a database: never for forged tokens, nor for keys that the rules let
    in, and in the request's own thread, also for a key that is seen for the first time. Django
    looks the view up once itself, to call it."""
    client, threads = Client(), BookConverter.threads
    books = (path("v1/books/<book:book>", requires("READING")(who)),)
    revoked = keys.create(permission="READING")
    keys.revoke(revoked)
    with override_settings(ROOT_URLCONF=books):
        for headers in ({}, {"Authorization": "Bearer kl_live_x"}, revoked.headers):
            assert client.get("/v1/books/emma", headers=headers).status_code == 401
        assert threads == []
        reader, sender = keys.create(permission="READING"), keys.create(permission="SENDING")
        for key, status, times in (
            (keys.create(), 200, 1),
            (reader, 200, 2),
            (reader, 200, 2),
            (sender, 403, 1),
        ):
            assert client.get("/v1/books/emma", headers=key.headers).status_code == status
            assert threads == [threading.current_thread().name] * times
            threads.clear()
        by_view = client.put("/v1/books/emma", headers=sender.headers)  # which the rules let pass
        assert (by_view.status_code, len(threads)) == (403, 1)
        ending = keys.create(permission="READING", expires_in=60).headers
        assert client.get("/v1/books/emma", headers=ending).status_code == 200
        threads.clear()
        keys.clock.tick(61)
        assert client.get("/v1/books/emma", headers=ending).status_code == 401
        assert threads == []


def test_a_middleware_before_may_choose_the_views(keys: Keys) -> None:
    """`request.urlconf` says where what is declared is looked up."""
    sender = keys.create("Ada", permission="SENDING").headers
    assert Client().get("/tenant", headers=sender).status_code == 403
    with override_settings(MIDDLEWARE=[f"{__name__}.for_a_tenant", f"{__name__}.Remembered"]):
        assert Client().get("/tenant", headers=sender).content == b"Ada"
        assert Client().post("/v1/emails", headers=sender).status_code == 403


def test_a_refused_request_has_no_principal(keys: Keys) -> None:
    """As over WSGI: `request.api_key` is the principal that the middleware accepted."""
    gate = Remembered(who)
    for permission, may in (("SENDING", False), (FULL, True)):
        key = keys.create(permission=permission)
        request = RequestFactory().get("/", headers=key.headers)
        assert gate(request).status_code == (200 if may else 403)
        assert request.api_key.is_authenticated is may


def test_every_request_may_have_a_principal(keys: Keys) -> None:
    """In an app's own tests; what views declare still holds."""
    sender = Principal("key_x", "newsletter", "acme", "SENDING", "live")
    with keys.everyone_is(sender):
        assert Client().post("/v1/emails").content == b"newsletter"
        assert Client().get("/v1/drafts").status_code == 403
        assert Client().post("/ninja/emails").json() == {"name": "newsletter"}


def test_the_view_refuses_as_the_middleware_does(keys: Keys) -> None:
    """Where the settings let more pass than a view requires: the very same answer."""
    sender = keys.create(permission="SENDING").headers
    by_view = Client().post("/v1/batch", headers=sender)
    by_middleware = Client().get("/v1/batch", headers=sender)
    assert by_view.status_code == by_middleware.status_code == 403
    assert by_view.content == by_middleware.content
    assert by_view.headers == by_middleware.headers
    assert by_view.headers["www-authenticate"].endswith('scope="READING"')

    async def scenario() -> None:
        answer = await AsyncClient().get("/v1/batch", headers=sender)
        assert (answer.content, answer.headers) == (by_view.content, by_view.headers)

    asyncio.run(scenario())


def test_a_public_path_has_no_principal_where_a_view_requires_one(keys: Keys) -> None:
    """The contradiction is refused: no key is looked at on a public path. HEAD has no body."""
    answer = Client().get("/open/strict", headers=keys.create().headers)
    assert (answer.status_code, answer["x-keylatch-error"]) == (401, "unauthorized")
    head = Client().head("/open/strict")
    assert (head.status_code, head.headers, head.content) == (401, answer.headers, b"")


def test_headers_that_pose_as_identity_are_gone(keys: Keys) -> None:
    """Also if the headers were read before."""
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
    statuses = [Client().get("/rest/me", headers=headers).status_code for headers in (ada, ada, bo)]
    assert statuses == [200, 429, 200]


def test_rest_framework_answers_401_on_public_paths(keys: Keys) -> None:
    """A view that requires authentication gives the challenge there."""
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


def test_without_the_middleware_no_request_is_accepted(keys: Keys) -> None:
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
    assert error_without_package(package, f"import {module}").endswith(f"pip install {name}")


def issue(request: HttpRequest) -> HttpResponse:
    """A view that creates a key for its caller's organisation."""
    caller = request.api_key
    return HttpResponse(keyring().create(caller.organization_id, "new", by=caller).secret)


def test_a_view_creates_keys(keys: Keys) -> None:
    """`keyring()` and the requests of the project use the same engine, also if no setting names
    it."""
    engine = keys.engine()
    with override_settings(KEYLATCH={"engine": engine}, ROOT_URLCONF=(path("issue", issue),)):
        client = Client()
        first = client.get("/issue", headers=keys.create().headers)
        assert first.status_code == 200
        second = client.get("/issue", headers={"Authorization": f"Bearer {first.text}"})
        assert second.status_code == 200
        with override_settings(KEYLATCH={}):
            assert len(keyring().list("default")) == 3
