"""A message that clients can cause at will: logged the 1st, 2nd, 4th, 8th, … time, with a count.

So the log grows with the logarithm of the number of requests (`LOG_EVERY_POW_2` of Abseil's
logging). Occurrences long after many others are not lost: a message is also logged if the last one
is an hour old. Its arguments are those of the latest occurrence.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from keylatch.telemetry.counters import Counter

SILENCE_SECONDS: Final = 3600.0
"""An occurrence is logged whatever its number if none was logged for this long."""


class RepeatedWarning:
    """One kind of message; thread-safe.

    Args:
        logger: logs the message.
        message: a format string; the count follows from the second message on.
        level: of `logging`.
        timer: seconds, monotonic.
    """

    def __init__(
        self,
        logger: logging.Logger,
        message: str,
        level: int = logging.WARNING,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = Counter()
        """The number of occurrences, logged or not."""
        self._logger = logger
        self._message = message
        self._level = level
        self._timer = timer
        self._logged_at = -SILENCE_SECONDS
        self._lock = threading.Lock()

    def add(self, *args: object) -> None:
        """Count an occurrence; `args` are for the format string."""
        with self._lock:
            self.count.add()
            count = self.count.value
            is_power_of_two = count & (count - 1) == 0
            now = self._timer()
            if not is_power_of_two and now - self._logged_at < SILENCE_SECONDS:
                return
            self._logged_at = now
        if count == 1:
            self._logger.log(self._level, self._message, *args)
        else:
            self._logger.log(self._level, f"{self._message}; %d times so far", *args, count)
