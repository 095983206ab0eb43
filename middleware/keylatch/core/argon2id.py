"""argon2id hashes as the store holds them: a digest of argon2id's output, and not that output.

    $argon2id$v=19$m=19456,t=2,p=1$<salt>$<SHA-256 of argon2id's 32 bytes>$sha256

argon2id's output, the *preimage*, is never stored in plain text. Only a process that has hashed
the right token knows it, and a process that reads the row can verify it with one SHA-256. So a
preimage that matches a row proves that its token was verified, wherever the preimage comes from: a
process that has run argon2id shares it with the others through Redis, encrypted with the token. An
attacker who has read the store still has to run argon2id for each guess.

The law of this file: no I/O, no clock, no lock.
"""

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Final

import argon2
from argon2.exceptions import InvalidHashError
from argon2.low_level import Type, hash_secret_raw

PREIMAGE_BYTES: Final = 32
_SALT_BYTES: Final = 16
_VERSION: Final = 19
_FORMAT: Final = re.compile(
    rf"\$argon2id\$v={_VERSION}\$m=([0-9]{{1,8}}),t=([0-9]{{1,5}}),p=([0-9]{{1,3}})"
    r"\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})\$sha256"
)


@dataclass(frozen=True, slots=True)
class Cost:
    """The parameters of argon2id (RFC 9106 section 3.1)."""

    memory_kib: int = 19 * 1024
    passes: int = 2
    lanes: int = 1


def has_digest_format(stored: str) -> bool:
    """Whether a stored hash has the form above, and is not argon2's own output."""
    return _FORMAT.fullmatch(stored) is not None


def needs_rehash(stored: str, cost: Cost) -> bool:
    """Whether an argon2 hash has another form or cost; False for text that is not a hash."""
    if (match := _FORMAT.fullmatch(stored)) is not None:
        return _cost_of(match) != cost
    try:
        argon2.extract_parameters(stored)
    except InvalidHashError:
        return False
    return True


def hash_secret(text: str, cost: Cost) -> str:
    """A new hash in the form above."""
    salt = secrets.token_bytes(_SALT_BYTES)
    digest = hashlib.sha256(_compute(text, salt, cost)).digest()
    parameters = f"m={cost.memory_kib},t={cost.passes},p={cost.lanes}"
    return f"$argon2id$v={_VERSION}${parameters}${_base64(salt)}${_base64(digest)}$sha256"


def compute_preimage(stored: str, text: str) -> bytes:
    """argon2id of the text, with the salt and the cost of a stored hash.

    Raises:
        ValueError: the stored hash has another form.
        argon2.exceptions.HashingError: argon2 failed, usually for lack of memory.
    """
    match = _FORMAT.fullmatch(stored)
    if match is None:
        raise ValueError("not an argon2id hash of keylatch")
    return _compute(text, base64.b64decode(match[4] + "=="), _cost_of(match))


def verify_preimage(stored: str, preimage: bytes) -> bool:
    """Whether the preimage belongs to a stored hash; then its token is the right one."""
    match = _FORMAT.fullmatch(stored)
    if match is None:
        return False
    return hmac.compare_digest(match[5], _base64(hashlib.sha256(preimage).digest()))


def _cost_of(match: re.Match[str]) -> Cost:
    return Cost(int(match[1]), int(match[2]), int(match[3]))


def _compute(text: str, salt: bytes, cost: Cost) -> bytes:
    return hash_secret_raw(
        text.encode(),
        salt,
        time_cost=cost.passes,
        memory_cost=cost.memory_kib,
        parallelism=cost.lanes,
        hash_len=PREIMAGE_BYTES,
        type=Type.ID,
        version=_VERSION,
    )


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")  # without padding, as argon2 does
