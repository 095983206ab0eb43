"""nginx with the files in `deploy/nginx`: auth_request calls the sidecar."""

from collections.abc import Iterator
from typing import ClassVar

import pytest

from tests.support.proxies import (
    FaultInjector,
    Kind,
    Proxy,
    ProxyStack,
    assert_rate_limited,
    auth_header,
    echoed,
    faulty_proxy,
    identity,
    running_proxy,
)
from tests.support.proxy_contract import TOO_MANY, TOO_MANY_BODY, ProxyContract
from tests.support.raw_http import send

KIND = Kind(
    name="nginx",
    program="nginx",
    package="nginx",
    command=["-c", "{folder}/nginx.conf", "-p", "{folder}", "-g", "daemon off;"],
    check=["-c", "{folder}/nginx.conf", "-p", "{folder}", "-t", "-q"],
    files=["nginx.conf", "keylatch_check.conf", "keylatch_app.conf"],
    folders=["/var/log/nginx", "/var/lib/nginx"],
    files_named=["/run/nginx.pid"],
    unix_format="unix:{}",
    limited={"rate=100r/s": "rate=6r/m", "burst=200": "burst=1"},
    unlimited={"rate=100r/s": "rate=1000000r/s"},
)


class TestNginx(ProxyContract):
    """All that a proxy promises."""

    passes_429: ClassVar[bool] = True


@pytest.fixture(scope="module")
def impostor(proxy: ProxyStack) -> Iterator[tuple[FaultInjector, Proxy]]:
    """A proxy that has never met the sidecar: it keeps no connections to the real one."""
    with faulty_proxy(proxy) as made:
        yield made


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


def test_429_is_429_after_a_second_try(
    proxy: ProxyStack, impostor: tuple[FaultInjector, Proxy]
) -> None:
    """nginx knows the status as `502, 429` when a kept connection ended under the first try."""
    injector, other = impostor
    no_body = TOO_MANY.removesuffix(TOO_MANY_BODY)  # it sends HEAD
    with injector.responding(no_body, closes_after_next_request=True):
        answers = [send(other.url, b"GET /v1/me", auth_header(proxy.full)) for _ in range(12)]
    for answered in answers:
        assert_rate_limited(answered)


def test_a_limit_by_the_public_part_could_be_used_up_without_the_key(proxy: ProxyStack) -> None:
    """Why it is the whole credential that counts: requests are counted ahead of the check."""
    public = len("kl_live_000000000000")
    mistake = {**KIND.limited, r"\S{1,96}": rf"\S{{1,{public}}}"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        for end in b"ab":
            forged = auth_header(proxy.full)[:-40] + 40 * bytes([end])
            assert send(other.url, b"GET /v1/me", forged).status == 401
        assert_rate_limited(send(other.url, b"GET /v1/me", auth_header(proxy.full)))


def test_a_location_with_headers_of_its_own_would_trust_the_client(proxy: ProxyStack) -> None:
    """Why the files warn of `proxy_set_header` in a location: it undoes those of the server."""
    mistake = {"proxy_pass http://app;": "proxy_pass http://app; proxy_set_header X-Mine 1;"}
    with running_proxy(KIND, proxy.app_url, proxy.sidecar.port, mistake) as other:
        lie = b"X-Keylatch-Key-Id: evil"
        seen = echoed(send(other.url, b"GET /v1/me", auth_header(proxy.full), lie))
    assert identity(seen) == {"x-keylatch-key-id": ["evil"]}
