"""`keylatch serve`: binds the listeners and runs uvicorn.

All listeners of a process belong to one server and one engine; the app distinguishes them by the
`server` of a request's scope. The sockets are bound here, and all workers share them.
"""

import contextlib
import functools
import logging
import os
import signal
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.supervisors import Multiprocess

from keylatch import logs
from keylatch_sidecar.app import GRPCListener, from_environment
from keylatch_sidecar.drain import Drain
from keylatch_sidecar.http_server import loopback
from keylatch_sidecar.http_server.file_descriptors import descriptor_limit, raise_descriptor_limit
from keylatch_sidecar.http_server.http_methods import AnyMethod
from keylatch_sidecar.http_server.limits import IDLE_SECONDS, MIN_DESCRIPTORS

log = logging.getLogger("keylatch.serving")


class CannotListen(Exception):
    """An address cannot be bound; the message says which one and why."""


class TooFewDescriptors(Exception):
    """The limit of file descriptors is too low to serve connections; the message has the limit."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP address, or the path of a Unix socket."""

    host: str
    port: int
    uds: Path | None = None

    @classmethod
    def optional(cls, host: str, port: int | None, uds: Path | None) -> "Listener | None":
        """A listener, if a port or a path is given."""
        return None if port is None and uds is None else cls(host, port or 0, uds)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.uds is None else str(self.uds)

    @property
    def scope_address(self) -> int | str:
        """The listener in a request's scope: the port, or the socket's path."""
        return self.port if self.uds is None else str(self.uds)

    @property
    def grpc_address(self) -> str:
        """The address in the syntax of gRPC."""
        if self.uds is not None:
            return f"unix:{self.uds.absolute()}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self, mode: int) -> socket.socket:
        """A bound socket; a Unix socket gets the mode, and replaces one that no process listens on.

        Raises:
            CannotListen: the address is in use, or binding it is not permitted.
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


@dataclass(frozen=True, slots=True)
class _Listeners:
    """The listeners of one `keylatch serve`; None: no such listener."""

    main: Listener
    admin: Listener | None
    grpc: Listener | None
    metrics: Listener | None

    def all(self) -> list[Listener]:
        every = (self.main, self.admin, self.grpc, self.metrics)
        return [listener for listener in every if listener is not None]

    def bind(self) -> list[socket.socket]:
        """The sockets for HTTP, all or none."""
        # The directory's mode restricts access to sockets; that of management is for this account.
        modes = ((self.main, 0o666), (self.admin, 0o600), (self.metrics, 0o666))
        with contextlib.ExitStack() as stack:
            sockets = [
                stack.enter_context(listener.bind(mode))
                for listener, mode in modes
                if listener is not None
            ]
            if self.grpc is not None:
                # gRPC binds its own socket, and does not report every failure: this bind does.
                self.grpc.bind(0o666).close()
            stack.pop_all()  # from here on the server closes them
        return sockets

    def log(self) -> None:
        log.setLevel(logging.INFO)  # uvicorn logs only the sockets that it bound itself
        log.info("listening on %s", " and ".join(map(str, self.all())))
        token_listeners = [each for each in self.all() if each != self.metrics and not each.uds]
        plaintext = [str(each) for each in token_listeners if not loopback.is_host(each.host)]
        if plaintext:
            log.warning("%s on %s; %s", loopback.PLAIN_HTTP, " and ".join(plaintext), loopback.HINT)

    def remove_sockets(self) -> None:
        for listener in self.all():
            if listener.uds is not None and os.path.lexists(listener.uds):
                listener.uds.unlink()


def run(
    main_listener: Listener,
    admin_listener: Listener | None,
    grpc_listener: Listener | None,
    workers: int,
    *,
    metrics_listener: Listener | None = None,
    drain_seconds: float = 0.0,
    logs_json: bool = False,
) -> bool:
    """Serve until SIGTERM and for `drain_seconds` more, or until a second SIGTERM, or until SIGINT.

    Args:
        main_listener: for reverse proxies, and for management if `admin_listener` is None.
        admin_listener: the only listener for management.
        grpc_listener: for reverse proxies that use gRPC.
        workers: the number of processes that share the listeners.
        metrics_listener: for Prometheus, without a key.
        drain_seconds: how long it goes on after SIGTERM, while `/readyz` answers 503.
        logs_json: whether each log record is one line of JSON.

    Returns:
        False: the start failed, and the reason is in the log.

    Raises:
        CannotListen, TooFewDescriptors: nothing was started.
    """
    raise_descriptor_limit()
    if descriptor_limit() < MIN_DESCRIPTORS:
        raise TooFewDescriptors(f"{descriptor_limit()} file descriptors are too few")
    listeners = _Listeners(main_listener, admin_listener, grpc_listener, metrics_listener)
    sockets = listeners.bind()
    with contextlib.ExitStack() as stack:
        stack.callback(listeners.remove_sockets)
        directory = None
        if workers > 1:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="keylatch-")))
        drain = Drain(drain_seconds, directory)
        config = _configuration(listeners, workers, drain, directory, logs_json=logs_json)
        listeners.log()
        return _serve(config, sockets, drain)


def _configuration(
    listeners: _Listeners,
    workers: int,
    drain: Drain,
    worker_directory: Path | None,
    *,
    logs_json: bool,
) -> uvicorn.Config:
    admin, grpc, metrics = listeners.admin, listeners.grpc, listeners.metrics
    is_shared = workers > 1
    app_factory = functools.partial(
        from_environment,
        admin_address=None if admin is None else admin.scope_address,
        metrics_address=None if metrics is None else metrics.scope_address,
        grpc=None if grpc is None else GRPCListener(grpc.grpc_address, is_shared),
        drain=drain,
        worker_directory=worker_directory,
    )
    return uvicorn.Config(
        app_factory,
        factory=True,
        workers=workers,
        http=AnyMethod,
        ws="none",  # a request to upgrade is answered like any other request
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        access_log=False,
        log_config=logs.configuration() if logs_json else LOGGING_CONFIG,
        log_level="info",
    )


class _Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops.

    Args:
        config: of the server.
        drain: begun by the first SIGTERM.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain
        self._must_drain = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_first = sig == signal.SIGTERM and self.started and not self._must_drain
        if is_first and self._drain.is_configured:
            self._must_drain = True  # the next tick begins it: a signal handler must not log
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._must_drain:
            self._drain.begin()
        return await super().on_tick(counter) or self._drain.is_over


class _Workers(Multiprocess):
    """uvicorn's parent of the workers, which lets them drain before it stops them.

    A worker that gets SIGTERM itself stops at once: the parent has replaced it, or does without it.

    Args:
        config: of the workers.
        sockets: that they share.
        drain: begun by the first SIGTERM to the parent.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], drain: Drain) -> None:
        super().__init__(config, sockets)
        self._drain = drain

    def handle_term(self) -> None:
        if self._drain.is_configured and not self._drain.has_begun:
            self._drain.begin()
        else:
            super().handle_term()

    def handle_signals(self) -> None:
        super().handle_signals()
        if self._drain.is_over:
            self.should_exit.set()


def _serve(config: uvicorn.Config, sockets: list[socket.socket], drain: Drain) -> bool:
    # uvicorn raises SIGTERM again after the shutdown; by default that would kill the process before
    # it removes the sockets.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        if config.workers > 1:
            _Workers(config, sockets, drain).run()
            return True
        server = _Server(config, drain)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=sockets)
        return server.started
    except SystemExit as ended:
        if not ended.code:  # SIGTERM, see above
            raise
        return False
