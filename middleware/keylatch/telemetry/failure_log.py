"""Refused requests in the log, where `KEYLATCH_LOG_FAILURES` says so: the address and the reason.

The law of this file: a line holds no token, no id and no other text that a client sent, because
made-up tokens would write the log; and a flood costs ten lines a second, and a count.
"""

import ipaddress
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from keylatch.core.decisions import ClientGetter, Reason

_MAX_LINES_PER_SECOND: Final = 10
_MAX_ADDRESS_LENGTH: Final = 64
_UNDECIDED: Final = (Reason.UNAVAILABLE, Reason.BUSY)

log = logging.getLogger("keylatch.failures")


class FailureLog:
    """Of one engine, from any thread.

    Args:
        timer: seconds that never go back.
    """

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """After a fork: the parent has its own lines to tell of."""
        self._lock = threading.Lock()
        self._second = -1
        self._logged = 0
        self._suppressed = 0

    def add(self, reason: Reason, caller: ClientGetter) -> None:
        """A request is refused. What could not be decided is no failure of its caller."""
        if reason in _UNDECIDED or not self._is_within_limit():
            return
        self.flush()
        log.warning("refused a request from %s: %s", address_of(caller()[0]), reason.name.lower())

    def flush(self) -> None:
        """Say how many were left out since this was last said, if any were."""
        with self._lock:
            count, self._suppressed = self._suppressed, 0
        if count:
            log.warning("refused %d more requests, which were not logged one by one", count)

    def _is_within_limit(self) -> bool:
        with self._lock:
            second = int(self._timer())
            if second != self._second:
                self._second, self._logged = second, 0
            has_room = self._logged < _MAX_LINES_PER_SECOND
            self._logged += has_room
            self._suppressed += not has_room
            return has_room


def address_of(host: str | None) -> str:
    """The address if it is one: a server that believes `X-Forwarded-For` hands on any text."""
    try:
        return str(ipaddress.ip_address((host or "")[:_MAX_ADDRESS_LENGTH].partition("%")[0]))
    except ValueError:
        return "no address" if host is None else "an invalid address"
