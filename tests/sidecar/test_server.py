"""`keylatch serve`: its listeners, which requests each accepts, and how it stops."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from keylatch.engine import Engine
from keylatch_sidecar.app import create_app
from tests.support.command_line import Operator, wait_for_exit
from tests.support.raw_http import asgi_request, exchange, expected_response, send
from tests.support.servers import eventually, free_port

pytestmark = pytest.mark.long


@contextmanager
def served(
    operator: Operator, *words: str, wrapper: Sequence[str] = ()
) -> Iterator["subprocess.Popen[str]"]:
    process = operator.start("serve", *words, wrapper=wrapper)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it stopped in order
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.communicate()


def answers(place: str | Path) -> bool:
    try:
        return send(place, b"GET /healthz").status == 200
    except OSError:
        return False


@pytest.mark.parametrize("way", ["port", "uds"])
def test_serve_answers_until_the_signal_to_stop(operator: Operator, way: str) -> None:
    """It answers without server and date headers; SIGTERM ends it with nothing lost."""
    key = operator.create()
    port = free_port()
    place = f"http://127.0.0.1:{port}" if way == "port" else operator.folder / "keylatch.sock"
    where = ["--port", str(port)] if way == "port" else ["--uds", str(place)]
    with served(operator, *where) as process:
        eventually(lambda: answers(place) or process.poll() is not None)
        credential = f"Authorization: Bearer {key['token']}".encode()
        assert send(place, b"GET /verify", credential) == expected_response(
            200,
            {
                b"cache-control": b"no-store",
                b"x-keylatch-key-id": key["id"].encode(),
                b"x-keylatch-key-name": b"a%20key",
                b"x-keylatch-organization-id": b"default",
                b"x-keylatch-permission": b"FULL",
                b"x-keylatch-environment": b"live",
            },
            b"",
        )
        process.send_signal(signal.SIGTERM)
        stopped = wait_for_exit(process)
    assert stopped.exit_code == 0
    assert f"listening on {str(place).removeprefix('http://')}\n" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert key["token"] not in stopped.stderr
    with closing(sqlite3.connect(operator.database)) as raw:
        query = "SELECT last_used FROM keylatch_keys WHERE id = ?"
        (last_used,) = raw.execute(query, (key["id"],)).fetchone()
    assert last_used is not None, "what was used is stored before the process ends"
    assert way == "port" or not Path(place).exists(), "the socket is gone with its server"


def is_none_of_your_business(place: str | Path, path: str, credential: bytes) -> bool:
    """Whether it is answered as if there were no such thing."""
    return send(place, f"GET {path}".encode(), credential).status == 404


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("way", ["ports", "sockets"])
def test_management_may_have_a_listener_of_its_own(
    operator: Operator, way: str, workers: str
) -> None:
    """Then a proxy, and a client that gets past it, can list, create or delete no key there."""
    key = operator.create()
    credential = f"Authorization: Bearer {key['token']}".encode()
    ports = [free_port(), free_port()]
    sockets = [operator.folder / name for name in ("keylatch.sock", "admin.sock")]
    if way == "ports":
        words = ["--port", str(ports[0]), "--admin-port", str(ports[1])]
        asking, managing = (f"http://127.0.0.1:{port}" for port in ports)
    else:
        words = ["--uds", str(sockets[0]), "--admin-uds", str(sockets[1])]
        asking, managing = sockets  # type: ignore[assignment]
    with served(operator, "--workers", workers, *words) as process:
        eventually(lambda: answers(asking) or process.poll() is not None)
        one = f"/v1/api-keys/{key['id']}"
        for path in ("/v1/api-keys", "/v1/api_keys", one, "/leaked", "/openapi.json"):
            assert is_none_of_your_business(asking, path, credential)
            assert not is_none_of_your_business(managing, path, credential)
        for path in ("/verify", "/ext_authz/v1/api-keys", "/healthz", "/readyz"):
            assert send(asking, f"GET {path}".encode(), credential).status == 200
        assert len(json.loads(send(managing, b"GET /v1/api-keys", credential).body)) == 1
        if way == "sockets":
            modes = [place.stat().st_mode & 0o777 for place in sockets]
            assert modes == [0o666, 0o600]
        process.send_signal(signal.SIGTERM)
        assert wait_for_exit(process).exit_code == 0
    assert not any(place.exists() for place in sockets)


def test_a_socket_that_a_killed_server_left_is_replaced(operator: Operator) -> None:
    """One that is in use is not, and neither is a file that is no socket."""
    place = operator.folder / "keylatch.sock"
    for _ in range(2):
        with served(operator, "--uds", str(place)) as process:
            eventually(lambda: answers(place) or process.poll() is not None)
            second = wait_for_exit(operator.start("serve", "--uds", str(place)))
            assert second.exit_code == 2
            assert f"error: cannot listen on {place}: Address already in use" in second.stderr
            assert answers(place)
    file = operator.folder / "letter.txt"
    file.write_text("not a socket")
    assert wait_for_exit(operator.start("serve", "--uds", str(file))).exit_code == 2
    assert file.read_text() == "not a socket"


@pytest.mark.parametrize(("way", "workers"), [("port", "1"), ("port", "2"), ("socket", "1")])
def test_proxies_may_ask_over_grpc(operator: Operator, way: str, workers: str) -> None:
    """It answers as soon as HTTP does; SIGTERM ends both; a port that is taken is an error."""
    port, grpc_port, path = free_port(), free_port(), operator.folder / "grpc.sock"
    words, target = ["--grpc-port", str(grpc_port)], f"127.0.0.1:{grpc_port}"
    if way == "socket":
        words, target = ["--grpc-uds", str(path)], f"unix:{path}"
    with served(operator, "--port", str(port), "--workers", workers, *words) as process:
        eventually(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None)
        with grpc.insecure_channel(target) as channel:
            check: Any = channel.unary_unary("/envoy.service.auth.v3.Authorization/Check")
            assert b"misconfigured" in check(b"", timeout=20, wait_for_ready=True)
        if way == "port":
            second = wait_for_exit(operator.start("serve", "--port", str(free_port()), *words))
            assert second.exit_code == 2
            assert f"error: cannot listen on {target}: Address already in use" in second.stderr
        process.send_signal(signal.SIGTERM)
        stopped = wait_for_exit(process)
        assert (stopped.exit_code, "Traceback" in stopped.stderr) == (0, False)
    assert not path.exists()


def test_any_method_may_be_asked_about(operator: Operator) -> None:
    """On one connection, in any order; what looks like a request in a body is none."""
    key = operator.create()
    port = free_port()
    credential = b"\r\nHost: test\r\nAuthorization: Bearer " + key["token"].encode() + b"\r\n"
    with served(operator, "--port", str(port)) as process:
        eventually(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None)
        with socket.create_connection(("127.0.0.1", port)) as connection:

            def first_line(start: bytes, body: bytes = b"") -> bytes:
                length = b"Content-Length: %d\r\n" % len(body)
                connection.sendall(start + b" HTTP/1.1" + credential + length + b"\r\n")
                answered = connection.recv(65536)
                connection.sendall(body)
                return answered.partition(b"\r\n")[0]

            smuggled = b"FOO /healthz HTTP/1.1\r\nHost: test\r\n\r\n"
            for method in (b"GET", b"PATCH", b"FOO", b"GET", b"VERSION-CONTROL", b"M-SEARCH"):
                assert first_line(method + b" /ext_authz/v1/me") == b"HTTP/1.1 200 OK"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            for body in (smuggled, b"", smuggled):
                assert first_line(b"POST /ext_authz/v1/me", body) == b"HTTP/1.1 200 OK"
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(65536)
        for nonsense in (
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b"FOO\r\n\r\n",
            b"G@T / HTTP/1.1\r\n\r\n",
        ):
            assert exchange(f"http://127.0.0.1:{port}", nonsense).startswith(b"HTTP/1.1 400 ")


def test_a_server_that_cannot_listen_says_so(operator: Operator) -> None:
    """It names the address that it cannot have."""
    outcome = wait_for_exit(operator.start("serve", "--host", "192.0.2.1"))
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert "error: cannot listen on 192.0.2.1:8700: " in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("most", [24, 63])
def test_a_server_with_too_few_descriptors_does_not_start(operator: Operator, most: int) -> None:
    """Instead of resetting every connection."""
    words = ["serve", "--port", str(free_port())]
    outcome = wait_for_exit(operator.start(*words, wrapper=descriptors(most)))
    assert (outcome.exit_code, outcome.stdout, outcome.stderr.splitlines()) == (
        2,
        "",
        [
            f"error: {most} file descriptors are too few",
            "hint: ulimit -n, or LimitNOFILE= of systemd: at least 64",
        ],
    )


def test_a_server_with_just_enough_descriptors_answers(operator: Operator) -> None:
    """The least with which it starts."""
    port = free_port()
    with served(operator, "--port", str(port), wrapper=descriptors(64)) as process:
        eventually(lambda: answers(f"http://127.0.0.1:{port}") or process.poll() is not None)
        assert process.poll() is None


def descriptors(most: int) -> list[str]:
    return ["bash", "-c", f'ulimit -n {most} && exec "$@"', "-"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("admin", "came_to"),
    [(8701, ("127.0.0.1", 8701)), ("/run/admin.sock", ("/run/admin.sock", None))],
)
async def test_keys_are_managed_where_the_server_says_that_a_request_came_to(
    engine: Engine, admin: int | str, came_to: tuple[str, int | None]
) -> None:
    """A server that does not say where opens management nowhere, and hides it everywhere."""
    app = create_app(engine, admin_address=admin)
    assert (await asgi_request(app, "/v1/api-keys", server=came_to)).status == 401
    for server in (None, (), ("", None), (None, None), ("127.0.0.1", 8700), ("8701", None)):
        assert (await asgi_request(app, "/v1/api-keys", server=server)).status == 404, server
