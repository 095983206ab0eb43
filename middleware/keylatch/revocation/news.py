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

from keylatch.store import Changes

_MAC_DIGITS: Final = 64
_LONGEST: Final = 7_999
"""Bytes that PostgreSQL's NOTIFY takes. Nothing longer is read either: it would only take time."""


@dataclass(frozen=True, slots=True)
class News:
    """What was committed after `since`, by somebody else's reading."""

    since: int
    changes: Changes


class Seal:
    """Closes and opens news.

    Args:
        peppers: the store's peppers, newest first: the first one writes, all of them read.
    """

    def __init__(self, peppers: Sequence[bytes]) -> None:
        self.learn(peppers)

    def learn(self, peppers: Sequence[bytes]) -> None:
        """The peppers are these now."""
        self._keys = tuple(
            hmac.digest(pepper, b"keylatch: MAC of news", "sha256") for pepper in peppers
        )

    def closed(self, news: News | None) -> bytes:
        """What the bell carries; nothing where there is nothing to tell, or too much."""
        if news is None or not news.changes.complete:
            return b""
        told = news.changes
        body = json.dumps([told.epoch, news.since, told.seq, told.touched], separators=(",", ":"))
        sealed = _mac(self._keys[0], body.encode()) + body.encode()
        return sealed if len(sealed) <= _LONGEST else b""

    def opened(self, sealed: bytes) -> News | None:
        """What it says; None where none of this store's processes wrote it."""
        if len(sealed) > _LONGEST:
            return None
        mac, body = sealed[:_MAC_DIGITS], sealed[_MAC_DIGITS:]
        if not any(hmac.compare_digest(mac, _mac(key, body)) for key in self._keys):
            return None
        epoch, since, seq, touched = json.loads(body)
        return News(since, Changes(seq, epoch, True, tuple((s, k, o) for s, k, o in touched)))


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256").hex().encode()
