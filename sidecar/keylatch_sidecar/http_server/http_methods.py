"""uvicorn's fast protocol for any method.

Envoy asks with the client's method, whatever that is; httptools refuses what is not on its list.
"""

import re
from typing import Final

from keylatch_sidecar.http_server.message_head import PLACEHOLDER_METHOD
from keylatch_sidecar.http_server.protocol import BETWEEN, LimitedProtocol, Phase

_KNOWN_METHODS: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE"}
)
_MAX_METHOD_LENGTH: Final = max(len(method) for method in _KNOWN_METHODS)
_METHOD: Final = re.compile(rb"\A[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")  # RFC 9110, `token`
_HTTP2: Final = b"PRI"  # begins no request (RFC 9113 section 3.4)


class AnyMethod(LimitedProtocol):
    """Shows httptools POST in the place of a method that it may not know: where a request ends does
    not depend on its method (RFC 9112 section 6).

    Only between requests, by the parser's own judgement: the bytes of a body must never be taken
    for a request. So a request that was sent before the one ahead of it was answered has to have a
    method that httptools knows.
    """

    _partial_method = b""
    """The beginning of a request whose method has not ended."""

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
        """What the parser is shown instead; nothing while the method has not ended."""
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
