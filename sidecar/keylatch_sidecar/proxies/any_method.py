"""uvicorn's fast protocol for common methods, its patient one for all others.

Envoy asks with the client's method, whatever that is; httptools refuses what is not on its list.
"""

from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_FAST: Final = frozenset(
    {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE"}
)
_LONGEST: Final = max(len(method) for method in _FAST)


class AnyMethod(HttpToolsProtocol):
    """Hands a connection over to h11 when a request begins that is not for httptools.

    Only between requests, by the parser's own judgement: the bytes of a body that nobody waits for
    must never be taken for a request.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._is_between = True

    def on_message_begin(self) -> None:
        self._is_between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._is_between = True
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        is_fast = data[: data.find(b" ", 0, _LONGEST + 1)] in _FAST
        is_idle = self._is_between and (self.cycle is None or self.cycle.response_complete)
        if is_fast or not is_idle:
            super().data_received(data)
            return
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        patient = H11Protocol(
            config=self.config,
            server_state=self.server_state,
            app_state=self.app_state,
            _loop=self.loop,
        )
        patient.connection_made(self.transport)
        self.transport.set_protocol(patient)
        patient.data_received(data)
