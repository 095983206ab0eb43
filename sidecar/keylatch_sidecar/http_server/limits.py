"""What one client may take of a process that all clients share: every limit on the wire.

The law of this file: numbers only. SECURITY.md has the same table, and a test for each that counts.
Nothing here is a setting, because no proxy in use needs more.
"""

from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 64 * 1024
"""Of one request's target and header fields, and again of all its chunk extensions and trailers;
then 431. nginx passes on 32 KiB at most, Envoy 60 KiB, Apache 8 KiB a field."""

HEAD_SECONDS: Final = 10.0
"""From the first byte of a request to the end of its header fields; then 408. Also from connecting
to the first byte; then the connection is closed without an answer."""

BODY_SECONDS: Final = 10.0
"""From the end of the header fields to the end of the body; then 408."""

IDLE_SECONDS: Final = 75
"""Between two requests of a connection; then it is closed. Longer than the idle times of proxies,
which would otherwise send requests on connections that are being closed."""

ANSWER_SECONDS: Final = 60.0
"""For a client to read the 64 KiB of an answer that a connection holds; then it is reset. nginx's
`send_timeout` is as long."""

LINGER_SECONDS: Final = 2.0
"""From an error that ends a connection to its close: closing at once would reset it, and a client
that is still sending might never read the error (RFC 9112 section 9.6)."""

LINGER_BYTES: Final = 1024 * 1024
"""Read and discarded meanwhile."""

SWEEP_SECONDS: Final = 1.0
"""Between two looks at all connections, so times above are exceeded by this much at most."""

MAX_DESCRIPTORS: Final = 16_384
"""File descriptors that a process asks for at its start, as far as its hard limit lets it; it uses
no more even if it has more. An idle connection takes 5 KB, so all of them 65 MB."""

MIN_DESCRIPTORS: Final = 64
"""With fewer it does not start: listeners, store and Redis need 25 before the first connection."""

CONNECTIONS_SHARE: Final = 0.8
"""Of the descriptors, in use by whatever: then a new connection costs the oldest silent one its
place. The rest is for the store, Redis and gRPC."""

GRPC_CONNECTIONS_SHARE: Final = 0.1
"""Of the descriptors, for connections over gRPC."""

GRPC_MESSAGE_BYTES: Final = 256 * 1024
"""Of one check over gRPC, the client's body included where a proxy sends it along; then
RESOURCE_EXHAUSTED."""

GRPC_HEADERS: Final = 1_000
"""Of the request that a check over gRPC is about; then 403. Envoy lets 100 through unless told
otherwise."""

GRPC_METADATA_BYTES: Final = 16 * 1024
"""Of the header fields of one call over gRPC itself; then RESOURCE_EXHAUSTED."""

GRPC_CALLS: Final = 1_000
"""Under way at once in a process; then RESOURCE_EXHAUSTED. A proxy fails closed on it."""

GRPC_IDLE_SECONDS: Final = 300
"""Without a call; then a connection is asked to end (GOAWAY), which loses no call."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one HTTP connection, and of all of a process. Each field is the constant of its name."""

    head_bytes: int = HEAD_BYTES
    head_seconds: float = HEAD_SECONDS
    body_seconds: float = BODY_SECONDS
    idle_seconds: float = IDLE_SECONDS
    answer_seconds: float = ANSWER_SECONDS
    linger_seconds: float = LINGER_SECONDS
    linger_bytes: int = LINGER_BYTES
    sweep_seconds: float = SWEEP_SECONDS
    connections_share: float = CONNECTIONS_SHARE
