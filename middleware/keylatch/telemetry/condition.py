"""How the parts of a check are: well or not, and since when; the log says so when it changes, once.

A request that meets a part which is known to be unwell adds nothing to the log: a flood of them
would bury what else is wrong. The log says why in the part's own words; whoever asks over HTTP gets
one of ours, because a driver's may name hosts and users.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from keylatch.telemetry.meter import Count

State = Literal["ok", "degraded", "unavailable", "off"]

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class Part:
    """How a part is.

    Args:
        name: of the part.
        state: `degraded`: keys are still decided on; `off`: there is none.
        since: when that began, in seconds since the Unix epoch; None: there is none.
        words: what is the matter, for everybody to read; empty where nothing is.
    """

    name: str
    state: State
    since: float | None = None
    words: str = ""


class Condition:
    """Of one part, as those find it whom it serves.

    Args:
        unwell: what the log says when it is no longer well; followed by why.
        well: what the log says when it is well again.
        calm_seconds: it is well again only when it has failed nobody for so long: else a part that
            serves and fails in turns would fill the log.
        passes: whether it is well after that time even if nobody has needed it since.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self,
        unwell: str,
        well: str,
        *,
        calm_seconds: float = 0.0,
        passes: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._unwell = unwell
        self._well = well
        self._calm_seconds = calm_seconds
        self._passes = passes
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Nothing is known, so nothing is wrong."""
        self.failures = Count()
        self._is_well = True
        self._since = self._failed_at = self._clock()

    def failed(self, why: str, hint: str = "") -> None:
        """It failed somebody."""
        self.failures.add()
        was_well, self._is_well = self.is_well, False
        self._failed_at = self._clock()
        if was_well:
            self._since = self._failed_at
            log.warning("%s: %s%s", self._unwell, why, f"; {hint}" if hint else "")

    def succeeded(self) -> None:
        """It served somebody."""
        if self._is_well or not self._is_calm():
            return
        now = self._clock()
        log.warning("%s, after %.0f s", self._well, now - self._since)
        self._is_well, self._since = True, now

    @property
    def is_well(self) -> bool:
        """Whether it serves, as far as anybody knows."""
        return self._is_well or (self._passes and self._is_calm())

    @property
    def since(self) -> float:
        """Since when that is so, in seconds since the Unix epoch."""
        if self._is_well or not self.is_well:
            return self._since
        return self._failed_at + self._calm_seconds

    def part(self, name: str, unwell: State, words: str) -> Part:
        """As a part that is in that state, for that reason, while it is not well."""
        if self.is_well:
            return Part(name, "ok", self.since)
        return Part(name, unwell, self.since, words)

    def _is_calm(self) -> bool:
        return self._clock() - self._failed_at >= self._calm_seconds
