"""nginx with the files in `deploy/nginx`: auth_request asks the sidecar."""

from collections.abc import Iterator
from typing import ClassVar

import pytest

from proxies import (
    Kind,
    Proxy,
    Rig,
    Stand,
    bearing,
    identity,
    is_limited,
    proxy,
    stand_in,
    told,
)
from proxy_contract import TOO_MANY, TOO_MANY_BODY, ProxyContract
from wire import send

KIND = Kind(
    name="nginx",
    program="nginx",
    package="nginx",
    command=["-c", "{folder}/nginx.conf", "-p", "{folder}", "-g", "daemon off;"],
    check=["-c", "{folder}/nginx.conf", "-p", "{folder}", "-t", "-q"],
    files=["nginx.conf", "keylatch_check.conf", "keylatch_app.conf"],
    folders=["/var/log/nginx", "/var/lib/nginx"],
    files_named=["/run/nginx.pid"],
    unix="unix:{}",
    limited={"rate=100r/s": "rate=6r/m", "burst=200": "burst=1"},
    unlimited={"rate=100r/s": "rate=1000000r/s"},
)


class TestNginx(ProxyContract):
    """All that a proxy promises."""

    passes_429: ClassVar[bool] = True


@pytest.fixture(scope="module")
def impostor(rig: Rig) -> Iterator[tuple[Stand, Proxy]]:
    """A proxy that has never met the sidecar: it keeps no connections to the real one."""
    with stand_in(rig) as made:
        yield made


@pytest.mark.parametrize("path", [b"/_keylatch", b"/_keylatch?permission=SENDING", b"/%5fkeylatch"])
def test_the_question_cannot_be_asked_from_outside(rig: Rig, path: bytes) -> None:
    """404, whoever asks."""
    assert rig.refused(b"GET " + path, bearing(rig.full)).status == 404


def test_a_new_location_is_closed_until_it_is_opened(rig: Rig) -> None:
    """The check is the server's: a location that says nothing about it is protected."""
    more = "location = /new { proxy_pass http://app; }\n location = /healthz {"
    with proxy(KIND, rig.app_url, rig.sidecar.port, {"location = /healthz {": more}) as other:
        assert send(other.url, b"GET /new").status == 401
        assert send(other.url, b"GET /new", bearing(rig.sender)).status == 403
        assert told(send(other.url, b"GET /new", bearing(rig.full)))["path"] == "/new"


def test_429_is_429_after_a_second_try(rig: Rig, impostor: tuple[Stand, Proxy]) -> None:
    """nginx knows the status as `502, 429` when a kept connection ended under the first try."""
    stand, other = impostor
    no_body = TOO_MANY.removesuffix(TOO_MANY_BODY)  # it asks HEAD
    with stand.answering(no_body, is_tired=True):
        answers = [send(other.url, b"GET /v1/me", bearing(rig.full)) for _ in range(12)]
    for answered in answers:
        is_limited(answered)


def test_a_limit_by_the_public_part_would_be_used_up_by_anybody(rig: Rig) -> None:
    """Why it is the whole credential that counts: requests are counted ahead of the check."""
    public = len("kl_live_000000000000")
    mistake = {**KIND.limited, r"\S{1,96}": rf"\S{{1,{public}}}"}
    with proxy(KIND, rig.app_url, rig.sidecar.port, mistake) as other:
        for end in b"ab":
            forged = bearing(rig.full)[:-40] + 40 * bytes([end])
            assert send(other.url, b"GET /v1/me", forged).status == 401
        is_limited(send(other.url, b"GET /v1/me", bearing(rig.full)))


def test_a_location_with_headers_of_its_own_would_believe_the_client(rig: Rig) -> None:
    """Why the files warn of `proxy_set_header` in a location: it undoes those of the server."""
    mistake = {"proxy_pass http://app;": "proxy_pass http://app; proxy_set_header X-Mine 1;"}
    with proxy(KIND, rig.app_url, rig.sidecar.port, mistake) as other:
        lie = b"X-Keylatch-Key-Id: evil"
        seen = told(send(other.url, b"GET /v1/me", bearing(rig.full), lie))
    assert identity(seen) == {"x-keylatch-key-id": ["evil"]}
