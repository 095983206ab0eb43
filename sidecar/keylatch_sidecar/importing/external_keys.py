"""Parses the fields of an imported key: one set of fields per scheme.

    usesend   "clientId": "k3j9x0a1b2", "hash": "{salt}:{hash}"     useSend, unsent
    sha256    "hash": 64 hexadecimal digits, or base64              Unkey, Better Auth
    sha512    "hash": 128 hexadecimal digits, or base64
    sanctum   "tokenId": 17, "hash": "{token column}"               Laravel Sanctum
    knox      "tokenKey": "9f86d081", "hash": "{digest column}"     django-rest-knox
    django    "prefix": "aB3dE6gH", "hash": "{hashed_key column}"   djangorestframework-api-key
    argon2    "prefix": "acme_4f9c", "hash": "$argon2id$v=19$…"
    seam      "prefix": "acme", "shortToken": "BRTRKFsL", "hash": "{longTokenHash}"
    raw       "key": the token itself

The law of this file: no error contains a value, and no hash is accepted that would cost a check
more than a second or a gigabyte: any client can cause its computation.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any, Final

from keylatch.core import imported_tokens
from keylatch.core.credentials import MAX_VALUE_BYTES
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.tokens import Token, is_native
from keylatch_sidecar.api.errors import InvalidInput, invalid_input

_MIN_ITERATIONS: Final = 1_000
_MAX_ITERATIONS: Final = 2_000_000
_MAX_MEMORY_KIB: Final = 256 * 1024
_MAX_KIB_PASSES: Final = 1024 * 1024
_MAX_LANES: Final = 16
_MIN_KEY_LENGTH: Final = 20
_MIN_DISTINCT_CHARACTERS: Final = 8
_MAX_SHOWN_LENGTH: Final = 29  # of a partial token's 32 characters

_PHC: Final = re.compile(
    r"\$argon2(?:id|i|d)\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,5}),p=([0-9]{1,3})"
    r"\$([A-Za-z0-9+/]{11,64})\$([A-Za-z0-9+/]{22,88})"
)
_PBKDF2: Final = re.compile(r"pbkdf2_sha256\$([0-9]{1,9})\$[!-#%-~]{1,64}\$([A-Za-z0-9+/]{43})=")
_NATIVE_TAIL: Final = "_" + "0" * 41


class InvalidField(Exception):
    """A field that is not accepted.

    Args:
        field: its name.
        message: what it must be.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


def parse(
    row: dict[str, Any], common_fields: frozenset[str]
) -> tuple[dict[str, Any], ImportedToken]:
    """The common fields of a line, and its imported token.

    Args:
        row: the line; it has a `scheme`.
        common_fields: the fields that lines without a scheme may have, too.

    Raises:
        Problem: with the invalid fields.
    """
    scheme = row["scheme"]
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        raise invalid_input([InvalidInput("scheme", f"must be one of {', '.join(_SCHEMES)}")])
    fields, build = _SCHEMES[scheme]
    common = {name: value for name, value in row.items() if name in common_fields}
    errors = [
        InvalidInput(name, "must be given, as text")
        for name in fields
        if not isinstance(row.get(name), str | int) or isinstance(row[name], bool)
    ]
    if row.keys() - common.keys() - {*fields, "scheme"}:
        # Their names are not reported: one of them may be a key.
        names = ", ".join(fields)
        errors.append(
            InvalidInput("scheme", f"must come with {names}, and with no other fields of its own")
        )
    if errors:
        raise invalid_input(errors)
    try:
        token = build(*(str(row[name]) for name in fields))
    except InvalidField as error:
        raise invalid_input([InvalidInput(error.field, error.message)]) from None
    if token.token is not None and token.token.reveal() in str(row.get("name", "")):
        raise invalid_input(
            [InvalidInput("name", "must not contain the key: names are stored and shown")]
        )
    return common, token


def _usesend(client_id: str, hashed: str) -> ImportedToken:
    _require_match("clientId", r"[0-9a-z]{10}", client_id)
    _require_match("hash", r"[0-9a-f]{32}:[0-9a-f]{128}", hashed)
    head = f"us_{client_id}"
    return ImportedToken(
        f"usesend:{head}", _partial(head), imported_tokens.USESEND + hashed.replace(":", "$")
    )


def _sha256(hashed: str) -> ImportedToken:
    digest = _digest(hashed, 32)
    return ImportedToken(f"sha256:{digest}", "...", f"$sha256${digest}")


def _sha512(hashed: str) -> ImportedToken:
    digest = _digest(hashed, 64)
    return ImportedToken(f"sha512:{digest}", "...", imported_tokens.SHA512 + digest)


def _sanctum(token_id: str, hashed: str) -> ImportedToken:
    _require_match("tokenId", r"[1-9][0-9]{0,19}", token_id)
    return ImportedToken(
        f"sanctum:{token_id}",
        _partial(f"{token_id}|"),
        imported_tokens.SANCTUM + _digest(hashed, 32),
    )


def _knox(token_key: str, hashed: str) -> ImportedToken:
    _require_match("tokenKey", r"[A-Za-z0-9_-]{1,25}", token_key)
    digest = _digest(hashed, 64)
    return ImportedToken(f"sha512:{digest}", _partial(token_key), imported_tokens.KNOX + digest)


def _django(prefix: str, hashed: str) -> ImportedToken:
    _require_match("prefix", r"[A-Za-z0-9_~+/=-]{1,64}", prefix)
    if hashed.startswith("sha512$$"):
        stored = imported_tokens.SHA512 + _digest(hashed.removeprefix("sha512$$"), 64)
    elif hashed.startswith("argon2$"):
        stored = _phc(hashed.removeprefix("argon2"))
    else:
        stored = _pbkdf2(hashed)
    return ImportedToken(f"django:{prefix}", _partial(f"{prefix}."), stored)


def _argon2(prefix: str, hashed: str) -> ImportedToken:
    _require_match("prefix", imported_tokens.PUBLIC_PART_PATTERN, prefix)
    if is_native(Token(prefix + _NATIVE_TAIL)):
        raise InvalidField("prefix", "is that of a token that keylatch itself mints")
    return ImportedToken(f"argon2:{prefix}", _partial(prefix), _phc(hashed))


def _seam(prefix: str, short_token: str, hashed: str) -> ImportedToken:
    _require_match("prefix", r"[A-Za-z0-9-]{1,32}", prefix)
    _require_match("shortToken", r"[A-Za-z0-9]{1,31}", short_token)
    head = f"{prefix}_{short_token}"
    return ImportedToken(f"seam:{head}", _partial(head), imported_tokens.SEAM + _digest(hashed, 32))


def _raw(key: str) -> ImportedToken:
    longest = MAX_VALUE_BYTES - len("Bearer ")
    _require_match("key", rf"[A-Za-z0-9._~+/=-]{{{_MIN_KEY_LENGTH},{longest}}}", key)
    if len(set(key)) < _MIN_DISTINCT_CHARACTERS:
        raise InvalidField(
            "key", f"is too weak: fewer than {_MIN_DISTINCT_CHARACTERS} different characters"
        )
    token = Token(key)
    if is_native(token):
        raise InvalidField("key", "has the form of a token that keylatch itself mints")
    digest = hashlib.sha256(key.encode()).hexdigest()
    return ImportedToken(f"sha256:{digest}", f"...{key[-4:]}", token=token)


_SCHEMES: Final[dict[str, tuple[tuple[str, ...], Callable[..., ImportedToken]]]] = {
    "usesend": (("clientId", "hash"), _usesend),
    "sha256": (("hash",), _sha256),
    "sha512": (("hash",), _sha512),
    "sanctum": (("tokenId", "hash"), _sanctum),
    "knox": (("tokenKey", "hash"), _knox),
    "django": (("prefix", "hash"), _django),
    "argon2": (("prefix", "hash"), _argon2),
    "seam": (("prefix", "shortToken", "hash"), _seam),
    "raw": (("key",), _raw),
}
FIELDS: Final = frozenset(name for fields, _ in _SCHEMES.values() for name in fields)
"""Fields that only lines with a `scheme` may have."""


def _require_match(field: str, pattern: str, value: str) -> None:
    if not re.fullmatch(pattern, value):
        raise InvalidField(field, f"must match {pattern}")


def _partial(head: str) -> str:
    return f"{head if len(head) <= _MAX_SHOWN_LENGTH else ''}..."


def _digest(value: str, size: int) -> str:
    """The hexadecimal digits of a digest in hexadecimal or in base64 of either alphabet."""
    if re.fullmatch(rf"[0-9A-Fa-f]{{{2 * size}}}", value):
        digest = bytes.fromhex(value)
    else:
        digest = _decode_base64(value.rstrip("=").replace("-", "+").replace("_", "/"))
    if len(digest) != size:
        raise InvalidField("hash", f"must be {size} bytes, as hexadecimal digits or base64")
    if digest in (hashlib.sha256().digest(), hashlib.sha512().digest()):
        raise InvalidField("hash", "is the hash of an empty token")
    return digest.hex()


def _pbkdf2(value: str) -> str:
    match = _PBKDF2.fullmatch(value)
    if match is None or len(_decode_base64(match[2])) != hashlib.sha256().digest_size:
        shapes = "pbkdf2_sha256$…, sha512$$… or argon2$…"
        raise InvalidField("hash", f"must be one of Django's: {shapes}")
    if not _MIN_ITERATIONS <= int(match[1]) <= _MAX_ITERATIONS:
        bounds = f"{_MIN_ITERATIONS:,} to {_MAX_ITERATIONS:,}"
        raise InvalidField("hash", f"must have {bounds} iterations")
    return value


def _phc(value: str) -> str:
    match = _PHC.fullmatch(value)
    if match is None or not (_decode_base64(match[4]) and _decode_base64(match[5])):
        raise InvalidField("hash", "must be $argon2id$v=19$m=…,t=…,p=…$salt$hash")
    memory_kib, passes, lanes = (int(match[number]) for number in (1, 2, 3))
    if not 1 <= lanes <= _MAX_LANES or not 8 * lanes <= memory_kib <= _MAX_MEMORY_KIB:
        raise InvalidField("hash", f"must take 8p to {_MAX_MEMORY_KIB} KiB and 1 to 16 lanes")
    if not 1 <= passes <= _MAX_KIB_PASSES // memory_kib:
        raise InvalidField("hash", f"must take 1 pass or more, and m * t at most {_MAX_KIB_PASSES}")
    return value


def _decode_base64(text: str) -> bytes:
    """The bytes of unpadded base64; empty if the text is not base64 or not its canonical form."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:  # not only binascii.Error: the text may contain other characters than ASCII
        return b""
    return raw if base64.b64encode(raw).decode().rstrip("=") == text else b""
