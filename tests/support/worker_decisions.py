"""A process that says what it makes of tokens: one a line on standard input, one verdict a line.

python worker_decisions.py STORE
"""

import asyncio
import sys

from keylatch.core.decisions import Allow
from keylatch.engine import Engine
from keylatch.settings import Settings


async def print_decisions(store: str) -> None:
    """Until the input ends."""
    engine = Engine(Settings.load(store=store, redis="", hasher="sha256"))
    await engine.start()
    while token := (await asyncio.to_thread(sys.stdin.readline)).strip():
        decision = await engine.authenticate([b"Bearer " + token.encode()])
        if isinstance(decision, Allow):
            print("ALLOW", decision.principal.permission, decision.principal.key_name, flush=True)
        else:
            print(decision.reason.name, flush=True)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(print_decisions(sys.argv[1]))
