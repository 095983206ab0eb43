"""Log lines that clients can cause at will: 1, 2, 4, 8, … of them, each with the count."""

import logging
import threading

import pytest

from keylatch.telemetry.repeated_warning import SILENCE_SECONDS, RepeatedWarning
from tests.support.clock import Clock

log = logging.getLogger("keylatch.test")


def test_powers_of_two_are_logged(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    """With what the latest was about; of 100,000 of them 17 lines."""
    warning = RepeatedWarning(log, "%s is not known", timer=clock)
    for number in range(1, 100_001):
        warning.add(number)
    expected = [f"{2**power} is not known; {2**power} times so far" for power in range(1, 17)]
    assert caplog.messages == ["1 is not known", *expected]
    assert warning.count.value == 100_000


def test_a_flood_cannot_silence_what_comes_an_hour_later(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """At most one line an hour beside the powers of two."""
    warning = RepeatedWarning(log, "unknown", timer=clock)
    for _ in range(1_000):
        warning.add()
    caplog.clear()
    clock.tick(SILENCE_SECONDS - 1)
    warning.add()
    assert caplog.messages == []
    clock.tick(1)
    for _ in range(10):
        warning.add()
    assert caplog.messages == ["unknown; 1002 times so far"]


def test_threads_skip_no_line(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    """Eight at once, 8,000 times: 13 lines and no count twice."""
    warning = RepeatedWarning(log, "unknown", timer=clock)

    def flood() -> None:
        for _ in range(1_000):
            warning.add()

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(caplog.messages)) == len(caplog.messages) == 13
