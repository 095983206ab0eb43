"""Telemetry events: what one engine has done, as frozen values for listeners.

The law of this file: an event says what has happened and changes nothing; a listener does no I/O.
A hit in the local cache observes no event: one step of `Counters.hits` takes 60 ns, an event more
than 1 us.

Listeners are `Counters.on_event` and, with traces, `request_trace.on_event`. Numbers that only
`metrics` reads, such as restores, are plain counters. A span of OpenTelemetry is opened around its
stage instead of being made from an event: spans of libraries, such as redis-py's, become its
children only while it is current.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from keylatch.core.decisions import Decision


@dataclass(frozen=True, slots=True)
class Decided:
    """A check has decided on a request.

    Args:
        decision: an `Allow` or a final `Deny`.
        source: what the decision is based on, one of the sources in `counters`.
    """

    decision: Decision
    source: str


@dataclass(frozen=True, slots=True)
class StageEnded:
    """A stage of a check has ended, also by an error or by cancellation.

    Args:
        stage: one of `counters.STAGES`.
        seconds: its duration.
    """

    stage: str
    seconds: float


Event = Decided | StageEnded
Listener = Callable[[Event], None]
Span = Callable[[str], AbstractContextManager[object]]


class Events:
    """Passes the events of one engine to its listeners.

    Args:
        listeners: called with each event, in the thread that observes it.
        span: opens a span of OpenTelemetry around a stage; by default there is none.
        timer: seconds, monotonic.
    """

    def __init__(
        self,
        *listeners: Listener,
        span: Span = nullcontext,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._listeners = listeners
        self._span = span
        self._timer = timer

    def observe(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)

    @contextmanager
    def stage(self, name: str, *, has_span: bool = True) -> Iterator[None]:
        """`with events.stage("store"): …` observes how long the block takes.

        Args:
            name: one of `counters.STAGES`.
            has_span: False: the stage stays inside this process, so tracing leaves it out.
        """
        with self._span(name) if has_span else nullcontext():
            started_at = self._timer()
            try:
                yield
            finally:
                self.observe(StageEnded(name, self._timer() - started_at))
