"""News: what one process has read in the store, so that a hundred need not read it themselves.

    64 hexadecimal digits of MAC, then JSON [epoch, since, seq, [[seq, key id, organisation id]…]]

The bell carries it through Redis, where strangers may write, or through the store. It holds ids
only. The MAC (key derived from the pepper, RFC 2104) says that a process with this store's secrets
wrote it, and nothing more: not that it is new, and not that the store has not gone back to a backup
since. So news only take away; what they let a process acknowledge, the store compares with its log.
"""

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keylatch.storage.store import InvalidationBatch

_MAC_DIGITS: Final = 64
_MAX_BYTES: Final = 7_999
"""Bytes that PostgreSQL's NOTIFY takes. Nothing longer is read either: it would only take time."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What was committed after `since`, by somebody else's reading."""

    since: int
    batch: InvalidationBatch


class Signer:
    """Closes and opens news.

    Args:
        peppers: the store's peppers, newest first: the first one writes, all of them read.
    """

    def __init__(self, peppers: Sequence[bytes]) -> None:
        self.set_peppers(peppers)

    def set_peppers(self, peppers: Sequence[bytes]) -> None:
        """The peppers are these now."""
        self._keys = tuple(
            hmac.digest(pepper, b"keylatch: MAC of notices", "sha256") for pepper in peppers
        )

    def sign(self, notice: Notice | None) -> bytes:
        """What the bell carries; nothing where there is nothing to tell, or too much."""
        if notice is None or not notice.batch.is_complete:
            return b""
        batch = notice.batch
        body = json.dumps(
            [batch.epoch, notice.since, batch.seq, batch.invalidations], separators=(",", ":")
        )
        signed = _mac(self._keys[0], body.encode()) + body.encode()
        return signed if len(signed) <= _MAX_BYTES else b""

    def verify(self, signed: bytes) -> Notice | None:
        """What it says; None where none of this store's processes wrote it."""
        if len(signed) > _MAX_BYTES:
            return None
        mac, body = signed[:_MAC_DIGITS], signed[_MAC_DIGITS:]
        if not any(hmac.compare_digest(mac, _mac(key, body)) for key in self._keys):
            return None
        epoch, since, seq, touched = json.loads(body)
        return Notice(
            since, InvalidationBatch(seq, epoch, True, tuple((s, k, o) for s, k, o in touched))
        )


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256").hex().encode()
