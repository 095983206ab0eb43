"""The store's secrets as this process last read them, and what the MAC of a token says.

The law of this file: no token is called forged by secrets that may be outdated. A process that does
not know whether it has the newest secrets asks the store first.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from keylatch.caches.single_flight import SingleFlight
from keylatch.core.tokens import MacKeys, Token, is_native, is_well_formed
from keylatch.errors import StoreUnavailable
from keylatch.revocation.freshness import Freshness
from keylatch.revocation.invalidations import Invalidations
from keylatch.storage.schema import STORE_SECRETS_ID
from keylatch.storage.store import Secrets, Store

_ATTEMPTS: Final = 3


class UsesPeppers(Protocol):
    """Derives its keys from the store's peppers: `SharedCache`, `Signer`."""

    def set_peppers(self, peppers: Sequence[bytes]) -> None:
        """Derive the keys from these, newest first."""


class ReadAt(NamedTuple):
    """When secrets were read: the history of the store (`Invalidations.history`), and the sequence
    number in it."""

    history: object
    seq: int


class Keyset:
    """The secrets of one process.

    Args:
        store: read again when its secrets have changed.
        invalidations: say whether the secrets have changed.
        freshness: says whether the process knows every change.
    """

    def __init__(self, store: Store, invalidations: Invalidations, freshness: Freshness) -> None:
        self._store = store
        self._invalidations = invalidations
        self._freshness = freshness
        self.clear()

    def clear(self) -> None:
        """No secrets are loaded, and no token is called forged."""
        self.mac_keys: MacKeys | None = None
        self.as_of = ReadAt(self._invalidations.history, 0)
        """When the secrets were read."""
        self._pepper_users: Sequence[UsesPeppers] = ()
        self._single_flight: SingleFlight[None] = SingleFlight()

    def begin(
        self, secrets: Secrets, mac_keys: MacKeys, pepper_users: Sequence[UsesPeppers]
    ) -> None:
        """Use the secrets of an opened store.

        Args:
            secrets: of the store.
            mac_keys: made of them; updated when the secrets change.
            pepper_users: updated when the secrets change.
        """
        self._pepper_users = pepper_users
        self.as_of = self.as_of._replace(seq=secrets.as_of)  # the history of before the start
        self.mac_keys = mac_keys

    def verify_mac(self, token: Token) -> bool:
        """Whether the known secrets made the token's MAC."""
        return self.mac_keys is not None and self.mac_keys.verify_mac(token)

    def proves_forged(self, token: Token, as_of: ReadAt) -> bool:
        """Whether a token without a valid MAC belongs to no key of this store. While the process is
        not fresh, a new secret or an import may exist that it does not know.

        Args:
            token: `verify_mac` was False.
            as_of: of these secrets, read before that: they may be replaced at any time.
        """
        if self.mac_keys is None:
            return False
        is_up_to_date = self._freshness.is_fresh() and self._is_valid(as_of)
        if not is_native(token):
            return is_up_to_date and not self._invalidations.has_imported
        return is_up_to_date or not is_well_formed(token)

    def may_accept_pipe(self) -> bool:
        """Whether a token with `|` may belong to an imported key, as far as this process knows."""
        if self.mac_keys is None:
            return True
        self._freshness.is_fresh()  # applies changes where that needs no waiting
        return self._invalidations.has_imported

    def _is_valid(self, as_of: ReadAt) -> bool:
        """Whether no known change, restore or stop concerns secrets that were read then."""
        return as_of.history is self._invalidations.history and self._invalidations.accepts(
            STORE_SECRETS_ID, STORE_SECRETS_ID, as_of.seq
        )

    async def may_be_valid(self, token: Token, verified_as_of: ReadAt | None) -> bool:
        """Whether the current secrets made the token's MAC, or it may belong to an imported key.

        Args:
            token: of a cache miss.
            verified_as_of: `as_of` of the secrets that have made its MAC; None: none have.
        """
        await self.refresh()
        if verified_as_of == self.as_of or self.verify_mac(token):
            return True
        await self._freshness.revalidate()
        if not is_native(token):
            return self._invalidations.has_imported
        await self.refresh()
        return self.verify_mac(token)

    async def refresh(self) -> None:
        """Read the store's secrets again if they have changed, as far as this process knows.

        Raises:
            StoreUnavailable: they cannot be read.
        """
        self._freshness.is_fresh()  # applies changes where that needs no waiting
        for _ in range(_ATTEMPTS):
            if self._is_valid(self.as_of):
                return
            await self._single_flight.do("secrets", self._load)
        raise StoreUnavailable(
            "the store's secrets changed during every attempt to read them",
            "look for repeated `keylatch secrets rotate`",
        )

    async def _load(self) -> None:
        history = self._invalidations.history  # first: a restore may be noticed meanwhile
        secrets = await self._store.secrets.load()
        if self.mac_keys is not None:
            self.mac_keys.set_keys(secrets.mac_keys)
        for user in self._pepper_users:
            user.set_peppers(secrets.peppers)
        # Last: a reader of the new number finds the new keys.
        self.as_of = ReadAt(history, secrets.as_of)
