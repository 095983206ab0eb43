"""Peppers that are not in the store alone: `KEYLATCH_PEPPER_FILE`.

The store contains the pepper that values in Redis and notices are signed with, so an attacker who
has read the store, or a backup of it, has the pepper as well. This file adds a secret that no copy
of the store contains.

    openssl rand -hex 32 > /etc/keylatch/pepper     one secret per line, the newest first

The first secret signs, all of them verify. To rotate, add the new secret as the second line on
every host, then make it the first line, and remove the old one after five minutes.
"""

import hmac
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_MIN_SECRET_BYTES: Final = 32
_MAX_FILE_BYTES: Final = 64 * 1024


def read(path: Path) -> tuple[bytes, ...]:
    """The secrets in a file, the newest first.

    Raises:
        ValueError: why it cannot be used; the message holds nothing of its content.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError("is larger than 64 KiB")
    secrets = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not secrets:
        raise ValueError("is empty")
    if any(len(secret) < _MIN_SECRET_BYTES for secret in secrets):
        raise ValueError(f"has a line of fewer than {_MIN_SECRET_BYTES} bytes")
    return secrets


def is_world_readable(path: Path) -> bool:
    """Whether every account of the host may read a file."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:  # it was removed after it was read
        return False


def combine(peppers: Sequence[bytes], file_peppers: Sequence[bytes]) -> tuple[bytes, ...]:
    """The store's peppers combined with each secret of the file, the newest first; without such
    secrets, the store's own."""
    if not file_peppers:
        return tuple(peppers)
    return tuple(
        hmac.digest(secret, b"keylatch: pepper\0" + pepper, "sha256")
        for secret in file_peppers
        for pepper in peppers
    )
