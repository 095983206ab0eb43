"""What can go wrong, in two families.

The world failed (catch `KeylatchError`)::

    KeylatchError                 base, never raised itself
    ├── StoreUnavailable          the store cannot be reached or does not answer in time
    ├── HashingBusy               the hash queue is full: try again in a moment
    ├── HashingFailed             a stored hash cannot be read, or there is no memory for argon2
    ├── StoreIncompatible         the store was made by a newer keylatch
    └── WrongEventLoop            the engine is started on another event loop

You called me wrong::

    ValueError
    └── ConfigurationError        settings, rules or arguments; every mistake at once

Every message may be shown to an operator: it never holds a token, a hash or a password.
"""

from collections.abc import Sequence


class KeylatchError(Exception):
    """Something outside the caller's power failed.

    Args:
        message: what happened, in one line.
        hint: what to do about it, in one line; empty where there is nothing to say.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StoreUnavailable(KeylatchError):
    """The store cannot be reached, is locked for too long, or does not answer in time."""


class StoreIncompatible(KeylatchError):
    """The store's tables are newer than this version of keylatch understands."""


class WrongEventLoop(KeylatchError):
    """An engine was used on another event loop than the one it is started on."""


class HashingBusy(KeylatchError):
    """More hashes are waiting than the queue may hold; nothing was computed."""


class HashingFailed(KeylatchError):
    """A hash could not be computed or read: that says nothing about the key it belongs to."""


class ConfigurationError(ValueError):
    """Settings or rules that cannot work; lists every mistake, each with a hint.

    Args:
        mistakes: pairs of (what is wrong, what to do instead).
    """

    def __init__(self, mistakes: Sequence[tuple[str, str]]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("; ".join(f"{wrong} ({hint})" for wrong, hint in self.mistakes))
