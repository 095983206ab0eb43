"""`keylatch serve`: runs the sidecar."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from keylatch._variables import export_variables
from keylatch.engine import Engine
from keylatch.errors import ConfigurationError, KeylatchError, StoreUnavailable
from keylatch.settings import Settings, of_one_store
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import ENGINE_SETTINGS, PROXY_SETTINGS, Given, setting_options
from keylatch_sidecar.settings import ProxySettings

if TYPE_CHECKING:
    from keylatch_sidecar.server import Listener

T = TypeVar("T")
U = TypeVar("U")


@setting_options(*ENGINE_SETTINGS, *PROXY_SETTINGS)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8700,
    uds: Annotated[Path | None, typer.Option(help="Unix socket instead of --port.")] = None,
    admin_host: Annotated[str, typer.Option(help="Address of --admin-port.")] = "127.0.0.1",
    admin_port: Annotated[
        int | None,
        typer.Option(help="Port for key management, which --port then refuses.", min=1, max=65535),
    ] = None,
    admin_uds: Annotated[
        Path | None, typer.Option(help="Unix socket instead of --admin-port.")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port for Envoy's ext_authz over gRPC.", min=1, max=65535)
    ] = None,
    grpc_uds: Annotated[
        Path | None, typer.Option(help="Unix socket instead of --grpc-port.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of --metrics-port.")] = "127.0.0.1",
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port for /metrics, which needs no key there.", min=1, max=65535),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = 1,
    *,
    given: Given,
) -> None:
    """Run the sidecar: management API and forward auth for proxies."""
    from keylatch_sidecar import server  # uvicorn: no other command needs it
    from keylatch_sidecar.http_server.limits import MIN_DESCRIPTORS
    from keylatch_sidecar.server import Listener

    logging.getLogger("keylatch").setLevel(logging.WARNING)
    settings, proxy_settings = _load_settings(given)
    _prepare_store(settings)
    export_variables(of_one_store(given))  # for the workers
    listener = Listener(host, port, uds)
    admin = Listener.optional(admin_host, admin_port, admin_uds)
    grpc = Listener.optional(host, grpc_port, grpc_uds)
    metrics = Listener.optional(metrics_host, metrics_port, None)
    _require_distinct_addresses(listener, admin, grpc, metrics)
    if grpc is not None:
        _require_grpc(grpc, workers)
    try:
        started = server.run(
            listener,
            admin,
            grpc,
            workers,
            metrics_listener=metrics,
            drain_seconds=proxy_settings.drain,
            logs_json=settings.log == "json",
        )
    except server.TooFewDescriptors as error:
        hint = f"ulimit -n, or LimitNOFILE= of systemd: at least {MIN_DESCRIPTORS}"
        output.fail(str(error), hint, output.ERROR)
    except server.CannotListen as error:
        output.fail(str(error), "another address, port or path", output.ERROR)
    if not started:
        output.fail(f"the server did not start on {listener}", "see the log above", output.ERROR)


def _load_settings(given: Given) -> tuple[Settings, ProxySettings]:
    proxy = {name: given[name] for name in PROXY_SETTINGS}
    engine = {name: given[name] for name in ENGINE_SETTINGS}
    return _load_both(lambda: Settings.load(**engine), lambda: ProxySettings.load(**proxy))


def _load_both(first: Callable[[], T], second: Callable[[], U]) -> tuple[T, U]:
    """The results of two loaders.

    Raises:
        ConfigurationError: with the mistakes that both loaders found.
    """
    try:
        loaded = first()
    except ConfigurationError as error:
        mistakes = [*error.mistakes]
        try:
            second()
        except ConfigurationError as other:
            mistakes += other.mistakes
        raise ConfigurationError(mistakes) from None
    return loaded, second()


def _prepare_store(settings: Settings) -> None:
    """Create or migrate the tables once, before the workers start.

    An unreachable store does not prevent the start: it may become reachable later, and until then
    checks are answered with 503. A store with newer tables does.
    """
    engine = Engine(settings)

    async def run() -> None:
        try:
            with contextlib.suppress(StoreUnavailable):
                await engine.store.open(int(time.time() * 1000))
        finally:
            await engine.stop()

    try:
        asyncio.run(run())
    except KeylatchError as error:
        output.fail(error.message, error.hint, output.ERROR)


def _require_distinct_addresses(*listeners: "Listener | None") -> None:
    addresses = [each.scope_address for each in listeners if each is not None]
    if len(set(addresses)) < len(addresses):
        output.fail("two listeners have the same address", "another port", output.ERROR)


def _require_grpc(listener: "Listener", workers: int) -> None:
    if workers > 1 and listener.uds is not None:
        message = "several workers cannot share a Unix socket for gRPC"
        output.fail(message, "--grpc-port, or one worker", output.ERROR)
    try:
        # Here, so that a missing package is reported once and not by every worker.
        import keylatch_sidecar.forward_auth.ext_authz_grpc  # noqa: F401
    except ImportError as error:
        message, _, hint = str(error).partition(": ")
        output.fail(message, hint, output.ERROR)
