"""nginx with the files in `deploy/nginx-lua`: a short Lua file calls the sidecar."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from tests.support.proxies import (
    DEPLOY,
    IDENTITY,
    FaultInjector,
    Kind,
    Proxy,
    ProxyStack,
    assert_unavailable,
    auth_header,
    echoed,
    faulty_proxy,
    header_dict,
    identity,
    running_proxy,
)
from tests.support.proxy_contract import ProxyContract
from tests.support.raw_http import send

MODULE = Path("/usr/lib/nginx/modules/ngx_http_lua_module.so")
KIND = Kind(
    name="nginx-lua",
    program="nginx" if MODULE.exists() else MODULE.name,
    package="libnginx-mod-http-lua",
    command=["-c", "{folder}/nginx.conf", "-p", "{folder}", "-g", "daemon off;"],
    check=["-c", "{folder}/nginx.conf", "-p", "{folder}", "-t", "-q"],
    files=["nginx.conf", "keylatch_check.conf", "keylatch_app.conf", "keylatch.lua"],
    folders=["/var/log/nginx", "/var/lib/nginx"],
    files_named=["/run/nginx.pid", "/etc/nginx/keylatch.lua"],
    unix_format="unix:{}",
    limited={"rate=100r/s": "rate=6r/m", "burst=200": "burst=1"},
    unlimited={"rate=100r/s": "rate=1000000r/s"},
)


class TestNginxLua(ProxyContract):
    """All that a proxy promises."""

    passes_429: ClassVar[bool] = True


@pytest.fixture(scope="module")
def impostor(proxy: ProxyStack) -> Iterator[tuple[FaultInjector, Proxy]]:
    """A proxy that has never met the sidecar: it keeps no connections to the real one."""
    with faulty_proxy(proxy) as made:
        yield made


def test_the_app_gets_the_same_as_from_nginx_without_lua() -> None:
    """One file, and it is in both folders because operators copy folders."""
    files = [DEPLOY / folder / "keylatch_app.conf" for folder in ("nginx", "nginx-lua")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.parametrize("path", [b"/_keylatch", b"/_keylatch?permission=SENDING", b"/%5fkeylatch"])
def test_the_check_cannot_be_called_from_outside(proxy: ProxyStack, path: bytes) -> None:
    """404, for every client."""
    assert proxy.request_refused(b"GET " + path, auth_header(proxy.full)).status == 404


def test_a_new_location_is_closed_until_it_is_opened(proxy: ProxyStack) -> None:
    """The check is the server's: a location that says nothing about it is protected."""
    more = "location = /new { proxy_pass http://app; }\n location = /healthz {"
    with running_proxy(
        KIND, proxy.app_url, proxy.sidecar.port, {"location = /healthz {": more}
    ) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", auth_header(proxy.sender)).status == 403
        assert echoed(send(other.url, b"GET /new", auth_header(proxy.full)))["path"] == "/new"


def test_a_location_with_lua_of_its_own_is_open(proxy: ProxyStack) -> None:
    """Why the README warns of `access_by_lua…` in a location: it replaces the check."""
    mistake = {"proxy_pass http://app;": "access_by_lua_block { return } proxy_pass http://app;"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert identity(echoed(send(other.url, b"GET /v1/me"))) == {}


def test_a_location_with_headers_of_its_own_would_trust_the_client(proxy: ProxyStack) -> None:
    """Why the files warn of `proxy_set_header` in a location: it undoes those of the server."""
    mistake = {"proxy_pass http://app;": "proxy_pass http://app; proxy_set_header X-Mine 1;"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        lie = b"X-Keylatch-Key-Id: evil"
        seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full), lie))
    assert identity(seen) == {"x-keylatch-key-id": ["evil"]}


@pytest.mark.parametrize(
    "mistake",
    [
        {"local said = {}": "error('a mistake')"},
        {"local said = {}": "local said"},
        {"local said = {}": "answer = nil"},
        {"local said = {}": "local said = }"},
        {"ngx.var[variable] = said[name]": "ngx.no_such_thing()"},
    ],
)
def test_a_mistake_allows_no_request(proxy: ProxyStack, mistake: dict[str, str]) -> None:
    """A mistake in Lua is 500 to nginx and 503 to the client; the app is not called."""
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


def test_a_missing_lua_file_allows_no_request(proxy: ProxyStack) -> None:
    """nginx then answers 404 to every client on every checked route."""
    mistake = {"access_by_lua_file ": "access_by_lua_file /nowhere"}
    count_before = proxy.app.request_count
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        assert send(other.url, b"GET /v1/me", auth_header(proxy.full)).status == 404
    assert proxy.app.request_count == count_before


@pytest.mark.parametrize("status", [400, 401, 403, 405, 429, 503])
@pytest.mark.parametrize("names", ["lower", "title"])
def test_the_sidecars_words_arrive_as_they_are(
    proxy: ProxyStack, impostor: tuple[FaultInjector, Proxy], status: int, names: str
) -> None:
    """Any status, with its body and headers, for a single check."""
    injector, other = impostor
    body = '{"error":"brand_new","error_description":"Grüße \\" $host"}'.encode()
    fields = {
        "content-type": "application/problem+json",
        "cache-control": "no-cache",
        "x-keylatch-error": "brand_new",
        "www-authenticate": 'Bearer realm="new"',
        "retry-after": "17",
        "content-length": str(len(body)),
    }
    lines = [f"{getattr(str, names)(name)}: {value}" for name, value in fields.items()]
    head = "\r\n".join([f"HTTP/1.1 {status} Whatever", *lines, "X-Internal: 1", "", ""])
    count_before = proxy.app.request_count
    with injector.responding(head.encode() + body):
        answered = send(other.url, b"GET /v1/me", auth_header(proxy.full))
        assert len(injector.requests) == 1
    headers = header_dict(answered)
    assert proxy.app.request_count == count_before
    assert (answered.status, answered.body) == (status, body)
    assert {name: headers[name.encode()].decode() for name in fields} == fields
    assert b"x-internal" not in headers


@pytest.mark.parametrize("names", ["lower", "title"])
def test_an_allow_is_understood_however_its_names_are_written(
    proxy: ProxyStack, impostor: tuple[FaultInjector, Proxy], names: str
) -> None:
    """Lower case is what the sidecar writes; Lua sees names as they came, and empty values too."""
    injector, other = impostor
    values = dict.fromkeys(IDENTITY, "x") | {"x-keylatch-environment": ""}
    fields = [f"{getattr(str, names)(name)}: {value}" for name, value in values.items()]
    head = "\r\n".join(["HTTP/1.1 200 OK", *fields, "Content-Length: 0", "", ""])
    with injector.responding(head.encode()):
        seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert identity(seen) == {name: [value] for name, value in values.items() if value}


@pytest.mark.parametrize("status", [b"200 OK", b"401 Unauthorized"])
def test_half_an_answer_is_none(
    proxy: ProxyStack, impostor: tuple[FaultInjector, Proxy], status: bytes
) -> None:
    """It ends before its length, as when a sidecar is killed: 503."""
    injector, other = impostor
    fields = b"".join(name.encode() + b": x\r\n" for name in [*IDENTITY, "x-keylatch-error"])
    count_before = proxy.app.request_count
    with injector.responding(
        b"HTTP/1.1 " + status + b"\r\n" + fields + b"Content-Length: 9\r\n\r\nha"
    ):
        assert_unavailable(send(other.url, b"GET /v1/me", auth_header(proxy.full)))
    assert proxy.app.request_count == count_before


def test_http_2_is_refused_and_no_way_around(proxy: ProxyStack) -> None:
    """Why `listen` must not have http2: Lua cannot check such requests, and they get 503."""
    count_before = proxy.app.request_count
    mistake = {"; # in production": " http2; # in production"}
    headers = {"Authorization": f"Bearer {proxy.full.token.reveal()}"}
    with (
        running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other,
        httpx.Client(http1=False, http2=True, trust_env=False) as client,
    ):
        answered = client.get(f"{other.url}/v1/me", headers=headers)
        assert (answered.http_version, answered.status_code) == ("HTTP/2", 503)
        assert answered.json()["error"] == "unavailable"
        assert proxy.app.request_count == count_before
        assert client.get(f"{other.url}/healthz").status_code == 200
