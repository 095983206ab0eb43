"""The store's own secrets and their rotation: MAC keys for tokens, peppers for the shared cache.

The law of this file: no process creates anything with a secret before every process knows that
secret. So a rotation is two changes. The first adds a pending secret, which creates nothing, and
waits as a revoke does, until no process decides without knowing of it. A process that knows of it
reloads its secrets before it rejects a token as forged. The second change makes the secret primary:
it creates everything new. What its predecessor created is accepted until that is retired.

The next rotation finishes one that was interrupted between the two changes.
"""

from collections.abc import Callable, Sequence
from typing import Final

from keylatch.caches.shared_cache import TTL_SECONDS
from keylatch.errors import SecretInUse
from keylatch.revocation.propagation import Propagation, Receipt
from keylatch.storage.audit import OPERATOR
from keylatch.storage.secrets import KINDS, SecretInfo
from keylatch.storage.store import Store

SHARED_CACHE_SECONDS: Final = TTL_SECONDS
"""How long a value lives in the shared cache, and how long a process may still create something
with the secrets that it loaded before: a replaced secret has to stay for this long."""


class StoreSecrets:
    """The secrets of an opened store. No method returns a secret itself.

    Args:
        store: whose secrets.
        propagation: waits until every process knows a change.
        now_ms: the store's time, in milliseconds since the Unix epoch.
    """

    def __init__(
        self,
        store: Store,
        propagation: Propagation,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._propagation = propagation
        self._now_ms = now_ms

    async def list(self) -> Sequence[SecretInfo]:
        """The id, kind and status of each secret, newest first."""
        return await self._store.secrets.infos()

    async def rotate(self, kinds: Sequence[str] = KINDS, *, by: str = OPERATOR) -> Receipt:
        """Replace the primary secret of these kinds.

        Returns:
            the propagation of the second change.

        Raises:
            StoreUnavailable: repeat the call; it continues where it was interrupted.
        """
        await self._propagation.publish(
            await self._store.secrets.add_pending(kinds, self._now_ms(), by=by)
        )
        return await self._propagation.publish(
            await self._store.secrets.promote(kinds, self._now_ms(), by=by)
        )

    async def count_dependent_keys(self, secret_id: int) -> int:
        """How many live keys have a token that this MAC key, or an older one, probably signed:
        those from before its successor became primary. 0 for a pepper; no key depends on it.

        Raises:
            SecretInUse: see `retire`.
        """
        _, successor = await self._find_retirable(secret_id)
        if successor.kind != "mac":
            return 0
        return await self._store.secrets.count_issued_before(successor.status_since, self._now_ms())

    async def retire(self, secret_id: int, *, by: str = OPERATOR) -> Receipt:
        """Delete a secret that was replaced. Tokens that it signed are rejected as forged from then
        on; a process that has such a key in its local cache may accept it until the entry is
        evicted.

        Raises:
            SecretInUse: there is no such secret, it is still needed, or it was replaced less than
                `SHARED_CACHE_SECONDS` ago.
            StoreUnavailable: repeat the call.
        """
        await self._find_retirable(secret_id)
        seq = await self._store.secrets.retire(
            secret_id, self._replaced_before_ms(), self._now_ms(), by=by
        )
        if seq is None:
            raise SecretInUse("there is no such secret any more", "keylatch secrets list")
        return await self._propagation.publish(seq)

    async def _find_retirable(self, secret_id: int) -> tuple[SecretInfo, SecretInfo]:
        """A secret that may be deleted, and its successor."""
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
