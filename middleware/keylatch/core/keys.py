"""A key as callers of `Keyring` read it: times are aware datetimes in UTC, metadata is a mapping.

The law of this file: no I/O, no clock. `KeyRecord` stays the one representation that is stored,
cached and compared; a `Key` converts a field when it is read, so long lists pay for nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from keylatch.core.decisions import KeyRecord
from keylatch.core.timestamps import datetime_of

Scalar = str | int | float | bool | None
Metadata = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class PreviousSecret:
    """The secret that a key had before its last rotation.

    Args:
        partial_token: its prefix and last four characters.
        expires_at: when it ends or has ended.
        last_used: the last time it was accepted; None: never since the rotation.
    """

    partial_token: str
    expires_at: datetime
    last_used: datetime | None


@dataclass(frozen=True, slots=True, repr=False)
class Key:
    """A key, without its token. It cannot be changed; call `Keyring.change`.

    Args:
        record: the stored row. Its times are milliseconds. Only keylatch's own programs use it.
    """

    record: KeyRecord

    @property
    def id(self) -> str:
        """`key_` and 12 characters."""
        return self.record.id

    @property
    def organization_id(self) -> str:
        return self.record.organization_id

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def permission(self) -> str:
        return self.record.permission

    @property
    def environment(self) -> str:
        return self.record.environment

    @property
    def partial_token(self) -> str:
        """The token's prefix and last four characters, such as `kl_...a1b2`: enough to find a key
        in a list."""
        return self.record.partial_token

    @property
    def active(self) -> bool:
        """False: disabled or deleted. The organisation may be disabled as well, see
        `organization_active`."""
        return self.record.active

    @property
    def organization_active(self) -> bool:
        """False: all keys of the organisation are refused."""
        return self.record.organization_active

    @property
    def created_at(self) -> datetime:
        return datetime_of(self.record.created_at)

    @property
    def created_by(self) -> str | None:
        """The id of the key that created it, or an operator; None: not recorded."""
        return self.record.created_by

    @property
    def updated_at(self) -> datetime:
        return datetime_of(self.record.updated_at)

    @property
    def last_used(self) -> datetime | None:
        """The last time a request with it was accepted, some seconds behind; None: never."""
        return datetime_of(self.record.last_used)

    @property
    def expires_at(self) -> datetime | None:
        """None: it does not expire."""
        return datetime_of(self.record.expires_at)

    @property
    def deleted_at(self) -> datetime | None:
        """None: it was not deleted."""
        return datetime_of(self.record.deleted_at)

    @property
    def revoked_reason(self) -> str | None:
        return self.record.revoked_reason

    @property
    def rotated_at(self) -> datetime | None:
        """When its present secret was created; None: with the key."""
        return datetime_of(self.record.rotated_at)

    @property
    def previous(self) -> PreviousSecret | None:
        """The secret before the last rotation; None: there was no rotation with a grace."""
        record = self.record
        if record.previous_expires_at is None:
            return None
        return PreviousSecret(
            record.previous_partial_token or "",
            datetime_of(record.previous_expires_at),
            datetime_of(record.previous_last_used),
        )

    @property
    def metadata(self) -> Metadata:
        """What was given; empty if nothing was."""
        stored = self.record.metadata
        return MappingProxyType(json.loads(stored) if stored else {})

    def __repr__(self) -> str:
        return f"<Key {self.id} of {self.organization_id}: {self.permission}>"
