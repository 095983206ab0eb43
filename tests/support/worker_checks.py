"""One process of the revocation test: checks keys in a loop and logs every check.

    python worker_checks.py STORE LOG ENGINE < tokens

It says `ready` once every key was accepted, goes on until SIGTERM, checks every key once more,
and writes its log: four 64-bit integers for each check (key, start, end, outcome), the times in
nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
"""

import asyncio
import os
import signal
import sys
import time
from array import array
from pathlib import Path

from keylatch.core.decisions import Allow, Deny, Reason
from keylatch.engine import Engine
from keylatch.revocation.invalidations import Invalidations
from keylatch.revocation.sequence import SequenceFreshness
from keylatch.settings import Settings

REFUSED, ACCEPTED, UNDECIDED = range(3)
_AT_A_TIME = 50


class AlwaysFresh(SequenceFreshness):
    """A broken twin: never reads whether anything was committed."""

    def now_if_fresh(self) -> float | None:
        return self._clock() * 1000


class NeverInvalidated(Invalidations):
    """A broken twin: reads it, and then uses an entry that was read before the change."""

    def accepts(self, key_id: str, organization_id: str, as_of: int) -> bool:
        return True


class AlwaysFreshEngine(Engine):
    """An engine whose freshness never detects a change."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._freshness.__class__ = AlwaysFresh


class NeverInvalidatedEngine(Engine):
    """An engine whose invalidations keep no tombstones."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._invalidations.__class__ = NeverInvalidated


ENGINES = {
    "sound": Engine,
    "always-fresh": AlwaysFreshEngine,
    "never-invalidated": NeverInvalidatedEngine,
}


async def check_again_and_again(engine: Engine, tokens: list[str]) -> bytes:
    """Sweep over the keys until the stop command; return the log."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    headers = [[b"Bearer " + token.encode()] for token in tokens]
    checks = array("q")

    async def sweep() -> int:
        accepted = 0
        for key, values in enumerate(headers):
            start = time.monotonic_ns()
            decision = await engine.authenticate(values)
            end = time.monotonic_ns()
            match decision:
                case Allow():
                    outcome = ACCEPTED
                case Deny(Reason.UNAVAILABLE | Reason.BUSY):
                    outcome = UNDECIDED
                case _:
                    outcome = REFUSED
            accepted += outcome == ACCEPTED
            checks.extend((key, start, end, outcome))
            if key % _AT_A_TIME == 0:
                await asyncio.sleep(0)  # all tasks share the loop
        return accepted

    await engine.start()
    while await sweep() < len(headers):
        pass
    print("ready", flush=True)
    while not stop.is_set():
        await sweep()
    await sweep()
    await engine.stop()
    return checks.tobytes()


if __name__ == "__main__":
    os.nice(10)  # four of them must not keep the revoker from its work
    store, log, kind = sys.argv[1:]
    tokens = sys.stdin.read().split()
    engine = ENGINES[kind](Settings.load(store=store, redis="", hasher="sha256"))
    Path(log).write_bytes(asyncio.run(check_again_and_again(engine, tokens)))
