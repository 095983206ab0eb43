"""Telemetry events: what is observed, in which order, and that a hit observes none."""

import pytest

from keylatch.core.decisions import Allow, Decision, Deny, Reason
from keylatch.telemetry.counters import MAC, STORE
from keylatch.telemetry.events import Decided, Event, Events, StageEnded
from tests.support.clock import Clock
from tests.support.engines import MakeEngine


@pytest.mark.anyio
async def test_a_cold_check_observes_its_stages_and_its_decision(make_engine: MakeEngine) -> None:
    """Each stage as it ends, then the decision once; a hit after it observes nothing."""
    engine = make_engine()
    created = await (await engine.keyring()).create("org", "a key")
    values = [f"Bearer {created.token.reveal()}".encode()]
    observed: list[Event] = []
    events = Events(observed.append)
    engine.authenticator._events = (await engine._started())._events = events
    decision: Decision = await engine.authenticate(values)
    stages = [event.stage for event in observed if isinstance(event, StageEnded)]
    assert [stage for stage in stages if stage != "parse"] == ["store", "hash"]
    assert observed[-1] == Decided(decision, STORE)
    assert sum(isinstance(event, Decided) for event in observed) == 1
    while not engine.counters.is_parse_sampled():
        pass  # one header in 16 is sampled: the next one is not
    observed.clear()
    assert isinstance(await engine.authenticate(values), Allow)
    assert observed == []
    assert await engine.authenticate([values[0][:-1] + b"-"]) == Deny(Reason.FORGED)
    assert observed == [Decided(Deny(Reason.FORGED), MAC)]
    await engine.stop()


def test_a_stage_that_fails_is_observed(clock: Clock) -> None:
    """With its duration, by every listener; the error goes on to the caller."""
    first: list[Event] = []
    second: list[Event] = []
    events = Events(first.append, second.append, timer=clock)

    def fail() -> None:
        clock.tick(2.0)
        raise TimeoutError

    with pytest.raises(TimeoutError), events.stage("store"):
        fail()
    assert first == second == [StageEnded("store", 2.0)]
