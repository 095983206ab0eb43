"""Tokens that were made elsewhere: by what they find their key, and whether a hash is theirs.

    scheme    token                          found by              what its system hashed
    usesend   us_{10 of a-z0-9}_{32 hex}     us_{10}               scrypt of the 32
    sha256    any                            its own SHA-256       all of it
    sha512    any                            its own SHA-512       all of it
    knox      hex, maybe with a prefix       its own SHA-512       all of it, as text or as bytes
    sanctum   {number}|{40 or more}          the number            SHA-256 of what is after the |
    django    {prefix}.{secret}              the prefix            all of it: PBKDF2 or SHA-512
    seam      {company}_{short}_{long}       {company}_{short}     SHA-256 of the long one
    argon2    {prefix}. or {prefix}_…        the prefix, or the    all of it
                                             first 8 characters

The law of this file: no I/O, no clock, no lock, and no token raises anything, because strangers
send what they like. A locator begins with its scheme, so those of two schemes never meet; it holds
the public part of a token or a digest of all of it. A digest is as good as the token is random:
whoever reads the store can try weak ones against it.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from keylatch.tokens import Token

MOST_LOCATORS: Final = 7
"""No token has more of them."""
MAX_HEAD: Final = 64
"""Characters of a public part, at most."""
HEAD_PATTERN: Final = rf"[A-Za-z0-9._~+/=-]{{1,{MAX_HEAD}}}"
HEAD_LENGTH: Final = 8
"""Of the public part of a token that has no separator: the common habit."""

# What stored hashes begin with. SHA-256 of the whole token and argon2 are `hashing`'s own.
USESEND: Final = "$usesend$"
SHA512: Final = "$sha512$"
KNOX: Final = "$knox$"
SANCTUM: Final = "$sanctum$"
SEAM: Final = "$seam$"
PBKDF2: Final = "pbkdf2_sha256$"

_USESEND: Final = re.compile(r"(us_[0-9a-z]{10})_([0-9a-f]{32})")
_SANCTUM: Final = re.compile(r"([0-9]{1,20})\|([A-Za-z0-9]{40,64})")
_HEX: Final = re.compile(r"(?:[0-9A-Fa-f]{2})+")
_HEAD: Final = re.compile(HEAD_PATTERN)


@dataclass(frozen=True, slots=True)
class Foreign:
    """What is known of a key that was made elsewhere.

    Args:
        locator: how its token finds it.
        partial: what may be shown of its token.
        hash: self-describing; empty where the token is known.
        token: the token itself, which is hashed and then forgotten; None: nobody has it here.
    """

    locator: str
    partial: str
    hash: str = field(default="", repr=False)
    token: Token | None = field(default=None, repr=False)


def locators(token: Token) -> tuple[str, ...]:
    """By what a token may find its key, whoever made it; what says most comes first."""
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
    yield from _headed("django", text.partition(".")[0], text)
    for separator in "_.":
        head = text.rpartition(separator)[0]
        if separator == "_":
            yield from _headed("seam", head, text)
        yield from _headed("argon2", head, text)
    yield from _headed("argon2", text[:HEAD_LENGTH], text)


def _headed(scheme: str, head: str, text: str) -> Iterator[str]:
    if head != text and _HEAD.fullmatch(head):
        yield f"{scheme}:{head}"


def is_foreign(stored: str) -> bool:
    """Whether a stored hash is another system's, and not one that keylatch makes."""
    return stored.startswith(_ALL)


def is_quick(stored: str) -> bool:
    """Whether such a hash takes a microsecond, so that a thread hop would cost more."""
    return stored.startswith(_QUICK)


def fits(stored: str, token: Token) -> bool:
    """Whether another system's hash is that of the token; slow unless `is_quick`.

    Raises:
        ValueError: the stored hash is damaged.
        MemoryError: there is none to compute it in.
    """
    scheme = next(scheme for scheme in _FITS if stored.startswith(scheme))
    return _FITS[scheme](stored.removeprefix(scheme), token.reveal())


def _fits_usesend(stored: str, text: str) -> bool:
    salt, _, hashed = stored.partition("$")
    match = _USESEND.fullmatch(text)
    if match is None:
        return False
    # The salt is its hexadecimal text, not the bytes that it stands for.
    made = hashlib.scrypt(
        match[2].encode(), salt=salt.encode(), n=2**14, r=8, p=1, dklen=64, maxmem=2**26
    )
    return hmac.compare_digest(made.hex(), hashed)


def _fits_sha512(stored: str, text: str) -> bool:
    return hmac.compare_digest(hashlib.sha512(text.encode()).hexdigest(), stored)


def _fits_knox(stored: str, text: str) -> bool:
    # Before its version 5 the bytes were hashed that the hexadecimal digits stand for.
    if _fits_sha512(stored, text):
        return True
    return _HEX.fullmatch(text) is not None and hmac.compare_digest(
        hashlib.sha512(bytes.fromhex(text)).hexdigest(), stored
    )


def _fits_sanctum(stored: str, text: str) -> bool:
    return _fits_tail(stored, text.partition("|")[2])


def _fits_seam(stored: str, text: str) -> bool:
    return _fits_tail(stored, text.rpartition("_")[2])


def _fits_tail(stored: str, tail: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(tail.encode()).hexdigest(), stored)


def _fits_pbkdf2(stored: str, text: str) -> bool:
    iterations, salt, hashed = stored.split("$")
    made = hashlib.pbkdf2_hmac("sha256", text.encode(), salt.encode(), int(iterations))
    return hmac.compare_digest(base64.b64encode(made).decode(), hashed)


_FITS: Final[dict[str, Callable[[str, str], bool]]] = {
    USESEND: _fits_usesend,
    SHA512: _fits_sha512,
    KNOX: _fits_knox,
    SANCTUM: _fits_sanctum,
    SEAM: _fits_seam,
    PBKDF2: _fits_pbkdf2,
}
_ALL: Final = tuple(_FITS)
_QUICK: Final = (SHA512, KNOX, SANCTUM, SEAM)
