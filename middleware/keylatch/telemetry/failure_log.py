"""Log messages about refused requests (`KEYLATCH_LOG_FAILURES=on`): the address and the reason.

The law of this file: a message holds no token, no id and no other text of the client, because a
client could write any text to the log with it; and there are at most ten messages a second, then a
count.
"""

import ipaddress
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from keylatch.core.decisions import ClientGetter, Reason

_MAX_PER_SECOND: Final = 10
_MAX_ADDRESS_LENGTH: Final = 64
_UNDECIDED: Final = (Reason.UNAVAILABLE, Reason.BUSY)

log = logging.getLogger("keylatch.failures")


class FailureLog:
    """The failures of one engine; thread-safe.

    Args:
        timer: seconds, monotonic.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Reset the count of suppressed messages: the parent logs its own."""
        self._lock = threading.Lock()
        self._second = -1
        self._logged = 0
        self._suppressed = 0

    def add(self, reason: Reason, client: ClientGetter) -> None:
        """Log a refusal, unless keylatch could not decide (503): that is no failure of a client."""
        if reason in _UNDECIDED or not self._is_within_limit():
            return
        self.flush()
        log.warning("refused a request from %s: %s", address_of(client()[0]), reason.name.lower())

    def flush(self) -> None:
        """Log how many messages were suppressed since the last call, if any."""
        with self._lock:
            count, self._suppressed = self._suppressed, 0
        if count:
            log.warning("refused %d more requests, which were not logged one by one", count)

    def _is_within_limit(self) -> bool:
        with self._lock:
            second = int(self._timer())
            if second != self._second:
                self._second, self._logged = second, 0
            has_room = self._logged < _MAX_PER_SECOND
            self._logged += has_room
            self._suppressed += not has_room
            return has_room


def address_of(host: str | None) -> str:
    """The address, if it is valid: a server that trusts `X-Forwarded-For` may pass on any text."""
    try:
        return str(ipaddress.ip_address((host or "")[:_MAX_ADDRESS_LENGTH].partition("%")[0]))
    except ValueError:
        return "no address" if host is None else "an invalid address"
