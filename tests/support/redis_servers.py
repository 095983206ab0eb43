"""Redis in the shapes that operators run: Sentinel, a Cluster, TLS, Valkey."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.servers import RedisServer, eventually, free_port, require_program

SERVICE = "main"


class SentinelDeployment:
    """A primary, a replica, and three Sentinels that watch them.

    Args:
        folder: for their data.
        tls: they connect to each other with TLS, and so does the URL.
    """

    def __init__(self, folder: Path, tls: bool = False) -> None:
        self._sentinels: list[subprocess.Popen[bytes]] = []
        self._tls = tls
        if tls:
            make_certificates(folder, "IP:127.0.0.1")
        self.servers: list[RedisServer] = []
        with _killed_on_failure(self):
            primary = self._start_server(folder)
            self._start_server(folder, "--replicaof", f"127.0.0.1 {primary}")
            started = [self._start_sentinel(folder, primary) for _ in range(3)]
            self.ports = [port for port, _ in started]
            hosts = ",".join(f"127.0.0.1:{port}" for _, port in started)
            self.url = f"redis+sentinel://{hosts}/{SERVICE}/0"
            if tls:
                self.url = f"rediss{self.url[5:]}?ssl_ca_certs={folder / 'ca.crt'}"
            eventually(self._is_complete)

    def _start_server(self, folder: Path, *options: str) -> int:
        """The port at which the others find it."""
        port = free_port()
        more = _tls_options(folder, port, "replication") if self._tls else []
        self.servers.append(RedisServer(folder, *options, *more))
        return port if self._tls else self.servers[-1].port

    def _start_sentinel(self, folder: Path, primary: int) -> tuple[int, int]:
        """Its port for the tests, and the one of the URL."""
        program = require_program(shutil.which("redis-server"), "redis-server")
        port = free_port()
        configuration = folder / f"sentinel-{port}.conf"
        configuration.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} 1000\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        tls_port = free_port() if self._tls else port
        command = [program, str(configuration), "--sentinel"]
        command += _tls_options(folder, tls_port, "replication") if self._tls else []
        self._sentinels.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        return port, tls_port

    def _is_complete(self) -> bool:
        """Whether each Sentinel knows the replica and the other Sentinels."""
        states = [self._state(port) for port in self.ports]
        return all(state == (1, 2) for state in states)

    def _state(self, port: int) -> tuple[int, int]:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=port) as client:
            state = client.sentinel_master(SERVICE)
            return state["num-slaves"], state["num-other-sentinels"]
        return 0, 0

    def primary(self) -> RedisServer:
        """The present primary, by what the first Sentinel says."""
        with redis.Redis(port=self.ports[0]) as client:
            port = int(client.sentinel_get_master_addr_by_name(SERVICE)[1])
        return next(server for server in self.servers if server.port == port)

    def flush(self) -> None:
        self.primary().flush()

    def kill(self) -> None:
        for process in self._sentinels:
            process.kill()
            process.wait()
        for server in self.servers:
            server.kill()


class ClusterDeployment:
    """A Cluster of three primaries, with a replica for each if wanted.

    Args:
        folder: for their data.
        replicas: of each primary.
        tls: they connect to each other with TLS, and so does the URL.
    """

    def __init__(self, folder: Path, replicas: int = 0, tls: bool = False) -> None:
        if tls:
            make_certificates(folder, "IP:127.0.0.1")
        self._cli = require_program(shutil.which("redis-cli"), "redis-tools")
        self._replicas = replicas
        self.nodes: list[RedisServer] = []
        ports: list[int] = []
        with _killed_on_failure(self):
            for number in range(3 * (1 + replicas)):
                options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
                options += ["--cluster-config-file", f"nodes-{number}.conf"]
                options += ["--cluster-port", str(free_port())]  # by default port + 10,000
                ports.append(free_port())
                options += _tls_options(folder, ports[-1], "cluster") if tls else []
                self.nodes.append(RedisServer(folder, *options))
            addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
            self.url = f"redis+cluster://{addresses[0]},{addresses[1]}"
            if tls:
                hosts = f"127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}"
                self.url = f"rediss+cluster://{hosts}?ssl_ca_certs={folder / 'ca.crt'}"
            self._create(addresses)
            eventually(lambda: all(self._is_complete(node) for node in self.nodes))

    def _create(self, addresses: list[str]) -> None:
        command = [self._cli, "--cluster", "create", *addresses, "--cluster-yes"]
        command += ["--cluster-replicas", str(self._replicas)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def _is_complete(self, node: RedisServer) -> bool:
        with node.client() as client:
            info: Any = client.execute_command("CLUSTER INFO")
            return info["cluster_state"] == "ok" and all(
                len(nodes) == 1 + self._replicas for _, _, *nodes in _slots(client)
            )

    def owner_of(self, name: str) -> RedisServer:
        """The primary that holds a name, by what any node that answers says."""
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError), node.client() as client:
                slot = int(client.execute_command("CLUSTER KEYSLOT", name))
                for low, high, primary, *_ in _slots(client):
                    if low <= slot <= high:
                        return next(each for each in self.nodes if each.port == primary[1])
        raise AssertionError("no node holds it")

    def flush(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError):
                node.flush()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


def _slots(client: redis.Redis) -> list[list[Any]]:
    """First slot, last slot, the primary, and its replicas, for each range."""
    found: Any = client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
    if isinstance(found, dict):  # as redis-py parses it
        return [
            [low, high, nodes["primary"], *nodes["replicas"]]
            for (low, high), nodes in found.items()
        ]
    return list(found)


class TLSServer:
    """A Redis with TLS, whose certificate is for `localhost` and by an authority of its own."""

    def __init__(self, folder: Path) -> None:
        self.authority = folder / "ca.crt"
        make_certificates(folder, "DNS:localhost")
        self.port = free_port()
        self.server = RedisServer(folder, *_tls_options(folder, self.port))
        self.url = f"rediss://localhost:{self.port}/0?ssl_ca_certs={self.authority}"

    def flush(self) -> None:
        self.server.flush()

    def kill(self) -> None:
        self.server.kill()


def _tls_options(folder: Path, port: int, among_servers: str = "") -> list[str]:
    """Of a command line.

    Args:
        folder: with the certificates.
        port: for TLS, beside the plain one.
        among_servers: what uses TLS between them: `replication` or `cluster`.
    """
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    for name, file in (("cert", "server.crt"), ("key", "server.key"), ("ca-cert", "ca.crt")):
        options += [f"--tls-{name}-file", str(folder / file)]
    return options + ([f"--tls-{among_servers}", "yes"] if among_servers else [])


def make_certificates(folder: Path, name: str) -> None:
    """`ca.crt`, and `server.crt` with `server.key` for a name, such as `DNS:localhost`."""
    openssl = require_program(shutil.which("openssl"), "openssl")

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "rsa:2048", "-nodes", "-keyout")
    run("req", "-x509", *new_key, "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test")
    run("req", *new_key, "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text(f"subjectAltName={name}\n")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
    run("x509", "-req", "-in", "server.csr", *signed, "-out", "server.crt", "-days", "2")


@contextlib.contextmanager
def _killed_on_failure(
    started: SentinelDeployment | ClusterDeployment,
) -> Iterator[None]:
    try:
        yield
    except BaseException:
        started.kill()
        raise


def valkey_server(folder: Path) -> RedisServer:
    """Valkey, where `KEYLATCH_VALKEY_SERVER` names its program."""
    program = os.environ.get("KEYLATCH_VALKEY_SERVER")
    if not program:
        pytest.skip("KEYLATCH_VALKEY_SERVER names no program")
    server = RedisServer(folder, program=program)
    server.url = server.url.replace("redis://", "valkey://")
    return server


@contextlib.contextmanager
def deployment(
    shape: str, folder: Path
) -> Iterator["RedisServer | SentinelDeployment | ClusterDeployment | TLSServer"]:
    """A running Redis of this shape."""
    kinds: dict[str, Callable[[Path], Any]] = {
        "redis": RedisServer,
        "valkey": valkey_server,
        "sentinel": SentinelDeployment,
        "cluster": ClusterDeployment,
        "tls": TLSServer,
    }
    started = kinds[shape](folder)
    try:
        yield started
    finally:
        started.kill()
