"""`envoy.service.auth.v3.Authorization/Check`: forward auth over gRPC, for Envoy and others.

A response message has the same status, headers and body as a response of `/verify` or `/ext_authz`.
The request message is written by the proxy alone, so no source has to be configured: it has the
original request's method, path and headers, and the requirement in `context_extensions`:
`permission: SENDING`, and `environment: live`.

Imported only if a gRPC listener is configured: it needs `pip install 'keylatch[grpc]'`.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from keylatch.core.refusals import Header, Refusal
from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.telemetry.repeated_warning import RepeatedWarning
from keylatch_sidecar.drain import Drain
from keylatch_sidecar.forward_auth.decision import ForwardAuth, identity_headers
from keylatch_sidecar.forward_auth.ext_authz import requirement_from_lists
from keylatch_sidecar.http_server.file_descriptors import descriptor_limit
from keylatch_sidecar.http_server.limits import (
    GRPC_CALLS,
    GRPC_CONNECTIONS_SHARE,
    GRPC_IDLE_SECONDS,
    GRPC_MESSAGE_BYTES,
    GRPC_METADATA_BYTES,
    HEAD_SECONDS,
)

try:
    import grpc
    import grpc.aio

    from keylatch_sidecar.forward_auth.protobuf import allow, deny, parse_check_request
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] not in ("grpc", "google"):
        raise
    raise ImportError("gRPC needs grpcio and protobuf: pip install 'keylatch[grpc]'") from error

SERVICE: Final = "envoy.service.auth.v3.Authorization"

_ALWAYS_REMOVED: Final = (b"authorization", b"x-keylatch-require", b"x-keylatch-error")
_UNIX: Final = "unix:"

# grpc.health.v1: HealthCheckRequest has one string, HealthCheckResponse one number. The package
# grpcio-health-checking would require the newest protobuf.
_SERVER_REQUEST: Final = b""
_SERVICE_REQUEST: Final = b"\n" + bytes([len(SERVICE)]) + SERVICE.encode()
_SERVING: Final = b"\x08\x01"
_NOT_SERVING: Final = b"\x08\x02"

log = logging.getLogger("keylatch.proxies")


class AuthorizationService:
    """The service `envoy.service.auth.v3.Authorization`.

    Args:
        forward_auth: decides.
    """

    def __init__(self, forward_auth: ForwardAuth) -> None:
        self._forward_auth = forward_auth

    async def check(self, message: bytes, context: object) -> bytes:
        """Answer a `CheckRequest`, also a malformed one: proxies treat a gRPC error as an outage,
        on which some allow the request."""
        query = parse_check_request(message)
        values = [value for name, value in query.headers if name == b"authorization"]
        requirement = requirement_from_lists(query.permissions, query.environments)
        caller = (query.client, None)
        outcome = await self._forward_auth.decide(
            query.original, values, requirement, lambda: caller
        )
        if isinstance(outcome, Refusal):
            return deny(outcome)
        identity = identity_headers(outcome.principal)
        return allow(identity, headers_to_remove(query.headers, identity))


class HealthService:
    """`grpc.health.v1.Health/Check`: `/healthz` for the server, `/readyz` for the service.

    Args:
        engine: its readiness is that of the service.
        drain: while it drains, the service is not ready.
    """

    def __init__(self, engine: Engine, drain: Drain) -> None:
        self._engine = engine
        self._drain = drain
        self._not_ready = RepeatedWarning(log, "reported not ready to a health check: %s")

    async def check(self, message: bytes, context: Any) -> bytes:
        """Answer a `HealthCheckRequest`."""
        if message == _SERVER_REQUEST:
            return _SERVING
        if message != _SERVICE_REQUEST:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        if self._drain.has_begun:
            return _NOT_SERVING
        try:
            await self._engine.ready()
        except KeylatchError as error:
            self._not_ready.add(error.message)
            return _NOT_SERVING
        return _SERVING


def headers_to_remove(headers: Sequence[Header], identity: Sequence[Header]) -> list[bytes]:
    """Headers of the client that the app must not receive: the key, and names that an app could
    mistake for an identity header. WSGI and CGI apps read `x_keylatch.key-id` as such a name."""
    own_names = {name for name, _ in identity}
    lookalikes = {
        name
        for name, _ in headers
        if name[:1] == b"x" and re.sub(rb"[^a-z0-9]", b"-", name).startswith(b"x-keylatch")
    }
    return [*_ALWAYS_REMOVED, *sorted(lookalikes - own_names - {*_ALWAYS_REMOVED})]


async def serve(
    forward_auth: ForwardAuth,
    engine: Engine,
    address: str,
    *,
    drain: Drain | None = None,
    is_shared: bool = False,
    max_calls: int = GRPC_CALLS,
    max_connections: int | None = None,
) -> grpc.aio.Server:
    """A started server; `await server.stop(grace)` stops it.

    Args:
        forward_auth: decides.
        engine: for the health service.
        address: `127.0.0.1:8703`, or `unix:/run/keylatch/grpc.sock`.
        drain: for the health service; None: it never drains.
        is_shared: whether other workers listen on the same port.
        max_calls: the limit of concurrent calls.
        max_connections: the limit of connections; None: a share of the file descriptors.

    Raises:
        OSError: the address cannot be bound.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", int(is_shared)),
            # No limit for HTTP/2 pings: by default, gRPC closes a connection at the third ping
            # in five minutes, and pending calls are lost.
            ("grpc.http2.max_ping_strikes", 0),
            *_limits(max_connections or int(descriptor_limit() * GRPC_CONNECTIONS_SHARE)),
        ],
        maximum_concurrent_rpcs=max_calls,
    )
    checks: dict[str, Any] = {
        SERVICE: AuthorizationService(forward_auth).check,
        "grpc.health.v1.Health": HealthService(engine, drain or Drain()).check,
    }
    for service, check in checks.items():
        # Without a serializer and a deserializer: messages are bytes here.
        methods: dict[str, Any] = {"Check": grpc.unary_unary_rpc_method_handler(check)}
        handler = grpc.method_handlers_generic_handler(service, methods)
        server.add_generic_rpc_handlers([handler])
    _listen(server, address)
    await server.start()
    return server


def _limits(max_connections: int) -> list[tuple[str, int]]:
    """Options for the limits. A call beyond them gets a gRPC error, on which a proxy that fails
    closed, as all configurations in `deploy/` do, refuses the request."""
    return [
        ("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES),
        ("grpc.max_metadata_size", GRPC_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", GRPC_METADATA_BYTES),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.server_handshake_timeout_ms", int(HEAD_SECONDS * 1000)),
        ("grpc.max_connection_idle_ms", GRPC_IDLE_SECONDS * 1000),
    ]


def _listen(server: grpc.aio.Server, address: str) -> None:
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from None
    if address.startswith(_UNIX):
        # As for HTTP: the directory's mode restricts access.
        Path(address.removeprefix(_UNIX)).chmod(0o666)
