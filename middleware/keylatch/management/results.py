"""What the methods of `Keyring` return."""

from dataclasses import dataclass, field

from keylatch.core.decisions import KeyRecord
from keylatch.core.keys import Key
from keylatch.core.tokens import Token
from keylatch.revocation.propagation import Receipt


@dataclass(frozen=True, slots=True)
class _KeyResult:
    """A result about one key.

    Args:
        record: the stored row, for keylatch's own programs.
    """

    record: KeyRecord

    @property
    def key(self) -> Key:
        """The key after the change."""
        return Key(self.record)


@dataclass(frozen=True, slots=True)
class Changed(_KeyResult):
    """A changed key.

    Args:
        receipt: the propagation of the change.
        count: how many keys were changed; more than one if descendants were revoked as well.
    """

    receipt: Receipt
    count: int = 1


@dataclass(frozen=True, slots=True)
class Created(_KeyResult):
    """A new key. Only this object has the whole key text; the store has its hash.

    Args:
        token: the text, wrapped so that it cannot be shown by accident.
    """

    token: Token = field(repr=False)

    @property
    def secret(self) -> str:
        """The whole key, as a client sends it. Show it to its owner once, and store it nowhere."""
        return self.token.reveal()


@dataclass(frozen=True, slots=True)
class Rotated(Created):
    """A key with a new secret.

    Args:
        receipt: the propagation of the change.
    """

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Revoked:
    """All keys of an organisation were revoked.

    Args:
        count: how many keys.
        receipt: the propagation of the change.
    """

    count: int
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Imported:
    """A key of another system.

    Args:
        key_id: its id here; empty: it was not imported.
        is_new: False: it was here already and is unchanged.
        is_deleted: it was here already and is deleted.
    """

    key_id: str
    is_new: bool = True
    is_deleted: bool = False
