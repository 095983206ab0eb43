"""uvicorn's httptools protocol for any method.

Envoy calls the sidecar with the client's method, which may be any; httptools rejects methods that
are not on its list.
"""

import re
from typing import Final

from keylatch_sidecar.http_server.protocol import BETWEEN, LimitedProtocol, Phase
from keylatch_sidecar.http_server.upgrades import PLACEHOLDER_METHOD

_KNOWN_METHODS: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE"}
)
_MAX_METHOD_LENGTH: Final = max(len(method) for method in _KNOWN_METHODS)
_METHOD: Final = re.compile(rb"\A[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")  # RFC 9110, `token`
_HTTP2: Final = b"PRI"  # the preface of HTTP/2, no request (RFC 9113 section 3.4)


class AnyMethod(LimitedProtocol):
    """Replaces a method that httptools may not know with POST before parsing: where a request ends
    does not depend on its method (RFC 9112 section 6).

    Methods are replaced only where the parser is between requests, so that the bytes of a body are
    never read as a request. A pipelined request must therefore have a method that httptools knows.
    """

    _partial_method = b""
    """The start of a request whose method is incomplete."""

    def data_received(self, data: bytes) -> None:
        if (
            self._partial_method
            or (
                self.phase is BETWEEN
                and data[: data.find(b" ", 0, _MAX_METHOD_LENGTH + 1)] not in _KNOWN_METHODS
            )
        ) and not self.is_pipelined:
            data = self._with_known_method(self._partial_method + data)
            if not data:
                return
        super().data_received(data)

    def _with_known_method(self, data: bytes) -> bytes:
        """The bytes for the parser; none while the method is incomplete."""
        self._partial_method = b""
        start = data.lstrip(b"\r\n")  # RFC 9112 section 2.2
        method, space, rest = start.partition(b" ")
        if not space and _METHOD.match(start):
            self._partial_method = start
            self.phase = Phase.HEAD
            self.start_turn()
            return b""
        if not space or method in (*_KNOWN_METHODS, _HTTP2) or not _METHOD.match(method):
            return start
        self.method = method.decode()
        return PLACEHOLDER_METHOD + space + rest
