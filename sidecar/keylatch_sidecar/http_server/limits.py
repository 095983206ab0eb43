"""All limits on the wire: the share of a process' resources that one client may use.

The law of this file: numbers only. SECURITY.md has the same table, and tests count each limit.
None is a setting, because no common reverse proxy needs more.
"""

from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 64 * 1024
"""Of one request's target and header fields, and again of all its chunk extensions and trailers;
beyond it 431. nginx forwards at most 32 KiB, Envoy 60 KiB, Apache 8 KiB per field."""

HEAD_SECONDS: Final = 10.0
"""From the first byte of a request to the end of its header fields; beyond it 408. Also from the
connection to the first byte; beyond it the connection is closed without a response."""

BODY_SECONDS: Final = 10.0
"""From the end of the header fields to the end of the body; beyond it 408."""

IDLE_SECONDS: Final = 75
"""Between two requests of a connection; beyond it the connection is closed. Longer than the idle
timeouts of proxies, which would otherwise send requests on connections that are being closed."""

ANSWER_SECONDS: Final = 60.0
"""For a client to read the 64 KiB of a response that a connection buffers; beyond it the connection
is reset. nginx's `send_timeout` is as long."""

LINGER_SECONDS: Final = 2.0
"""From an error response that ends a connection to its close: closing at once would reset the
connection, and a client that is still sending might never read the error (RFC 9112 section 9.6)."""

LINGER_BYTES: Final = 1024 * 1024
"""Read and discarded in that time."""

SWEEP_SECONDS: Final = 1.0
"""Between two checks of all connections: the times above are exceeded by at most this much."""

MAX_DESCRIPTORS: Final = 16_384
"""The soft limit of file descriptors that a process sets at its start, within its hard limit; it
uses no more even if it may. An idle connection takes 5 KB, so all of them take 65 MB."""

MIN_DESCRIPTORS: Final = 64
"""The fewest to start with: listeners, store and Redis need 25 before the first connection."""

CONNECTIONS_SHARE: Final = 0.8
"""Of the descriptors, for any use: beyond it, a new connection evicts the oldest idle one. The rest
is for the store, Redis and gRPC."""

GRPC_CONNECTIONS_SHARE: Final = 0.1
"""Of the descriptors, for gRPC connections."""

GRPC_MESSAGE_BYTES: Final = 256 * 1024
"""Of one check over gRPC, including the client's body where a proxy sends it; beyond it
RESOURCE_EXHAUSTED."""

GRPC_HEADERS: Final = 1_000
"""Of the original request of a check over gRPC; beyond it 403. Envoy's default limit is 100."""

GRPC_METADATA_BYTES: Final = 16 * 1024
"""Of the header fields of one gRPC call itself; beyond it RESOURCE_EXHAUSTED."""

GRPC_CALLS: Final = 1_000
"""Concurrent calls in a process; beyond it RESOURCE_EXHAUSTED, on which a proxy fails closed."""

GRPC_IDLE_SECONDS: Final = 300
"""Without a call; beyond it the connection gets a GOAWAY, which loses no call."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of HTTP connections. Each field defaults to the constant of its name."""

    head_bytes: int = HEAD_BYTES
    head_seconds: float = HEAD_SECONDS
    body_seconds: float = BODY_SECONDS
    idle_seconds: float = IDLE_SECONDS
    answer_seconds: float = ANSWER_SECONDS
    linger_seconds: float = LINGER_SECONDS
    linger_bytes: int = LINGER_BYTES
    sweep_seconds: float = SWEEP_SECONDS
    connections_share: float = CONNECTIONS_SHARE
