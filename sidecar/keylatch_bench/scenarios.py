"""The requests of each scenario, and the preparation of caches that they need.

A client cannot remove a key from the caches of a sidecar. So L2, store and cold use a new key for
every check: the check measured is always the first one of its key.
"""

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from keylatch.core.tokens import MacKeys
from keylatch_bench import plan
from keylatch_bench.errors import BenchError
from keylatch_bench.key_factories import StoreKeyFactory
from keylatch_bench.load_generator import Credential, Measurement, check, drive, saturate
from keylatch_bench.plan import Plan
from keylatch_bench.system_under_test import SystemUnderTest
from keylatch_bench.temporary_keys import Key, Scheme, TemporaryKeys

_FORGED_TOKENS: Final = 500
"""Number of different forged tokens. No cache keeps them, so they can be sent repeatedly."""
_SECRET_BEGINS: Final = -41

NEEDS: Final = {
    plan.L2: "give --store and --redis, those of the sidecar",
    plan.STORE: "give --store, that of the sidecar",
}
_SCHEMES: Final[dict[str, Scheme]] = {
    plan.L2: "cheap",
    plan.STORE: "sha256",
    plan.COLD: "argon2id",
}


def forged_tokens() -> list[Credential]:
    """Well-formed tokens with the MAC of a random key."""
    mac_keys = MacKeys([os.urandom(32)])
    return [
        Credential(b"Bearer " + mac_keys.mint("kl", "live").reveal().encode(), 401)
        for _ in range(_FORGED_TOKENS)
    ]


def with_wrong_secret(key: Key) -> Credential:
    """A token with the id of this key and a wrong secret."""
    text = key.token.reveal()
    other = "1" if text[_SECRET_BEGINS] == "0" else "0"
    wrong = text[:_SECRET_BEGINS] + other + text[_SECRET_BEGINS + 1 :]
    return Credential(b"Bearer " + wrong.encode(), 401)


class Scenarios:
    """Prepares and measures the scenarios.

    Args:
        plan: rates and numbers of checks.
        system: what is measured.
        keys: creates keys.
        store: creates keys in the store and entries in Redis; None: not accessible.
        skipped: gets each scenario that cannot be measured → what is missing.
    """

    def __init__(
        self,
        plan: Plan,
        system: SystemUnderTest,
        keys: TemporaryKeys,
        store: StoreKeyFactory | None,
        skipped: dict[str, str],
    ) -> None:
        self._plan = plan
        self._system = system
        self._keys = keys
        self._store = store
        self._skipped = skipped
        self._warm: list[Key] = []
        self._unused: dict[str, Iterator[Key]] = {}
        self._in_redis: list[Key] = []
        self._refused: list[Credential] = []
        self._forged = forged_tokens()

    @property
    def names(self) -> list[str]:
        """The scenarios that can be measured, in order."""
        return [scenario for scenario in plan.SCENARIOS if scenario not in self._skipped]

    async def prepare(self, on_created: Callable[[int], None]) -> None:
        """Create all keys; `on_created` gets the number of keys in each batch.

        Raises:
            BenchError, KeylatchError: a key cannot be created, or is not accepted by the target.
        """
        self._warm = await self._keys.create(plan.WARM_KEYS, on_created=on_created)
        outcome = await self._system.first_check(self._warm[0].credential)
        if outcome != 200:
            wrong = f"the check of a new key is answered with {outcome}"
            hint = "is KEYLATCH_ENVIRONMENT set there?"
            if self._store is not None:
                hint = "are --store and the sidecar's store the same?"
            raise BenchError(wrong, hint)
        if plan.L2 in self.names:
            await self._try_redis()
        for scenario in self.names:
            if scenario in plan.UNCACHED:
                count = self._plan.checks(scenario) * self._plan.rounds
                self._unused[scenario] = iter(
                    await self._keys.create(count, _SCHEMES[scenario], on_created)
                )

    async def _try_redis(self) -> None:
        """Skip L2 unless a key checked by the target appears in the given Redis."""
        assert self._store is not None  # noqa: S101 - without a store L2 is skipped
        for _ in range(plan.REDIS_TRIES):
            [key] = await self._keys.create(1, "argon2id")
            await check(self._system.clients[0], key.credential)
            if await self._store.is_in_redis(key):
                return
        self._skipped[plan.L2] = "that --redis does not answer, or is not the sidecar's"

    async def prepare_round(self) -> None:
        """Warm the caches behind every connection, write entries to Redis, and revoke one key."""
        if plan.L2 in self.names and self._store is not None:
            count = self._plan.checks(plan.L2)
            self._in_redis = list(itertools.islice(self._unused[plan.L2], count))
            if not await self._store.write_to_redis(self._in_redis):
                self._skipped[plan.L2] = "that --redis stopped answering during the run"
        [revoked] = await self._keys.create(1, "sha256")
        await check(self._system.clients[0], revoked.credential)
        # The revocation also brings every process up to the current sequence number; entries in
        # Redis that are newer than what a process has read are not used.
        await self._keys.revoke(revoked)
        self._refused = [
            Credential(revoked.credential.value, 401),
            with_wrong_secret(self._warm[0]),
            Credential(b"", 401),
        ]
        for _ in range(2):
            for client in self._system.clients:
                for key in self._warm:
                    await check(client, key.credential)
                for credential in self._refused:
                    await check(client, credential)
        for client in self._system.flood_clients:
            await check(client, self._forged[0])

    async def measure(self, scenario: str) -> Measurement:
        """Measure one scenario for one round."""
        rate, count = self._plan.rate_of(scenario), self._plan.checks(scenario)
        return await drive(self._system.clients, self._credentials(scenario), rate, count)

    async def measure_with_flood(self) -> tuple[Measurement, Measurement]:
        """Measure L1 while forged tokens are sent."""
        clients, limits = self._system.flood_clients, self._plan
        checks, flood = await asyncio.gather(
            self.measure(plan.FLOOD),
            drive(clients, itertools.cycle(self._forged), limits.flood_rate, limits.forged),
        )
        return checks, flood

    async def measure_saturated(self) -> Measurement:
        """Measure L1 at unlimited rate."""
        seconds, maximum = self._plan.round_seconds, self._plan.max_saturated
        return await saturate(self._system.clients, self._credentials(plan.L1), seconds, maximum)

    def _credentials(self, scenario: str) -> Iterator[Credential]:
        if scenario == plan.REFUSED:
            kinds = (itertools.repeat(each) for each in self._refused)
            forged = itertools.cycle(self._forged)
            return itertools.chain.from_iterable(zip(forged, *kinds, strict=False))
        if scenario == plan.L2:
            return _of(self._in_redis)
        if scenario in plan.UNCACHED:
            return (key.credential for key in self._unused[scenario])
        return itertools.cycle(list(_of(self._warm)))


def _of(keys: Sequence[Key]) -> Iterator[Credential]:
    return (key.credential for key in keys)
