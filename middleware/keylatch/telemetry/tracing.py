"""Spans of OpenTelemetry, for checks that had to ask: extra `[otel]`, `KEYLATCH_TRACING=on`.

A hit in L1 makes none: it takes less time than its span would. Which tracer provider there is, and
so where spans go, is the app's affair. Imported only where it is switched on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry import trace

from keylatch.core.decisions import Allow, Decision, DeferredDeny


class Tracing:
    """The spans of one engine: `keylatch.check`, and below it one for each stage.

    The name of a key is an attribute only where it was let in; why it was not is one too, because
    whoever sees spans may see that.
    """

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("keylatch")

    @contextmanager
    def check(self) -> Iterator[Callable[[Decision], None]]:
        """A span around a check; call what it yields with the decision."""
        with self._tracer.start_as_current_span("keylatch.check") as span:

            def set_decision(decision: Decision) -> None:
                if isinstance(decision, Allow):
                    span.set_attribute("keylatch.decision", "allow")
                    span.set_attribute("keylatch.key_id", decision.principal.key_id)
                elif isinstance(
                    decision, DeferredDeny
                ):  # the view that it asks for is not known yet
                    span.set_attribute("keylatch.decision", "deferred")
                else:
                    span.set_attribute("keylatch.decision", decision.reason.name.lower())

            yield set_decision

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A span around a stage; of an error it tells the kind, because texts may name hosts."""
        with self._tracer.start_as_current_span(
            f"keylatch.{name}", record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(trace.StatusCode.ERROR)
                raise
