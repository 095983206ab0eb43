"""Sidecars behind a load balancer, restarted one after the other under load."""

import contextlib
import csv
import http.client
import shutil
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import Operator, wait_for_exit
from tests.support.servers import eventually, free_port, require_program

pytestmark = pytest.mark.long

CLIENTS = 4
# No second attempt: what a server refuses, the client sees.
CONFIGURATION = """
global
  stats socket {admin} level admin
defaults
  mode http
  timeout client 60s
  timeout connect 5s
  timeout server 60s
  timeout check 5s
  retries 0
listen keylatch
  bind 127.0.0.1:{port}
  option httpchk GET /readyz
  default-server inter 100ms fall 2 rise 1
{servers}
"""


class Balancer:
    """A real HAProxy, which probes `/readyz`."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.port, self._admin = free_port(), folder / "haproxy.sock"
        servers = [f"  server s{port} 127.0.0.1:{port} check" for port in ports]
        configuration = folder / "haproxy.cfg"
        configuration.write_text(
            CONFIGURATION.format(admin=self._admin, port=self.port, servers="\n".join(servers))
        )
        program = require_program(shutil.which("haproxy"), "haproxy")
        self._process = subprocess.Popen(
            [program, "-f", configuration, "-db"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def is_up(self, port: int) -> bool:
        """Whether it sends requests to this server."""
        received = b""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self._admin))
            admin.sendall(b"show stat\n")
            while piece := admin.recv(65536):
                received += piece
        rows = csv.DictReader(received.decode().removeprefix("# ").splitlines())
        return any(row["svname"] == f"s{port}" and row["status"] == "UP" for row in rows)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Client(threading.Thread):
    """Checks a key through the balancer, one request after the other, on one connection while the
    balancer keeps it."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(daemon=True)
        self._port, self._token = port, token
        self.statuses: Counter[int | str] = Counter()
        self.must_stop = threading.Event()
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        headers = {"Authorization": f"Bearer {self._token}"}
        while not self.must_stop.wait(0.005):
            try:
                connection.request("GET", "/verify", headers=headers)
                answer = connection.getresponse()
                answer.read()
                self.statuses[answer.status] += 1
            except (OSError, http.client.HTTPException) as error:
                self.statuses[type(error).__name__] += 1
                connection.close()
        connection.close()


@pytest.fixture
def ports() -> list[int]:
    return [free_port(), free_port()]


@pytest.fixture
def balancer(tmp_path: Path, ports: list[int]) -> Iterator[Balancer]:
    balancer = Balancer(tmp_path, ports)
    yield balancer
    balancer.stop()


@pytest.mark.parametrize("drain", ["3", "0"])
def test_a_rolling_restart_refuses_no_request(
    operator: Operator, balancer: Balancer, ports: list[int], drain: str
) -> None:
    """With a drain that is longer than the balancer's probes take, every request is answered. The
    twin without it refuses some."""
    token = operator.create()["token"]
    operator.set(DRAIN=drain)
    servers = [operator.start("serve", "--port", str(port)) for port in ports]
    try:
        eventually(lambda: all(balancer.is_up(port) for port in ports))
        clients = [Client(balancer.port, token) for _ in range(CLIENTS)]
        for number, port in enumerate(ports):
            servers[number].send_signal(signal.SIGTERM)
            assert wait_for_exit(servers[number]).exit_code == 0
            servers[number] = operator.start("serve", "--port", str(port))
            eventually(lambda port=port: balancer.is_up(port))  # type: ignore[misc]
        for client in clients:
            client.must_stop.set()
            client.join(60)
    finally:
        for server in servers:
            server.kill()
            server.communicate()
    statuses = sum((client.statuses for client in clients), Counter[int | str]())
    assert statuses[200] > 100
    assert (len(statuses) == 1) is (drain != "0"), statuses
