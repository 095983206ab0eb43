"""What one check leaves behind where that is asked for: a request id for the log, how long its
stages took, and who knew. Nothing of it is made unless `KEYLATCH_TIMING` or `KEYLATCH_LOG` say so.

A refusal tells how long it took, as any stop watch does, and not who knew: that would tell whoever
tries tokens which of them name a key.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Protocol, TypeVar

from keylatch.model import ANY_KEY, Allow, Verdict, Wanted
from keylatch.tokens import SECRET_LENGTH, Token, without_tokens

Header = tuple[bytes, bytes]
T = TypeVar("T")

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:=+/-]{1,64}")
_LONG_WORD: Final = re.compile(rf"[A-Za-z0-9]{{{SECRET_LENGTH},}}")  # a ULID has 26
_HEX: Final = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_FOUND: Final = {
    "l1": b"keylatch; hit",
    "l2": b"keylatch; hit; detail=l2",
    "store": b"keylatch; fwd=miss; detail=store",
}

TRAIL: Final[ContextVar["Trail | None"]] = ContextVar("keylatch_trail", default=None)


class Trail:
    """Of one request.

    Args:
        request_id: tells its lines in the log from those of others.
    """

    __slots__ = ("is_allowed", "request_id", "seconds", "stages", "tier")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.is_allowed: bool | None = None
        self.tier = "l1"  # a hit says nothing; whoever else decides does
        self.seconds = 0.0
        self.stages: list[tuple[str, float]] = []

    def judged(self, verdict: object, seconds: float) -> None:
        """A check took so long, or went so far: a token is still to be looked up."""
        self.seconds += seconds
        if not isinstance(verdict, Token):
            self.is_allowed = isinstance(verdict, Allow)

    def headers(self) -> list[Header]:
        """`Server-Timing` (W3C) in milliseconds, and `Cache-Status` (RFC 9211); none where no key
        was asked for."""
        if self.is_allowed is None:
            return []
        timing = [f"keylatch;dur={self.seconds * 1000:.3f}"]
        found = []
        if self.is_allowed:
            timing += [f"keylatch-{name};dur={took * 1000:.3f}" for name, took in self.stages]
            if self.tier in _FOUND:
                found.append((b"cache-status", _FOUND[self.tier]))
        return [(b"server-timing", ", ".join(timing).encode()), *found]


@contextmanager
def following(headers: Iterable[Header]) -> Iterator[Trail]:
    """The trail of the request with these headers, until the end of the block."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    trail = Trail(request_id(given.decode("latin-1")))
    before = TRAIL.set(trail)
    try:
        yield trail
    finally:
        TRAIL.reset(before)


def request_id(given: str) -> str:
    """The caller's `X-Request-Id` if it is short, plain and no part of a token; else a new one."""
    if _REQUEST_ID.fullmatch(given) and not _may_be_secret(given):
        return given
    return secrets.token_hex(8)


def _may_be_secret(given: str) -> bool:
    words = _LONG_WORD.findall(given)
    return without_tokens(given) != given or any(not _HEX.fullmatch(word) for word in words)


class Checks(Protocol):
    """What an engine does for an adapter."""

    def glance(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict | Token:
        """The verdict, or the token where it takes waiting."""

    async def resolve(self, token: Token, wanted: Wanted = ANY_KEY) -> Verdict:
        """The verdict."""


class Followed:
    """An engine's checks, timed for the trail.

    Args:
        checks: the engine.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def glance(self, values: Sequence[bytes], wanted: Wanted = ANY_KEY) -> Verdict | Token:
        return timed(lambda: self._checks.glance(values, wanted))

    async def resolve(self, token: Token, wanted: Wanted = ANY_KEY) -> Verdict:
        return await timed_awaiting(self._checks.resolve(token, wanted))


def timed(check: Callable[[], T]) -> T:
    """What a check returns; the trail learns how long it took."""
    began = time.perf_counter()
    verdict = check()
    _judged(verdict, began)
    return verdict


async def timed_awaiting(check: Awaitable[T]) -> T:
    """The same of a check that is awaited."""
    began = time.perf_counter()
    verdict = await check
    _judged(verdict, began)
    return verdict


def _judged(verdict: object, began: float) -> None:
    trail = TRAIL.get()
    if trail is not None:
        trail.judged(verdict, time.perf_counter() - began)
