"""The monitor of accepted keys, with a log and a cache that say what each case needs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from keylatch.revocation.monitor import RevocationMonitor
from keylatch.storage.invalidation_log import Invalidation, Position
from keylatch.telemetry.counters import Counters

pytestmark = pytest.mark.anyio

KNOWN = Position(10, 10)
MUCH_LATER_MS = 10_000


class Log:
    """Of one batch."""

    def __init__(self, *changed: str, is_complete: bool = True) -> None:
        rows = [
            Invalidation(seq=11 + n, key_id=key_id, organization_id=None)
            for n, key_id in enumerate(changed)
        ]
        self.batch = SimpleNamespace(
            seq=2_000,
            position=Position(2_000, 2_000),
            since_row_id=KNOWN.row_id,
            is_complete=is_complete,
            invalidations=rows if is_complete else [],
        )

    async def since(self, seq: int) -> Any:
        return self.batch


async def alarms(log: Log) -> float:
    """After a key that was looked up at `KNOWN` is used long after the log was read."""
    entry = SimpleNamespace(key_id="key_a", organization_id="default", as_of=KNOWN.seq)
    counters = Counters()
    monitor = RevocationMonitor(
        cast(Any, SimpleNamespace(invalidations=log)),
        cast(Any, SimpleNamespace(by_secret_id=lambda _: entry)),
        lambda: 0.0,
        1_000.0,
        counters,
    )
    monitor.begin(KNOWN)
    await monitor.check({})
    await monitor.check({"key_a": MUCH_LATER_MS})
    return counters.accepted_after_revocation.value


async def test_a_key_that_is_used_after_its_change_is_counted() -> None:
    """The entry is older than the change: it should have left the cache."""
    assert await alarms(Log("key_a")) == 1


@pytest.mark.parametrize("log", [Log("key_b"), Log(is_complete=False)])
async def test_a_key_that_did_not_change_is_not(log: Log) -> None:
    """Also where more rows were written since the last look than are read at once: they do not
    tell which keys changed, and a cache that read them in time keeps the others."""
    assert await alarms(log) == 0
