"""The trace of one request: an id for its log messages, the duration and the source of its check.

Traces exist only with `KEYLATCH_TIMING=on` or `KEYLATCH_LOG=json`. The headers of a refusal show
its duration, which a client can measure anyway, but not its source: that would show to a client
that tries tokens which of them name a key.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

from keylatch.core.decisions import Allow, Deny
from keylatch.core.tokens import SECRET_LENGTH, redact_tokens
from keylatch.telemetry.events import Decided, Event, StageEnded

Header = tuple[bytes, bytes]
T = TypeVar("T")

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:=+/-]{1,64}")
_LONG_WORD: Final = re.compile(rf"[A-Za-z0-9]{{{SECRET_LENGTH},}}")  # a ULID has 26
_HEX: Final = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_CACHE_STATUS: Final = {
    "l1": b"keylatch; hit",
    "l2": b"keylatch; hit; detail=l2",
    "store": b"keylatch; fwd=miss; detail=store",
}

REQUEST_TRACE: Final[ContextVar["RequestTrace | None"]] = ContextVar(
    "keylatch_request_trace", default=None
)


class RequestTrace:
    """The trace of one request.

    Args:
        request_id: identifies its log messages.
    """

    __slots__ = ("is_allowed", "request_id", "seconds", "source", "stages")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.is_allowed: bool | None = None
        self.source = "l1"  # a hit observes no event, every other decision does
        self.seconds = 0.0
        self.stages: list[tuple[str, float]] = []

    def record_decision(self, decision: object, seconds: float) -> None:
        """Record the result of a check; after a cache miss the check goes on."""
        self.seconds += seconds
        if isinstance(decision, Allow | Deny):
            self.is_allowed = isinstance(decision, Allow)

    def headers(self) -> list[Header]:
        """`Server-Timing` (W3C, in milliseconds) and `Cache-Status` (RFC 9211); empty if the
        request needed no key."""
        if self.is_allowed is None:
            return []
        timing = [f"keylatch;dur={self.seconds * 1000:.3f}"]
        cache_status = []
        if self.is_allowed:
            timing += [f"keylatch-{name};dur={seconds * 1000:.3f}" for name, seconds in self.stages]
            if self.source in _CACHE_STATUS:
                cache_status.append((b"cache-status", _CACHE_STATUS[self.source]))
        return [(b"server-timing", ", ".join(timing).encode()), *cache_status]


def on_event(event: Event) -> None:
    """Record an event in the trace of the current request, if that is traced."""
    trace = REQUEST_TRACE.get()
    if trace is None:
        return
    match event:
        case Decided():
            trace.source = event.source
        case StageEnded():
            trace.stages.append((event.stage, event.seconds))


@contextmanager
def tracing_request(headers: Iterable[Header]) -> Iterator[RequestTrace]:
    """Trace the request with these headers until the end of the block."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    trace = RequestTrace(request_id(given.decode("latin-1")))
    token = REQUEST_TRACE.set(trace)
    try:
        yield trace
    finally:
        REQUEST_TRACE.reset(token)


def request_id(given: str) -> str:
    """The client's `X-Request-Id` if it is short, plain and no part of a token; else a new one."""
    if _REQUEST_ID.fullmatch(given) and not _may_be_secret(given):
        return given
    return secrets.token_hex(8)


def _may_be_secret(given: str) -> bool:
    words = _LONG_WORD.findall(given)
    return redact_tokens(given) != given or any(not _HEX.fullmatch(word) for word in words)


def time_check(check: Callable[[], T], timer: Callable[[], float] = time.perf_counter) -> T:
    """The result of a check, recorded in the request's trace with its duration."""
    started_at = timer()
    decision = check()
    _record_decision(decision, timer() - started_at)
    return decision


async def time_awaited_check(
    check: Awaitable[T], timer: Callable[[], float] = time.perf_counter
) -> T:
    """`time_check` for a check that is awaited."""
    started_at = timer()
    decision = await check
    _record_decision(decision, timer() - started_at)
    return decision


def _record_decision(decision: object, seconds: float) -> None:
    trace = REQUEST_TRACE.get()
    if trace is not None:
        trace.record_decision(decision, seconds)
