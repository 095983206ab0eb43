"""Notices: rows of the log that one process has read, so that the others need not read them.

    64 hexadecimal digits of MAC, then JSON [epoch, since, row id there, seq, [row, …]]

A row has the fields of `Invalidation`.

The notifier carries a notice through Redis, where other clients may write, or through the store. It
holds ids only. The MAC (key derived from the pepper, RFC 2104) proves that a process with this
store's secrets wrote it, and nothing more: not that it is new, and not that the store was not
restored from a backup since. So a notice only invalidates; before the store accepts an
acknowledgement that a notice led to, it compares the rows with its log.

The MAC names the format. While a deployment is upgraded, processes of two versions run: each makes
the other poll.
"""

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keylatch.storage.store import Invalidation, InvalidationBatch

_FORMAT: Final = b"keylatch: MAC of notices, format 2"
"""Another one whenever the JSON has other fields."""
_MAC_DIGITS: Final = 64
_MAX_BYTES: Final = 7_999
"""Bytes that PostgreSQL's NOTIFY takes. Nothing longer is verified either: that would only cost
time."""


@dataclass(frozen=True, slots=True)
class Notice:
    """The changes that were committed after `since`, as another process has read them."""

    since: int
    batch: InvalidationBatch


class Signer:
    """Signs and verifies notices.

    Args:
        peppers: the store's peppers, newest first: the first one signs, all of them verify.
    """

    def __init__(self, peppers: Sequence[bytes]) -> None:
        self.set_peppers(peppers)

    def set_peppers(self, peppers: Sequence[bytes]) -> None:
        """Use these peppers, newest first."""
        self._keys = tuple(hmac.digest(pepper, _FORMAT, "sha256") for pepper in peppers)

    def sign(self, notice: Notice | None) -> bytes:
        """The payload of a notice; empty if there are no rows, or too many."""
        if notice is None or not notice.batch.is_complete:
            return b""
        batch = notice.batch
        body = json.dumps(
            [batch.epoch, notice.since, batch.since_row_id, batch.seq, batch.invalidations],
            separators=(",", ":"),
        )
        signed = _mac(self._keys[0], body.encode()) + body.encode()
        return signed if len(signed) <= _MAX_BYTES else b""

    def verify(self, signed: bytes) -> Notice | None:
        """The notice in a payload; None: it has no valid MAC of this store."""
        if len(signed) > _MAX_BYTES:
            return None
        mac, body = signed[:_MAC_DIGITS], signed[_MAC_DIGITS:]
        if not any(hmac.compare_digest(mac, _mac(key, body)) for key in self._keys):
            return None
        epoch, since, since_row_id, seq, rows = json.loads(body)
        invalidations = tuple(Invalidation(*row) for row in rows)
        batch = InvalidationBatch(seq, epoch, True, invalidations, since_row_id=since_row_id)
        return Notice(since, batch)


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256").hex().encode()
