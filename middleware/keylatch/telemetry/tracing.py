"""Spans of OpenTelemetry for checks that need a lookup: extra `[otel]`, `KEYLATCH_TRACING=on`.

A hit in L1 has no span: the span would take longer than the hit. The app sets the tracer provider,
and with it where spans are exported. This module is imported only if tracing is on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry import trace

from keylatch.core.decisions import Allow, Decision, DeferredDeny


class Tracing:
    """The spans of one engine: `keylatch.check`, with a child for each stage.

    Attributes: the id of a key if it was allowed, else the reason, which operators may see.
    """

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("keylatch")

    @contextmanager
    def check(self) -> Iterator[Callable[[Decision], None]]:
        """A span around a check; it yields a function that sets the decision."""
        with self._tracer.start_as_current_span("keylatch.check") as span:

            def set_decision(decision: Decision) -> None:
                if isinstance(decision, Allow):
                    span.set_attribute("keylatch.decision", "allow")
                    span.set_attribute("keylatch.key_id", decision.principal.key_id)
                elif isinstance(decision, DeferredDeny):  # the requirement is not final yet
                    span.set_attribute("keylatch.decision", "deferred")
                else:
                    span.set_attribute("keylatch.decision", decision.reason.name.lower())

            yield set_decision

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A span around a stage; it has the type of an error, but no text that may name hosts."""
        with self._tracer.start_as_current_span(
            f"keylatch.{name}", record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(trace.StatusCode.ERROR)
                raise
