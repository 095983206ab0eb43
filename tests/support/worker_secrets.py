"""One of two processes that go on creating and checking keys while their store's secrets rotate.

    python worker_secrets.py LOG KIND STORE [REDIS] < tokens > tokens

It writes the token of every key that it creates, reads the other's, and checks each at once, and
some older ones over again. Both say so on standard error when they are under way. At SIGTERM it
writes its log: how many checks had which outcome, and with which of the store's MAC keys it
made its first and its last token.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.authentication.keyset import Keyset, ReadAt
from keylatch.caches.shared_cache import SharedCache
from keylatch.core.decisions import Allow
from keylatch.core.tokens import MacKeys, Token
from keylatch.engine import Engine
from keylatch.revocation.notices import Notice
from keylatch.revocation.notifier import Notifier
from keylatch.settings import Settings
from keylatch.telemetry.health import Health

_OLDER = 40
_PAUSE_SECONDS = 0.01


class OldKeyset(Keyset):
    """Never reads the secrets again, and calls forged what they did not make."""

    async def refresh(self) -> None:
        return None

    def proves_forged(self, token: Token, as_of: ReadAt) -> bool:
        return self.mac_keys is not None


class NeverReloadsSecrets(Engine):
    """A broken twin: never reads its secrets again, and refuses what they did not make."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._keyset.__class__ = OldKeyset


class WithoutNotifier(Engine):
    """A process that receives no notices: it polls by itself, every X/4."""

    def _open_redis(self, *given: Any) -> tuple[SharedCache | None, Notifier | None]:
        shared_cache, _ = super()._open_redis(*given)
        return shared_cache, NullNotifier()


class NullNotifier:
    """No notices."""

    health = Health("not used", "not used")

    async def publish(self, notice: Notice | None) -> None:
        return None

    async def subscribe(self, on_notice: object) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        return None


ENGINES = {
    "sound": Engine,
    "without-notifier": WithoutNotifier,
    "never-reloads": NeverReloadsSecrets,
}


def write_token(token: str) -> None:
    os.write(sys.stdout.fileno(), token.encode() + b"\n")


async def work(engine: Engine) -> dict[str, object]:
    """Create and check until the stop command."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    incoming = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(incoming), sys.stdin)
    outcomes: Counter[str] = Counter()
    checked: list[list[bytes]] = []
    made: list[str] = []

    async def check(values: list[bytes]) -> None:
        decision = await engine.authenticate(values)
        outcomes["ALLOWED" if isinstance(decision, Allow) else decision.reason.name] += 1

    async def create() -> None:
        while not stop.is_set():
            created = await (await engine.keyring()).create("org", "key")
            made.append(created.token.reveal())
            write_token(made[-1])
            await asyncio.sleep(_PAUSE_SECONDS)

    async def check_incoming() -> None:
        while line := await incoming.readline():
            if not checked:
                print("ready", file=sys.stderr, flush=True)
            checked.append([b"Bearer " + line.strip()])
            await check(checked[-1])

    async def check_older() -> None:
        while not stop.is_set():
            for values in checked[:: max(1, len(checked) // _OLDER)]:
                await check(values)
            engine._l1.clear()  # so that Redis, the store and the MAC keys are used as well
            await asyncio.sleep(_PAUSE_SECONDS)

    await engine.start()
    tasks = [asyncio.create_task(each) for each in (check_incoming(), check_older())]
    await create()
    made.append((await (await engine.keyring()).create("org", "last")).token.reveal())
    await asyncio.wait(tasks[1:])
    tasks[0].cancel()
    secrets = await engine.store.secrets.load()
    await engine.stop()
    for task in tasks[1:]:
        task.result()
    return {
        "outcomes": outcomes,
        "made with": [mac_key_index(secrets.mac_keys, token) for token in (made[0], made[-1])],
    }


def mac_key_index(mac_keys: tuple[bytes, ...], token: str) -> int:
    """Which of the keys made it; the newest is 0."""
    return [MacKeys([key]).verify_mac(Token(token)) for key in mac_keys].index(True)


if __name__ == "__main__":
    logging.disable()  # standard error says one thing alone
    log, kind, store, *redis = sys.argv[1:]
    settings = Settings.load(store=store, redis=redis[0] if redis else "", lease=2)
    # argon2id, or Redis would never be used.
    engine = ENGINES[kind](settings, hasher=Hasher("argon2id", CHEAPEST))
    Path(log).write_text(json.dumps(asyncio.run(work(engine))))
