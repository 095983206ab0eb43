"""What each tier sends, and how its keys come to be known, or unknown, where it needs them so.

A key that the sidecar has seen cannot be made unseen from outside. So L2, store and cold spend a
new key on each check: what is measured is always its first sight.
"""

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from keylatch.core.tokens import MacKeys
from keylatch_bench import plan
from keylatch_bench.connection import Unusable
from keylatch_bench.key_factories import StoreKeyFactory
from keylatch_bench.load_generator import Credential, Measurement, check, drive, saturate
from keylatch_bench.plan import Plan
from keylatch_bench.system_under_test import Subject
from keylatch_bench.temporary_keys import Key, Scheme, TemporaryKeys

_MADE_UP: Final = 500
"""So many different ones: none of them is remembered anywhere, so they may come again."""
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


def made_up() -> list[Credential]:
    """Tokens of the right form that no store has minted."""
    stranger = MacKeys([os.urandom(32)])
    return [
        Credential(b"Bearer " + stranger.mint("kl", "live").reveal().encode(), 401)
        for _ in range(_MADE_UP)
    ]


def with_wrong_secret(key: Key) -> Credential:
    """The id of a key that exists, and not its secret."""
    text = key.token.reveal()
    other = "1" if text[_SECRET_BEGINS] == "0" else "0"
    wrong = text[:_SECRET_BEGINS] + other + text[_SECRET_BEGINS + 1 :]
    return Credential(b"Bearer " + wrong.encode(), 401)


class Tiers:
    """The keys of all tiers, and their turns.

    Args:
        plan: how many of what.
        subject: what is measured.
        supply: where keys come from.
        store: makes keys in the store, and puts them into Redis, if there is one.
        skipped: filled with what cannot be measured → what to add.
    """

    def __init__(
        self,
        plan: Plan,
        subject: Subject,
        supply: TemporaryKeys,
        store: StoreKeyFactory | None,
        skipped: dict[str, str],
    ) -> None:
        self._plan = plan
        self._subject = subject
        self._supply = supply
        self._store = store
        self._skipped = skipped
        self._warm: list[Key] = []
        self._unused: dict[str, Iterator[Key]] = {}
        self._in_redis: list[Key] = []
        self._refused: list[Credential] = []
        self._made_up = made_up()

    @property
    def names(self) -> list[str]:
        """The tiers that can be measured, in order."""
        return [tier for tier in plan.TIERS if tier not in self._skipped]

    def key_count(self) -> int:
        """How many keys `prepare` will make."""
        fresh = sum(self._plan.checks(tier) for tier in self.names if tier in plan.UNCACHED)
        return plan.WARM_KEYS + fresh * self._plan.rounds

    async def prepare(self, on_created: Callable[[int], None]) -> None:
        """Make all keys; `on_created` is called with how many after every few.

        Raises:
            Unusable, KeylatchError: they cannot be made, or are no keys where they are checked.
        """
        self._warm = await self._supply.create(plan.WARM_KEYS, on_created=on_created)
        outcome = await self._subject.first_check(self._warm[0].credential)
        if outcome != 200:
            wrong = f"a key that was just made is answered with {outcome}"
            hint = "is KEYLATCH_ENVIRONMENT set there?"
            if self._store is not None:
                hint = "are --store and the sidecar's store the same?"
            raise Unusable(wrong, hint)
        if plan.L2 in self.names:
            await self._try_redis()
        for tier in self.names:
            if tier in plan.UNCACHED:
                count = self._plan.checks(tier) * self._plan.rounds
                self._unused[tier] = iter(
                    await self._supply.create(count, _SCHEMES[tier], on_created)
                )

    async def _try_redis(self) -> None:
        """A key that was checked over there must be in the Redis that we were given."""
        assert self._store is not None  # noqa: S101 - or L2 would have been skipped
        for _ in range(plan.REDIS_TRIES):
            [key] = await self._supply.create(1, "argon2id")
            await check(self._subject.clients[0], key.credential)
            if await self._store.is_in_redis(key):
                return
        self._skipped[plan.L2] = "that --redis does not answer, or is not the sidecar's"

    async def prepare_round(self) -> None:
        """Let every line know the warm keys again, fill Redis, revoke a key to be refused."""
        if plan.L2 in self.names and self._store is not None:
            count = self._plan.checks(plan.L2)
            self._in_redis = list(itertools.islice(self._unused[plan.L2], count))
            if not await self._store.write_to_redis(self._in_redis):
                self._skipped[plan.L2] = "that --redis stopped answering meanwhile"
        [revoked] = await self._supply.create(1, "sha256")
        await check(self._subject.clients[0], revoked.credential)
        # It also tells every process how far the store has come, so that what was put into Redis
        # is not too new to be believed.
        await self._supply.revoke(revoked)
        self._refused = [
            Credential(revoked.credential.value, 401),
            with_wrong_secret(self._warm[0]),
            Credential(b"", 401),
        ]
        for _ in range(2):
            for line in self._subject.clients:
                for key in self._warm:
                    await check(line, key.credential)
                for credential in self._refused:
                    await check(line, credential)
        for line in self._subject.flood_clients:
            await check(line, self._made_up[0])

    async def measure(self, tier: str) -> Measurement:
        """One tier's turn in a round."""
        rate, count = self._plan.rate_of(tier), self._plan.checks(tier)
        return await drive(self._subject.clients, self._credentials(tier), rate, count)

    async def measure_with_flood(self) -> tuple[Measurement, Measurement]:
        """L1's turn once more, and that of the made-up tokens beside it."""
        lines, wanted = self._subject.flood_clients, self._plan
        checks, flood = await asyncio.gather(
            self.measure(plan.FLOOD),
            drive(lines, itertools.cycle(self._made_up), wanted.flood_rate, wanted.made_up),
        )
        return checks, flood

    async def measure_saturated(self) -> Measurement:
        """As many checks of known keys as the lines can carry."""
        seconds, most = self._plan.round_seconds, self._plan.most_saturated
        return await saturate(self._subject.clients, self._credentials(plan.L1), seconds, most)

    def _credentials(self, tier: str) -> Iterator[Credential]:
        if tier == plan.REFUSED:
            kinds = (itertools.repeat(each) for each in self._refused)
            made_up = itertools.cycle(self._made_up)
            return itertools.chain.from_iterable(zip(made_up, *kinds, strict=False))
        if tier == plan.L2:
            return _of(self._in_redis)
        if tier in plan.UNCACHED:
            return (key.credential for key in self._unused[tier])
        return itertools.cycle(list(_of(self._warm)))


def _of(keys: Sequence[Key]) -> Iterator[Credential]:
    return (key.credential for key in keys)
