"""A log line that clients can cause at will: written the 1st, 2nd, 4th, 8th, … time, with a count.

The log of a flood grows with the logarithm of its size (`LOG_EVERY_POW_2` of Abseil's logging). A
flood cannot silence what comes later either: a line is also written where the last one is an hour
old. The arguments of a line are those of the latest occurrence.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from keylatch.telemetry.counters import Counter

SILENCE_SECONDS: Final = 3600.0
"""An occurrence is logged whatever its number if no line was written for this long."""


class RepeatedWarning:
    """One kind of log line; thread-safe.

    Args:
        logger: writes the lines.
        message: a format string; from the second line on the count follows.
        level: of `logging`.
        timer: monotonic, in seconds.
    """

    def __init__(
        self,
        logger: logging.Logger,
        message: str,
        level: int = logging.WARNING,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.count = Counter()
        """How often it occurred, logged or not."""
        self._logger = logger
        self._message = message
        self._level = level
        self._timer = timer
        self._logged_at = -SILENCE_SECONDS
        self._lock = threading.Lock()

    def add(self, *args: object) -> None:
        """It occurred once more; `args` are for the text."""
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
