"""The store's own secrets and how they change while everybody works: the keys of the tokens' keyed
check, and the peppers of the shared cache.

The law of this file: nothing is made with a secret before every process knows that it exists. So a
rotation is two changes. The first adds the secret, which nothing is made with, and waits as a
revoke does, until no process decides without having heard of it. Whoever has heard of it reads the
secrets again before it refuses a token as made by nobody. The second change has it make whatever is
new. What was made with its predecessor is read until that is retired.

A rotation that was cut off in between is finished by the next one.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from keylatch.caches.shared_cache import TTL_SECONDS
from keylatch.revocation.feed import Receipt
from keylatch.sql.deeds import OPERATOR
from keylatch.sql.vault import KINDS, Kept
from keylatch.store import Store

SHARED_CACHE_SECONDS: Final = TTL_SECONDS
"""How long values live in the shared cache, and how long a process may still be about to make
something with what it knew before: so long a secret that was replaced has to stay."""


class MustStay(Exception):
    """A secret that is needed cannot be retired.

    Args:
        message: why.
        hint: what to do instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Vault:
    """The secrets of an opened store; it never shows one.

    Args:
        store: whose secrets.
        settle: returns when no process decides against a change any more; see `feed.Witness`.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self,
        store: Store,
        settle: Callable[[int], Awaitable[Receipt]],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._settle = settle
        self._clock = clock

    async def list(self) -> Sequence[Kept]:
        """What there is to know of them, newest first."""
        return await self._store.kept()

    async def rotate(self, kinds: Sequence[str] = KINDS, *, by: str = OPERATOR) -> Receipt:
        """Make everything of these kinds with new secrets from now on.

        Returns:
            what is known of the second change's spreading.

        Raises:
            StoreUnavailable: repeat it; it goes on where it was.
        """
        await self._settle(await self._store.introduce(kinds, self._now_ms(), by=by))
        return await self._settle(await self._store.promote(kinds, self._now_ms(), by=by))

    async def dependants(self, secret_id: int) -> int:
        """How many live keys have a token that was probably made with it, or with an older one:
        those from before its successor. 0 for a pepper, which no key depends on.

        Raises:
            MustStay: see `retire`.
        """
        _, successor = await self._replaced(secret_id)
        if successor.kind != "check":
            return 0
        return await self._store.made_before(successor.created_at, self._now_ms())

    async def retire(self, secret_id: int, *, by: str = OPERATOR) -> Receipt:
        """Delete a secret that was replaced. Tokens whose check was made with it are strangers'
        from then on; a process that remembers such a key may let it in until it forgets it.

        Raises:
            MustStay: there is none, it is still of use, or it was until a moment ago.
            StoreUnavailable: repeat it.
        """
        await self._replaced(secret_id)
        seq = await self._store.retire(secret_id, self._replaced_by_ms(), self._now_ms(), by=by)
        if seq is None:
            raise MustStay("there is no such secret any more", "keylatch secrets list")
        return await self._settle(seq)

    async def _replaced(self, secret_id: int) -> tuple[Kept, Kept]:
        """A secret that may go, and the one that came after it."""
        everything = {secret.id: secret for secret in await self._store.kept()}
        secret = everything.get(secret_id)
        if secret is None:
            raise MustStay("there is no such secret", "keylatch secrets list")
        newer = [
            other
            for other in everything.values()
            if other.kind == secret.kind and other.id > secret.id and other.role != "waits"
        ]
        if secret.role == "waits":
            raise MustStay("it waits for its first use", "keylatch secrets rotate finishes that")
        if not newer:
            raise MustStay("everything new is made with it", "keylatch secrets rotate, then wait")
        if all(other.created_at > self._replaced_by_ms() for other in newer):
            raise MustStay(
                f"it was replaced less than {SHARED_CACHE_SECONDS} seconds ago",
                "some of what was made with it still goes around: wait",
            )
        return secret, min(newer, key=lambda other: other.id)

    def _replaced_by_ms(self) -> int:
        return self._now_ms() - SHARED_CACHE_SECONDS * 1000

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
