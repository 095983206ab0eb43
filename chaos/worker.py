"""A process that checks keys with keylatch's own engine, or revokes them with its keyring.

    python worker.py check|revoke STORE REDIS LEASE SOCKET NAME [SEED]

Nothing in here stands between the product and the faults: a check is what the middleware does, and
a revoke is `Keyring.delete`. The store notes when a change was committed, and that is all it adds.
"""

import asyncio
import random
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from channel import Channel
from checker import ACCEPTED, REFUSED, UNDECIDED, Checker
from keylatch.authentication.authenticator import CacheMiss
from keylatch.authentication.hashing import CHEAPEST, Hasher
from keylatch.core import credentials
from keylatch.core.decisions import Allow, Decision, KeyRecord, Reason
from keylatch.core.tokens import Token
from keylatch.engine import Engine
from keylatch.errors import StoreUnavailable
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings
from keylatch.storage.authorization import OPERATOR, Actor
from keylatch.storage.store import Store
from revoker import Gone, Refused, Revoked, revoke_until_ended

_AT_A_TIME: Final = 5


class KeylatchSubject:
    """See `checker.Subject`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.start = engine.start
        self.stop = engine.stop

    def check_cached(self, token: str) -> int | None:
        outcome = self._engine.authenticator.check_token_cached(_read(token))
        return None if isinstance(outcome, CacheMiss) else _outcome(outcome)

    async def check(self, token: str) -> int:
        return _outcome(await self._engine.authenticator.check_token(_read(token)))

    def after_fork_in_child(self) -> None:
        return None  # an engine notices by itself


def _read(token: str) -> Token:
    read = credentials.read([b"Bearer " + token.encode()])
    if isinstance(read, Reason):
        raise TypeError("the run made up a token")
    return read


def _outcome(decision: Decision) -> int:
    if isinstance(decision, Allow):
        return ACCEPTED
    return UNDECIDED if decision.reason in (Reason.UNAVAILABLE, Reason.BUSY) else REFUSED


class CommitTimeStore(Store):
    """A store that notes when a change of a key was known to be committed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.committed: dict[str, int] = {}
        self._change = self.keys.change
        self.keys.change = self.change  # type: ignore[method-assign]

    async def change(
        self,
        organization_id: str,
        key_id: str,
        now_ms: int,
        values: Mapping[str, Any],
        *,
        by: Actor = OPERATOR,
    ) -> tuple[KeyRecord, int] | None:
        changed = await self._change(organization_id, key_id, now_ms, values, by=by)
        self.committed[key_id] = time.monotonic_ns()
        return changed


class Revoker:
    """See `revoker.Revoking`."""

    def __init__(self, keyring: Keyring, store: CommitTimeStore) -> None:
        self._keyring = keyring
        self._committed = store.committed

    async def create(self) -> tuple[str, str]:
        try:
            created = await self._keyring.create("org", "key")
        except StoreUnavailable:
            raise Refused from None
        return created.record.id, created.token.reveal()

    async def revoke(self, key: str, wait: bool) -> Revoked:
        try:
            changed = await self._keyring.delete("org", key, wait=wait)
        except StoreUnavailable:
            raise Refused from None
        if changed is None:
            raise Gone
        answered = time.monotonic_ns()
        bound_ns = int(changed.receipt.bound_seconds * 1e9)
        return Revoked(self._committed.pop(key), answered, bound_ns)


async def revoke(engine: Engine, store: CommitTimeStore, path: str, name: str, seed: int) -> None:
    """Revoke with the engine's keyring until the end message."""
    channel = await Channel.connect(path, role="revoker", side="keylatch", name=name)
    revoker = Revoker(await engine.keyring(), store)
    await revoke_until_ended(revoker, channel, random.Random(seed), _AT_A_TIME)
    await engine.stop()
    await channel.close()


if __name__ == "__main__":
    role, store_url, redis_url, lease, path, name, *seed = sys.argv[1:]
    store = CommitTimeStore(store_url)
    settings = Settings.load(store=store_url, redis=redis_url, lease=float(lease))
    # argon2id, or Redis would never be used.
    engine = Engine(settings, store=store, hasher=Hasher("argon2id", CHEAPEST))
    if role == "check":
        Checker(KeylatchSubject(engine), path, "keylatch", name).run()
    else:
        asyncio.run(revoke(engine, store, path, name, int(seed[0])))
