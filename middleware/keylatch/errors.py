"""Every exception that keylatch raises.

    KeylatchError                     catches all of them
    ├── OperationalError              a service or file does not work
    │   ├── StoreUnavailable          the store cannot be reached or does not answer in time
    │   ├── StoreIncompatible         a newer version of keylatch created the store's tables
    │   ├── HashingBusy               the hash queue is full: try again in a moment
    │   ├── HashingFailed             a stored hash cannot be read, or argon2 has no memory
    │   ├── WrongEventLoop            the engine is started on another event loop
    │   └── BackupError               a file cannot be copied or restored
    ├── ChangeRefused                 the change is not allowed; nothing was changed
    │   ├── CallerRefused             the caller's own key or secret is not valid any more
    │   ├── NotPermitted              the caller's key does not have the right to do this
    │   ├── InvalidKeyState           the key was deleted, or has no rotation to end
    │   ├── QuotaExceeded             the organisation has reached a limit
    │   └── SecretInUse               a secret of the store cannot be retired yet
    ├── Refused                       an ASGI app refuses a request; the middleware answers it
    ├── InvalidValue                  an argument that no key may have (also a ValueError)
    └── ConfigurationError            settings or rules that cannot work (also a ValueError)

`KeylatchError`, `OperationalError` and `ChangeRefused` are never raised themselves. No message
contains a token, a hash or a password, so every message may be logged.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keylatch.core.decisions import Deny, Reason


class KeylatchError(Exception):
    """The base of the tree.

    Args:
        message: what happened, in one line.
        hint: what to do about it, in one line; empty if there is nothing to say.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class OperationalError(KeylatchError):
    """A service or file does not work. The call itself was correct (PEP 249 uses the same word)."""


class StoreUnavailable(OperationalError):
    """The store cannot be reached, is locked for too long, or does not answer in time."""


class StoreIncompatible(OperationalError):
    """A newer version of keylatch created the store's tables."""


class HashingBusy(OperationalError):
    """The hash queue is full. Nothing was computed."""


class HashingFailed(OperationalError):
    """A hash could not be computed or read. This says nothing about the key."""


class WrongEventLoop(OperationalError):
    """An engine was used on another event loop than the one it is started on."""


class BackupError(OperationalError):
    """A file cannot be copied or restored. Nothing was changed."""


class ChangeRefused(KeylatchError):
    """The change is not allowed. Nothing was changed."""


class CallerRefused(ChangeRefused):
    """The caller's own key, or the secret it was used with, is not valid any more.

    Args:
        reason: why a request with this key is refused now.
    """

    def __init__(self, reason: "Reason") -> None:
        super().__init__(reason.value)
        self.reason = reason


class NotPermitted(ChangeRefused):
    """The caller's key does not have the right to do this, such as to grant FULL."""


class InvalidKeyState(ChangeRefused):
    """The key is in a state that does not allow this change, such as deleted."""


class QuotaExceeded(ChangeRefused):
    """The caller's organisation has reached a limit.

    Args:
        message: for people, in one sentence.
        retry_after_seconds: when there will be room again; None: waiting does not help.
        limit: which one: `hashes`, `changes` or `keys`.
    """

    def __init__(self, message: str, retry_after_seconds: int | None, *, limit: str) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.limit = limit


class SecretInUse(ChangeRefused):
    """A secret of the store cannot be retired: it does not exist, or is still needed."""


class Refused(KeylatchError):
    """Raised in an ASGI app before it has started its response: the middleware sends the refusal.

    Args:
        deny: why, and which permission would have sufficed.
    """

    def __init__(self, deny: "Deny") -> None:
        super().__init__(deny.reason.value)
        self.deny = deny


class InvalidValue(KeylatchError, ValueError):
    """An argument that no key may have.

    Args:
        field: the argument.
        message: what it must be instead.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class ConfigurationError(KeylatchError, ValueError):
    """Settings or rules that cannot work. Lists every mistake, each with a hint.

    Args:
        mistakes: pairs of (what is wrong, what to do instead).
    """

    def __init__(self, mistakes: Sequence[tuple[str, str]]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("; ".join(f"{wrong} ({hint})" for wrong, hint in self.mistakes))
