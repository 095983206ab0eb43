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
from keylatch.revocation.invalidations import Receipt
from keylatch.storage.audit import OPERATOR
from keylatch.storage.secrets import KINDS, SecretInfo
from keylatch.storage.store import Store

SHARED_CACHE_SECONDS: Final = TTL_SECONDS
"""How long values live in the shared cache, and how long a process may still be about to make
something with what it knew before: so long a secret that was replaced has to stay."""


class SecretInUse(Exception):
    """A secret that is needed cannot be retired.

    Args:
        message: why.
        hint: what to do instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StoreSecrets:
    """The secrets of an opened store; it never shows one.

    Args:
        store: whose secrets.
        wait_until_acknowledged: see `feed.Freshness`.
        clock: seconds since the Unix epoch.
    """

    def __init__(
        self,
        store: Store,
        wait_until_acknowledged: Callable[[int], Awaitable[Receipt]],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._wait_until_acknowledged = wait_until_acknowledged
        self._clock = clock

    async def list(self) -> Sequence[SecretInfo]:
        """What there is to know of them, newest first."""
        return await self._store.secrets.infos()

    async def rotate(self, kinds: Sequence[str] = KINDS, *, by: str = OPERATOR) -> Receipt:
        """Make everything of these kinds with new secrets from now on.

        Returns:
            what is known of the second change's spreading.

        Raises:
            StoreUnavailable: repeat it; it goes on where it was.
        """
        await self._wait_until_acknowledged(
            await self._store.secrets.add_pending(kinds, self._now_ms(), by=by)
        )
        return await self._wait_until_acknowledged(
            await self._store.secrets.promote(kinds, self._now_ms(), by=by)
        )

    async def count_dependent_keys(self, secret_id: int) -> int:
        """How many live keys have a token that was probably made with it, or with an older one:
        those from before its successor. 0 for a pepper, which no key depends on.

        Raises:
            SecretInUse: see `retire`.
        """
        _, successor = await self._find_retirable(secret_id)
        if successor.kind != "mac":
            return 0
        return await self._store.secrets.count_issued_before(successor.status_since, self._now_ms())

    async def retire(self, secret_id: int, *, by: str = OPERATOR) -> Receipt:
        """Delete a secret that was replaced. Tokens whose check was made with it are strangers'
        from then on; a process that remembers such a key may let it in until it forgets it.

        Raises:
            SecretInUse: there is none, it is still of use, or it was until a moment ago.
            StoreUnavailable: repeat it.
        """
        await self._find_retirable(secret_id)
        seq = await self._store.secrets.retire(
            secret_id, self._replaced_before_ms(), self._now_ms(), by=by
        )
        if seq is None:
            raise SecretInUse("there is no such secret any more", "keylatch secrets list")
        return await self._wait_until_acknowledged(seq)

    async def _find_retirable(self, secret_id: int) -> tuple[SecretInfo, SecretInfo]:
        """A secret that may go, and the one that came after it."""
        by_id = {secret.id: secret for secret in await self._store.secrets.infos()}
        secret = by_id.get(secret_id)
        if secret is None:
            raise SecretInUse("there is no such secret", "keylatch secrets list")
        newer = [
            other
            for other in by_id.values()
            if other.kind == secret.kind and other.id > secret.id and other.status != "pending"
        ]
        if secret.status == "pending":
            raise SecretInUse(
                "it is pending: nothing is made with it yet",
                "keylatch secrets rotate finishes that",
            )
        if not newer:
            raise SecretInUse(
                "it is the primary secret: everything new is made with it",
                "keylatch secrets rotate, then wait",
            )
        if all(other.status_since > self._replaced_before_ms() for other in newer):
            raise SecretInUse(
                f"it was replaced less than {SHARED_CACHE_SECONDS} seconds ago",
                "values made with it may still be in the shared cache: wait",
            )
        return secret, min(newer, key=lambda other: other.id)

    def _replaced_before_ms(self) -> int:
        return self._now_ms() - SHARED_CACHE_SECONDS * 1000

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
