"""nginx with the files in `deploy/nginx`: auth_request asks the sidecar."""

import pytest

from proxies import (
    Kind,
    Rig,
    bearing,
    identity,
    proxy,
    told,
)
from proxy_contract import ProxyContract
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
)


class TestNginx(ProxyContract):
    """All that a proxy promises."""


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


def test_a_location_with_headers_of_its_own_would_believe_the_client(rig: Rig) -> None:
    """Why the files warn of `proxy_set_header` in a location: it undoes those of the server."""
    mistake = {"proxy_pass http://app;": "proxy_pass http://app; proxy_set_header X-Mine 1;"}
    with proxy(KIND, rig.app_url, rig.sidecar.port, mistake) as other:
        lie = b"X-Keylatch-Key-Id: evil"
        seen = told(send(other.url, b"GET /v1/me", bearing(rig.full), lie))
    assert identity(seen) == {"x-keylatch-key-id": ["evil"]}
