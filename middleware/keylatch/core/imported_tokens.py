"""Tokens that another system created: how they find their key, and how they are verified.

    scheme    token                          locator               hashed by its system
    usesend   us_{10 of a-z0-9}_{32 hex}     us_{10}               scrypt of the 32
    sha256    any                            its own SHA-256       all of it
    sha512    any                            its own SHA-512       all of it
    knox      hex, optional prefix            its own SHA-512       all of it, as text or as bytes
    sanctum   {number}|{40 or more}          the number            SHA-256 of what is after the |
    django    {prefix}.{secret}              the prefix            all of it: PBKDF2 or SHA-512
    seam      {company}_{short}_{long}       {company}_{short}     SHA-256 of the long one
    argon2    {prefix}. or {prefix}_…        the prefix, or the    all of it
                                             first 8 characters

The law of this file: no I/O, no clock, no lock, and no token raises an exception, because clients
send arbitrary text. A locator begins with its scheme, so locators of two schemes never collide; it
contains the public part of a token or a digest of the whole token. A digest protects only random
tokens: a reader of the store can test weak ones against it.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from keylatch.core.tokens import Token

MAX_LOCATORS: Final = 7
"""The most locators that a token can have."""
MAX_PUBLIC_PART_LENGTH: Final = 64
"""In characters."""
PUBLIC_PART_PATTERN: Final = rf"[A-Za-z0-9._~+/=-]{{1,{MAX_PUBLIC_PART_LENGTH}}}"
PUBLIC_PART_LENGTH: Final = 8
"""The length of the public part of a token without separator, by convention."""

# Prefixes of stored hashes. `hashing` verifies SHA-256 of the whole token and argon2 itself.
USESEND: Final = "$usesend$"
SHA512: Final = "$sha512$"
KNOX: Final = "$knox$"
SANCTUM: Final = "$sanctum$"
SEAM: Final = "$seam$"
PBKDF2: Final = "pbkdf2_sha256$"

_USESEND: Final = re.compile(r"(us_[0-9a-z]{10})_([0-9a-f]{32})")
_SANCTUM: Final = re.compile(r"([0-9]{1,20})\|([A-Za-z0-9]{40,64})")
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_PUBLIC_PART: Final = re.compile(PUBLIC_PART_PATTERN)


@dataclass(frozen=True, slots=True)
class ImportedToken:
    """The token of a key to import.

    Args:
        locator: how the token finds the key.
        partial: the part of the token that may be shown.
        hash: self-describing; empty if the token is known.
        token: the token, which is hashed and not stored; None: only its hash is known.
    """

    locator: str
    partial: str
    hash: str = field(default="", repr=False)
    token: Token | None = field(default=None, repr=False)


def locators(token: Token) -> tuple[str, ...]:
    """The locators that a token may have, the most specific first."""
    return tuple(_locators(token.reveal()))


def _locators(text: str) -> Iterator[str]:
    raw = text.encode()
    yield f"sha256:{hashlib.sha256(raw).hexdigest()}"
    yield f"sha512:{hashlib.sha512(raw).hexdigest()}"
    if _HEX.fullmatch(text):
        yield f"sha512:{hashlib.sha512(bytes.fromhex(text)).hexdigest()}"
    if match := _SANCTUM.fullmatch(text):
        yield f"sanctum:{match[1]}"
    if match := _USESEND.fullmatch(text):
        yield f"usesend:{match[1]}"
    yield from _public_part_locator("django", text.partition(".")[0], text)
    for separator in "_.":
        public_part = text.rpartition(separator)[0]
        if separator == "_":
            yield from _public_part_locator("seam", public_part, text)
        yield from _public_part_locator("argon2", public_part, text)
    yield from _public_part_locator("argon2", text[:PUBLIC_PART_LENGTH], text)


def _public_part_locator(scheme: str, public_part: str, text: str) -> Iterator[str]:
    if public_part != text and _PUBLIC_PART.fullmatch(public_part):
        yield f"{scheme}:{public_part}"


def is_imported_hash(stored: str) -> bool:
    """Whether a stored hash is another system's and not of keylatch's own form."""
    return stored.startswith(_SCHEMES)


def is_fast(stored: str) -> bool:
    """Whether such a hash takes about a microsecond, less than a switch to a thread."""
    return stored.startswith(_FAST_SCHEMES)


def verify(stored: str, token: Token) -> bool:
    """Whether another system's hash belongs to the token; slow unless `is_fast`.

    Raises:
        ValueError: the stored hash is damaged.
        MemoryError: not enough memory for scrypt.
    """
    scheme = next(scheme for scheme in _VERIFIERS if stored.startswith(scheme))
    return _VERIFIERS[scheme](stored.removeprefix(scheme), token.reveal())


def _verify_usesend(stored: str, text: str) -> bool:
    salt, _, hashed = stored.partition("$")
    match = _USESEND.fullmatch(text)
    if match is None:
        return False
    # The salt is the hexadecimal text, not its bytes.
    computed = hashlib.scrypt(
        match[2].encode(), salt=salt.encode(), n=2**14, r=8, p=1, dklen=64, maxmem=2**26
    )
    return hmac.compare_digest(computed.hex(), hashed)


def _verify_sha512(stored: str, text: str) -> bool:
    return hmac.compare_digest(hashlib.sha512(text.encode()).hexdigest(), stored)


def _verify_knox(stored: str, text: str) -> bool:
    # Before version 5, knox hashed the bytes of the hexadecimal digits.
    if _verify_sha512(stored, text):
        return True
    return _HEX.fullmatch(text) is not None and hmac.compare_digest(
        hashlib.sha512(bytes.fromhex(text)).hexdigest(), stored
    )


def _verify_sanctum(stored: str, text: str) -> bool:
    return _verify_secret_part(stored, text.partition("|")[2])


def _verify_seam(stored: str, text: str) -> bool:
    return _verify_secret_part(stored, text.rpartition("_")[2])


def _verify_secret_part(stored: str, secret_part: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(secret_part.encode()).hexdigest(), stored)


def _verify_pbkdf2(stored: str, text: str) -> bool:
    iterations, salt, hashed = stored.split("$")
    computed = hashlib.pbkdf2_hmac("sha256", text.encode(), salt.encode(), int(iterations))
    return hmac.compare_digest(base64.b64encode(computed).decode(), hashed)


_VERIFIERS: Final[dict[str, Callable[[str, str], bool]]] = {
    USESEND: _verify_usesend,
    SHA512: _verify_sha512,
    KNOX: _verify_knox,
    SANCTUM: _verify_sanctum,
    SEAM: _verify_seam,
    PBKDF2: _verify_pbkdf2,
}
_SCHEMES: Final = tuple(_VERIFIERS)
_FAST_SCHEMES: Final = (SHA512, KNOX, SANCTUM, SEAM)
