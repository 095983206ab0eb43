"""Tokens: their format, minting, MAC and CRC, and a class that does not reveal them by accident.

    {prefix}_{environment}_{id}_{secret}{check}{crc}
     a-z0-9   a-z0-9        12   27      8      6     base62

The law of this file: no I/O, no clock. A token is parsed from its right end, where every part has
a fixed length, so the length of the prefix does not matter. The CRC-32 lets secret scanners
distinguish a token from noise with `SCAN_PATTERN` alone; the check, a truncated MAC, lets a process
refuse a forged token without a look-up. Neither proves anything about a key: only the hash in
the store does.
"""

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Sequence
from typing import Final, NoReturn

ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_LENGTH: Final = 12  # 71.4 bits
SECRET_LENGTH: Final = 27  # 160.7 bits
MAC_LENGTH: Final = 8  # 47.6 bits
CRC_LENGTH: Final = 6  # 62**6 > 2**32
MAX_LENGTH: Final = 96

_KEY_ID_PREFIX: Final = "key_"
_DIGIT_PAIRS: Final = [first + second for first in ALPHABET for second in ALPHABET]
_blake2b: Final = hashlib.blake2b
_TAIL_LENGTH: Final = SECRET_LENGTH + MAC_LENGTH + CRC_LENGTH
_ID_SLICE: Final = slice(-_TAIL_LENGTH - 1 - ID_LENGTH, -_TAIL_LENGTH - 1)
_TOKEN_PATTERN: Final = re.compile(
    rf"[a-z][a-z0-9]{{1,15}}_[a-z][a-z0-9]{{0,15}}_[A-Za-z0-9]{{{ID_LENGTH}}}_[A-Za-z0-9]{{{_TAIL_LENGTH}}}"
)

PREFIX_PATTERN: Final = r"[a-z][a-z0-9]{1,15}"
ENVIRONMENT_PATTERN: Final = r"[a-z][a-z0-9]{0,15}"

SCAN_PATTERN: Final = r"\b[a-z][a-z0-9]{1,15}_[a-z][a-z0-9]{0,15}_[A-Za-z0-9]{12}_[A-Za-z0-9]{41}\b"
"""Finds keylatch tokens in text; `has_valid_checksum` rejects noise by the CRC-32."""


_TOKEN_IN_TEXT: Final = re.compile(rf"_[A-Za-z0-9]{{{ID_LENGTH}}}_[A-Za-z0-9]{{{_TAIL_LENGTH}}}")


def redact_tokens(text: str) -> str:
    """The text with the secret part of every token removed, also of adjacent tokens."""
    return _TOKEN_IN_TEXT.sub("_...", text)


class Token:
    """A token that does not reveal itself by accident.

    `repr`, `str`, `format` and pickles show the masked form only; `reveal()` is the one way
    to the text.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The whole token, to show it once, when it is created."""
        return self._text

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token (32 bytes)."""
        return hashlib.sha256(self._text.encode()).digest()

    @property
    def fingerprint(self) -> bytes:
        """The fingerprint of `Bearer {token}`, the header value of nearly all clients: the key of
        the in-process caches."""
        return fingerprint(b"Bearer " + self._text.encode())

    @property
    def key_id(self) -> str:
        """The key id in the token, which may be forged."""
        return _KEY_ID_PREFIX + self._text[_ID_SLICE]

    @property
    def partial(self) -> str:
        """`{prefix}_...{last 4}`; `...` if the text is not a well-formed token."""
        if not is_well_formed(self):
            return "..."
        return f"{self._text.partition('_')[0]}_...{self._text[-4:]}"

    @property
    def masked(self) -> str:
        """`{prefix}_{environment}_****{last 4}`, or `****` where the text has no keylatch shape.
        Nothing accepts an asterisk, so this cannot be taken for a key."""
        if not is_well_formed(self):
            return "****"
        prefix, environment, _ = self._text.split("_", 2)
        return f"{prefix}_{environment}_****{self._text[-4:]}"

    def __repr__(self) -> str:
        return f"<Token {self.masked}>"

    def __str__(self) -> str:
        return self.masked

    def __format__(self, spec: str) -> str:
        return format(self.masked, spec)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.masked,)

    def __iter__(self) -> NoReturn:
        raise TypeError("a Token cannot be iterated")


def fingerprint(value: bytes) -> bytes:
    """The first 128 bits of a header value's BLAKE2b (RFC 7693): to match one of 50,000 keys by
    chance takes 2**112 attempts.

    Not SHA-256, which hashlib leaves to OpenSSL: between real requests, whose data evict everything
    from the processor's caches, that takes 2.4 us and BLAKE2b 0.8 us.
    """
    return _blake2b(value).digest()[:16]


def is_well_formed(token: Token) -> bool:
    """Whether format, length and CRC-32 are those of a keylatch token, of any store."""
    text = token._text
    return (
        len(text) <= MAX_LENGTH
        and _TOKEN_PATTERN.fullmatch(text) is not None
        and text[-CRC_LENGTH:] == _crc(text[:-CRC_LENGTH])
    )


def is_native(token: Token) -> bool:
    """Whether a token has keylatch's format, even with a wrong MAC or CRC: then it is never treated
    as the token of an imported key."""
    return len(token._text) <= MAX_LENGTH and _TOKEN_PATTERN.fullmatch(token._text) is not None


def has_valid_checksum(text: str) -> bool:
    """Whether a match of `SCAN_PATTERN` is a keylatch token, by its CRC-32, and not noise."""
    return is_well_formed(Token(text))


class MacKeys:
    """The keys of the MAC: the first one mints tokens, all of them verify.

    Args:
        keys: secrets of at least 16 bytes, from the store.
    """

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.set_keys(keys)

    def set_keys(self, keys: Sequence[bytes]) -> None:
        """Replace the keys, after a rotation."""
        if not keys or any(len(key) < 16 for key in keys):
            raise ValueError("at least one MAC key of 16 bytes or more is needed")
        self._keys = tuple(keys)

    def mint(self, prefix: str, environment: str, key_id: str | None = None) -> Token:
        """A new token, from the operating system's CSPRNG.

        Args:
            prefix: its first word.
            environment: its second word.
            key_id: the key that gets a new secret; None: a new key.

        Raises:
            ValueError: the grammar does not allow the prefix or the environment.
        """
        if not re.fullmatch(PREFIX_PATTERN, prefix):
            raise ValueError(f"a token prefix matches {PREFIX_PATTERN}")
        if not re.fullmatch(ENVIRONMENT_PATTERN, environment):
            raise ValueError(f"an environment matches {ENVIRONMENT_PATTERN}")
        public_id = (
            _random_base62(ID_LENGTH) if key_id is None else key_id.removeprefix(_KEY_ID_PREFIX)
        )
        body = f"{prefix}_{environment}_{public_id}_{_random_base62(SECRET_LENGTH)}"
        body += _mac(self._keys[0], body)
        return Token(body + _crc(body))

    def verify_mac(self, token: Token) -> bool:
        """Whether this store minted the token; takes about a microsecond."""
        if not is_well_formed(token):
            return False
        body = token._text[: -MAC_LENGTH - CRC_LENGTH]
        mac = token._text[-MAC_LENGTH - CRC_LENGTH : -CRC_LENGTH]
        return any(hmac.compare_digest(mac, _mac(key, body)) for key in self._keys)


def _random_base62(length: int) -> str:
    return _base62(secrets.randbelow(62**length), length)


def _mac(key: bytes, body: str) -> str:
    digest = hashlib.blake2s(body.encode(), key=key, digest_size=16).digest()
    return _base62(int.from_bytes(digest) % 62**MAC_LENGTH, MAC_LENGTH)


def _crc(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), CRC_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length // 2):
        number, pair = divmod(number, 62 * 62)
        digits.append(_DIGIT_PAIRS[pair])
    if length % 2:
        digits.append(ALPHABET[number % 62])
    return "".join(reversed(digits))
