"""How a command does its work with an engine of its own, and how it tells that it could not."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.settings import Settings
from keylatch_sidecar import terminal

T = TypeVar("T")


def run(settings: Settings, work: Callable[[Engine], Awaitable[T]]) -> T:
    """What the work returns; ends with an error and a hint where the world fails."""
    engine = Engine(settings)

    async def errand() -> T:
        try:
            # A starting engine logs why it cannot and tries again later; this tells it now.
            await engine.store.open(int(time.time() * 1000))
            return await work(engine)
        finally:
            await engine.stop()

    try:
        return asyncio.run(errand())
    except KeylatchError as error:
        terminal.fail(error.message, error.hint, terminal.UNUSABLE)
