"""The protobuf messages of Envoy's `Check`, with the fields that keylatch uses.

Names and numbers are those of `envoy/service/auth/v3/external_auth.proto` and its imports; other
fields are ignored. A table instead of a package: the official one, xds-protos, writes into the
directories of other packages (`google`, `opentelemetry`, `envoy`).

Strings are declared as bytes, as in ASGI, so invalid UTF-8 does not make a message unreadable. A
map is declared as what it is on the wire, a list of pairs, so duplicate names remain visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from keylatch.core.refusals import Header, Refusal
from keylatch_sidecar.forward_auth.original_request import OriginalRequest
from keylatch_sidecar.http_server.limits import GRPC_HEADERS

TEXT: Final = "text"
NUMBER: Final = "number"

FIELDS: Final = {
    "CheckRequest": [(1, "attributes", "AttributeContext")],
    "AttributeContext": [
        (1, "source", "Peer"),
        (4, "request", "Request"),
        (10, "context_extensions", "[Pair]"),
    ],
    "Peer": [(1, "address", "Address")],
    "Address": [(1, "socket_address", "SocketAddress")],
    "SocketAddress": [(2, "address", TEXT)],
    "Request": [(2, "http", "HttpRequest")],
    "HttpRequest": [
        (2, "method", TEXT),
        (3, "headers", "[Pair]"),
        (4, "path", TEXT),
        (13, "header_map", "HeaderMap"),  # instead of `headers` where encode_raw_headers is set
    ],
    "HeaderMap": [(1, "headers", "[HeaderValue]")],
    "Pair": [(1, "key", TEXT), (2, "value", TEXT)],
    "HeaderValue": [(1, "key", TEXT), (2, "value", TEXT), (3, "raw_value", TEXT)],
    "CheckResponse": [
        (1, "status", "Status"),
        (2, "denied_response", "DeniedHttpResponse"),
        (3, "ok_response", "OkHttpResponse"),
    ],
    "Status": [(1, "code", NUMBER)],
    "DeniedHttpResponse": [
        (1, "status", "Status"),
        (2, "headers", "[HeaderValueOption]"),
        (3, "body", TEXT),
    ],
    "OkHttpResponse": [(2, "headers", "[HeaderValueOption]"), (5, "headers_to_remove", "[text]")],
    "HeaderValueOption": [(1, "header", "HeaderValue"), (3, "append_action", NUMBER)],
}
"""Message → number, name and type of its fields; `[…]` is repeated."""

OVERWRITE: Final = 2
"""OVERWRITE_IF_EXISTS_OR_ADD. The default appends: the client's own value would stay first."""

GRPC_CODES: Final = {401: 16, 403: 7, 503: 14}
"""HTTP status → google.rpc.Code. Envoy only distinguishes 0; other proxies may use the code."""

_TYPES: Final = {TEXT: FieldDescriptorProto.TYPE_BYTES, NUMBER: FieldDescriptorProto.TYPE_INT32}


def _message_pool() -> DescriptorPool:
    """A pool of its own: the default pool may contain the official messages."""
    file = FileDescriptorProto(name="keylatch.proto", package="keylatch", syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for number, field_name, kind in fields:
            field = message.field.add(number=number, name=field_name)
            element = kind.strip("[]")
            field.label = field.LABEL_OPTIONAL if element == kind else field.LABEL_REPEATED
            if element in _TYPES:
                field.type = _TYPES[element]
            else:
                field.type_name = f".keylatch.{element}"
    pool = DescriptorPool()
    pool.Add(file)
    return pool


_POOL: Final = _message_pool()
CheckRequest: Final[Any] = GetMessageClass(_POOL.FindMessageTypeByName("keylatch.CheckRequest"))
CheckResponse: Final[Any] = GetMessageClass(_POOL.FindMessageTypeByName("keylatch.CheckResponse"))


@dataclass(frozen=True, slots=True)
class CheckQuery:
    """The fields of a `CheckRequest`.

    Args:
        original: the request's method and path; None: the message has no HTTP request.
        headers: of the request, names in lower case.
        permissions: that the key must permit: each a list, separated by commas.
        environments: that the key must be for.
        client: the client's address; None: the message has none.
    """

    original: OriginalRequest | None
    headers: Sequence[Header]
    permissions: Sequence[bytes]
    environments: Sequence[bytes] = ()
    client: str | None = field(default=None, compare=False)


def parse_check_request(message: bytes) -> CheckQuery:
    """Parse a `CheckRequest`. A malformed message is a query without an original request, and so is
    one with more headers than any proxy forwards, which would block all others for 20 ms."""
    request = CheckRequest()
    try:
        request.ParseFromString(message)
    except DecodeError:
        return CheckQuery(None, (), ())
    http = request.attributes.request.http
    if len(http.headers) + len(http.header_map.headers) > GRPC_HEADERS:
        return CheckQuery(None, (), ())
    original = None
    if http.method and http.path:
        original = OriginalRequest(http.method.decode("latin-1"), http.path.decode("latin-1"))
    headers = [(pair.key.lower(), pair.value) for pair in http.headers]
    for pair in http.header_map.headers:
        headers.append((pair.key.lower(), pair.raw_value or pair.value))
    extensions = request.attributes.context_extensions
    permissions = [pair.value for pair in extensions if pair.key == b"permission"]
    environments = [pair.value for pair in extensions if pair.key == b"environment"]
    address = request.attributes.source.address.socket_address.address
    client = address.decode("latin-1") or None
    return CheckQuery(original, headers, permissions, environments, client)


def allow(headers: Sequence[Header], remove: Sequence[bytes]) -> bytes:
    """A `CheckResponse` that allows the request.

    Args:
        headers: for the app, replacing the client's.
        remove: names of headers that the app must not receive, none of those in `headers`: Envoy
            removes after it has set.
    """
    allowed = {"headers": _header_options(headers), "headers_to_remove": remove}
    return _serialize(status={"code": 0}, ok_response=allowed)


def deny(refusal: Refusal) -> bytes:
    """A `CheckResponse` that refuses the request with this response."""
    # Without content-length: the proxy may change the body, and counts it.
    headers = [header for header in refusal.headers if header[0] != b"content-length"]
    denied = {
        "status": {"code": refusal.status},
        "headers": _header_options(headers),
        "body": refusal.body,
    }
    return _serialize(status={"code": GRPC_CODES[refusal.status]}, denied_response=denied)


def _header_options(headers: Sequence[Header]) -> list[dict[str, Any]]:
    return [
        {"header": {"key": name, "value": value}, "append_action": OVERWRITE}
        for name, value in headers
    ]


def _serialize(**fields: Any) -> bytes:
    message: bytes = CheckResponse(**fields).SerializeToString()
    return message
