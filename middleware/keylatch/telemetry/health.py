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

from keylatch.telemetry.counters import Counter

State = Literal["ok", "degraded", "unavailable", "off"]

log = logging.getLogger("keylatch")


@dataclass(frozen=True, slots=True)
class ComponentHealth:
    """How a part is.

    Args:
        name: of the part.
        state: `degraded`: keys are still decided on; `off`: there is none.
        since: when that began, in seconds since the Unix epoch; None: there is none.
        reason: what is the matter, for everybody to read; empty where nothing is.
    """

    name: str
    state: State
    since: float | None = None
    reason: str = ""


class Health:
    """Of one part, as those find it whom it serves.

    Args:
        failure_message: what the log says when it is no longer well; followed by why.
        recovery_message: what the log says when it is well again.
        recovery_seconds: healthy again only after so long without a failure: else a part that
            serves and fails in turns would fill the log.
        recovers_by_time: whether it is well after that time even if nobody has needed it since.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self,
        failure_message: str,
        recovery_message: str,
        *,
        recovery_seconds: float = 0.0,
        recovers_by_time: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._failure_message = failure_message
        self._recovery_message = recovery_message
        self._recovery_seconds = recovery_seconds
        self._recovers_by_time = recovers_by_time
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """Nothing is known, so nothing is wrong."""
        self.failures = Counter()
        self._is_healthy = True
        self._since = self._failed_at = self._clock()

    def record_failure(self, reason: str, hint: str = "") -> None:
        """It failed somebody."""
        self.failures.add()
        was_healthy, self._is_healthy = self.is_healthy, False
        self._failed_at = self._clock()
        if was_healthy:
            self._since = self._failed_at
            log.warning("%s: %s%s", self._failure_message, reason, f"; {hint}" if hint else "")

    def record_success(self) -> None:
        """It served somebody."""
        if self._is_healthy or not self._is_recovery_over():
            return
        now = self._clock()
        log.warning("%s, after %.0f s", self._recovery_message, now - self._since)
        self._is_healthy, self._since = True, now

    @property
    def is_healthy(self) -> bool:
        """Whether it serves, as far as anybody knows."""
        return self._is_healthy or (self._recovers_by_time and self._is_recovery_over())

    @property
    def since(self) -> float:
        """Since when that is so, in seconds since the Unix epoch."""
        if self._is_healthy or not self.is_healthy:
            return self._since
        return self._failed_at + self._recovery_seconds

    def component_health(
        self, name: str, state_if_unhealthy: State, reason: str
    ) -> ComponentHealth:
        """As a part that is in that state, for that reason, while it is not well."""
        if self.is_healthy:
            return ComponentHealth(name, "ok", self.since)
        return ComponentHealth(name, state_if_unhealthy, self.since, reason)

    def _is_recovery_over(self) -> bool:
        return self._clock() - self._failed_at >= self._recovery_seconds
