"""The errors of redis-py: what failed, and what Redis refused.

A log line names the first word of an error reply (`NOPERM`, `OOM`) and not its text, which can
repeat the arguments of a command.
"""

import ssl
from collections.abc import Iterator
from typing import Final

from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

FAILURES: Final = (RedisError, RedisClusterException, OSError, TimeoutError)
"""What a call to Redis raises if it fails."""

WRONG_TYPE: Final = "WRONGTYPE"

_WORDS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (NoPermissionError, "NOPERM"),
    (OutOfMemoryError, "OOM"),
    (ReadOnlyError, "READONLY"),
    (MovedError, "MOVED"),
    (AskError, "ASK"),
    (TryAgainError, "TRYAGAIN"),
    (ClusterCrossSlotError, "CROSSSLOT"),
    (MasterDownError, "MASTERDOWN"),
    (ClusterDownError, "CLUSTERDOWN"),
    (BusyLoadingError, "LOADING"),
    (AuthenticationError, "NOAUTH"),
)
"""redis-py removes the first word of these replies, and before 8.0 it keeps it nowhere."""


class NotConnected(RedisError):
    """The connection is still being opened, or could not be; the opener reports why."""


def is_not_connected(error: BaseException) -> bool:
    """Whether a connection was waited for, and not yet open."""
    return any(isinstance(cause, NotConnected) for cause in _chain(error))


def is_reply(error: BaseException) -> bool:
    """Whether Redis has replied on a connection that can be used further."""
    return isinstance(error, ResponseError)


def refusal(error: BaseException) -> str | None:
    """The first word of the error reply that caused an error; None: there was no reply."""
    for cause in _chain(error):
        if isinstance(cause, (ResponseError, AuthenticationError, BusyLoadingError)):
            return _word(cause)
    return None


def _word(error: Exception) -> str:
    code = getattr(error, "status_code", None)
    if isinstance(code, str):
        return code
    for kind, word in _WORDS:
        if isinstance(error, kind):
            return word
    return (str(error).split() or [""])[0]


_REASONS: Final = {
    "TimeoutError": "no answer in time",
    "MasterNotFoundError": "no Sentinel knows a running primary of this name",
}
"""By name of the class: redis-py's module for Sentinel is imported only where there is one."""


def reason(error: BaseException) -> str:
    """Why a call failed without a reply of Redis, in a few words without secrets."""
    for cause in _chain(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate verify failed: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {cause.reason or type(cause).__name__}"
        if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, TimeoutError):
            return cause.strerror
    name = type(error).__name__
    return _REASONS.get(name, name)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
