"""uvicorn's fast protocol for any method.

Envoy asks with the client's method, whatever that is; httptools refuses what is not on its list.
"""

import re
from typing import Final

from keylatch_sidecar.proxies.bounded import BETWEEN, Bounded, Phase
from keylatch_sidecar.proxies.other_head import STAND_IN

_FAST: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE"}
)
_LONGEST: Final = max(len(method) for method in _FAST)
_METHOD: Final = re.compile(rb"\A[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")  # RFC 9110, `token`
_HTTP2: Final = b"PRI"  # begins no request (RFC 9113 section 3.4)


class AnyMethod(Bounded):
    """Shows httptools POST in the place of a method that it may not know: where a request ends does
    not depend on its method (RFC 9112 section 6).

    Only between requests, by the parser's own judgement: the bytes of a body must never be taken
    for a request. So a request that was sent before the one ahead of it was answered has to have a
    method that httptools knows.
    """

    _start = b""
    """The beginning of a request whose method has not ended."""

    def data_received(self, data: bytes) -> None:
        if (
            self._start
            or (self.phase is BETWEEN and data[: data.find(b" ", 0, _LONGEST + 1)] not in _FAST)
        ) and not self.is_behind:
            data = self._shown(self._start + data)
            if not data:
                return
        super().data_received(data)

    def _shown(self, data: bytes) -> bytes:
        """What the parser is shown instead; nothing while the method has not ended."""
        self._start = b""
        start = data.lstrip(b"\r\n")  # RFC 9112 section 2.2
        method, blank, rest = start.partition(b" ")
        if not blank and _METHOD.match(start):
            self._start = start
            self.phase = Phase.HEAD
            self.begin()
            return b""
        if not blank or method in (*_FAST, _HTTP2) or not _METHOD.match(method):
            return start
        self.method = method.decode()
        return STAND_IN + blank + rest
