"""`keylatch serve`: which listeners there are, who may come through them, and the server behind.

All listeners belong to one server and one engine; the app tells them apart by the address that a
request came to. Sockets are made here and shared by all workers.
"""

import contextlib
import functools
import logging
import os
import signal
import socket
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.supervisors import Multiprocess

from keylatch import logs
from keylatch_sidecar.app import GRPCListener, from_environment
from keylatch_sidecar.http_server import loopback
from keylatch_sidecar.http_server.connections import descriptor_limit, raise_descriptor_limit
from keylatch_sidecar.http_server.http_methods import AnyMethod
from keylatch_sidecar.http_server.limits import IDLE_SECONDS, MIN_DESCRIPTORS

log = logging.getLogger("keylatch.serving")


class CannotListen(Exception):
    """An address cannot be had; the text says which and why."""


class TooFewDescriptors(Exception):
    """Hardly a connection could be served, or none; the text says how many there are."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A port of a host, or a Unix socket."""

    host: str
    port: int
    uds: Path | None = None

    @classmethod
    def optional(cls, host: str, port: int | None, uds: Path | None) -> "Listener | None":
        """One if a port or a path is given."""
        return None if port is None and uds is None else cls(host, port or 0, uds)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.uds is None else str(self.uds)

    @property
    def scope_address(self) -> int | str:
        """What a request's scope says of where it came to: the port, or the socket's path."""
        return self.port if self.uds is None else str(self.uds)

    @property
    def grpc_address(self) -> str:
        """The listener in gRPC's spelling."""
        if self.uds is not None:
            return f"unix:{self.uds.absolute()}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self, mode: int) -> socket.socket:
        """The socket; a Unix socket gets the mode, and replaces one that nobody listens on.

        Raises:
            CannotListen: somebody else has it, or it may not be made.
        """
        family = socket.AF_UNIX
        if self.uds is None:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(family)
        try:
            if self.uds is None:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind((self.host, self.port))
            else:
                _remove_stale_socket(self.uds)
                bound.bind(str(self.uds))
                self.uds.chmod(mode)
        except OSError as error:
            bound.close()
            raise CannotListen(f"cannot listen on {self}: {error.strerror or error}") from None
        return bound


def _remove_stale_socket(path: Path) -> None:
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # its server was killed
            path.unlink()


def run(
    main_listener: Listener,
    admin_listener: Listener | None,
    grpc_listener: Listener | None,
    workers: int,
    *,
    metrics_listener: Listener | None = None,
    logs_json: bool = False,
) -> bool:
    """Serve until told to stop.

    Args:
        main_listener: for proxies, and for everything where `admin_listener` is None.
        admin_listener: for management, which is then nowhere else.
        grpc_listener: for proxies that speak gRPC.
        workers: processes that share the listeners.
        metrics_listener: for Prometheus, which needs no key there.
        logs_json: whether the log is JSON, a line each.

    Returns:
        False: it could not start, and has logged why.

    Raises:
        CannotListen, TooFewDescriptors: nothing was started.
    """
    raise_descriptor_limit()
    if descriptor_limit() < MIN_DESCRIPTORS:
        raise TooFewDescriptors(f"{descriptor_limit()} file descriptors are too few")
    listeners = [
        each
        for each in (main_listener, admin_listener, grpc_listener, metrics_listener)
        if each is not None
    ]
    with contextlib.ExitStack() as stack:
        # Whoever may enter the folder may ask; management is for the account that it runs as.
        sockets = [stack.enter_context(main_listener.bind(0o666))]
        if admin_listener is not None:
            sockets.append(stack.enter_context(admin_listener.bind(0o600)))
        if grpc_listener is not None:
            grpc_listener.bind(
                0o666
            ).close()  # gRPC makes its own, and some failures it would not tell
        if metrics_listener is not None:
            sockets.append(stack.enter_context(metrics_listener.bind(0o666)))
        stack.pop_all()  # from here on they are the server's
    worker_directory = tempfile.TemporaryDirectory(prefix="keylatch-") if workers > 1 else None
    config = uvicorn.Config(
        functools.partial(
            from_environment,
            admin_address=None if admin_listener is None else admin_listener.scope_address,
            metrics_address=None if metrics_listener is None else metrics_listener.scope_address,
            grpc=None
            if grpc_listener is None
            else GRPCListener(grpc_listener.grpc_address, is_shared=workers > 1),
            worker_directory=None if worker_directory is None else Path(worker_directory.name),
        ),
        factory=True,
        workers=workers,
        http=AnyMethod,
        ws="none",  # an upgrade request is answered like any other
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        access_log=False,
        log_config=logs.configuration() if logs_json else LOGGING_CONFIG,
        log_level="info",
    )
    log.setLevel(logging.INFO)  # uvicorn says it only of sockets that it made itself
    log.info("listening on %s", " and ".join(str(listener) for listener in listeners))
    token_listeners = [
        each
        for each in (main_listener, admin_listener, grpc_listener)
        if each is not None and each.uds is None
    ]
    plaintext = [str(each) for each in token_listeners if not loopback.is_host(each.host)]
    if plaintext:
        log.warning("%s on %s; %s", loopback.PLAIN_HTTP, " and ".join(plaintext), loopback.HINT)
    # uvicorn raises a SIGTERM once more when all is stored and closed; by default that would kill
    # us before the sockets are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if workers > 1:
            Multiprocess(config, sockets=sockets).run()
            return True
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=sockets)
        return server.started
    except SystemExit as ended:
        if not ended.code:  # SIGTERM, see above
            raise
        return False
    finally:
        if worker_directory is not None:
            worker_directory.cleanup()
        for listener in listeners:
            if listener.uds is not None and os.path.lexists(listener.uds):
                listener.uds.unlink()
