"""The health of the components of an engine, and since when; each change is logged once.

A request that meets a component already known as unhealthy logs nothing: many such requests would
hide other messages. The log has the error of the driver; an answer over HTTP has a fixed text,
because a driver's error may name hosts and users.
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
    """The state of a component, as health endpoints show it.

    Args:
        name: of the component.
        state: `degraded`: keys are still checked; `off`: not configured.
        since: of the state, in seconds since the Unix epoch; None: not configured.
        reason: a fixed text; empty if the component is healthy.
    """

    name: str
    state: State
    since: float | None = None
    reason: str = ""


class Health:
    """The health of one component, from the results of its calls.

    Args:
        failure_message: logged when it becomes unhealthy, followed by the error.
        recovery_message: logged when it is healthy again.
        recovery_seconds: it is healthy again only after so long without a failure: a component that
            fails and succeeds in turns would fill the log.
        recovers_by_time: whether it is healthy after that time without a success, too.
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
        """Return to healthy, as before the first call."""
        self.failures = Counter()
        self._is_healthy = True
        self._since = self._failed_at = self._clock()

    def record_failure(self, reason: str, hint: str = "") -> None:
        self.failures.add()
        was_healthy, self._is_healthy = self.is_healthy, False
        self._failed_at = self._clock()
        if was_healthy:
            self._since = self._failed_at
            log.warning("%s: %s%s", self._failure_message, reason, f"; {hint}" if hint else "")

    def record_success(self) -> None:
        if self._is_healthy or not self.is_over():
            return
        now = self._clock()
        log.warning("%s, after %.0f s", self._recovery_message, now - self._since)
        self._is_healthy, self._since = True, now

    @property
    def is_healthy(self) -> bool:
        """Whether it is healthy, as far as its calls have shown."""
        return self._is_healthy or (self._recovers_by_time and self.is_over())

    @property
    def since(self) -> float:
        """When the present state began, in seconds since the Unix epoch."""
        if self._is_healthy or not self.is_healthy:
            return self._since
        return self._failed_at + self._recovery_seconds

    def component_health(
        self, name: str, state_if_unhealthy: State, reason: str
    ) -> ComponentHealth:
        """The state to report: `state_if_unhealthy` with `reason` while it is unhealthy."""
        if self.is_healthy:
            return ComponentHealth(name, "ok", self.since)
        return ComponentHealth(name, state_if_unhealthy, self.since, reason)

    def is_over(self) -> bool:
        """Whether `recovery_seconds` have passed since the last failure."""
        return self._clock() - self._failed_at >= self._recovery_seconds
