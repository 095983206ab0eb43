"""Keys as other systems make them: a token, and the fields of the line that imports it.

Written from what those systems store, with `hashlib` and `argon2` alone: keylatch's own reading of
their formats has no part in it.
"""

import base64
import hashlib
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from argon2 import PasswordHasher

LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ExternalKey:
    """A key of another system."""

    token: str
    import_fields: dict[str, Any] = field(repr=False)
    secret: str
    """The secret part of the token."""

    @property
    def with_wrong_secret(self) -> str:
        """The same token with another secret, which is found by the same public part."""
        other = "".join("e" if c == "d" else "d" for c in self.secret)
        return self.token.replace(self.secret, other)


def usesend() -> ExternalKey:
    client, secret = _random(10, string.ascii_lowercase + string.digits), secrets.token_hex(16)
    salt = secrets.token_hex(16)
    hashed = hashlib.scrypt(
        secret.encode(), salt=salt.encode(), n=16384, r=8, p=1, dklen=64, maxmem=2**26
    )
    line = {"scheme": "usesend", "clientId": client, "hash": f"{salt}:{hashed.hex()}"}
    return ExternalKey(f"us_{client}_{secret}", line, secret)


def unkey() -> ExternalKey:
    token = "3Z" + _random(22)
    digest = base64.b64encode(hashlib.sha256(token.encode()).digest()).decode()
    return ExternalKey(token, {"scheme": "sha256", "hash": digest}, token)


def better_auth() -> ExternalKey:
    token = _random(64, string.ascii_letters)
    digest = base64.urlsafe_b64encode(hashlib.sha256(token.encode()).digest()).decode()
    return ExternalKey(token, {"scheme": "sha256", "hash": digest.rstrip("=")}, token)


def sha256() -> ExternalKey:
    token = f"sk_{secrets.token_urlsafe(24)}"
    digest = hashlib.sha256(token.encode()).hexdigest()
    return ExternalKey(token, {"scheme": "sha256", "hash": digest.upper()}, token[3:])


def sha512() -> ExternalKey:
    token = f"{_random(40)}=="
    digest = hashlib.sha512(token.encode()).hexdigest()
    return ExternalKey(token, {"scheme": "sha512", "hash": digest}, token[:-2])


def sanctum() -> ExternalKey:
    number, secret = 1 + secrets.randbelow(10**9), _random(48)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    line = {"scheme": "sanctum", "tokenId": number, "hash": digest}
    return ExternalKey(f"{number}|{secret}", line, secret)


def knox() -> ExternalKey:
    token = secrets.token_hex(32)
    digest = hashlib.sha512(token.encode()).hexdigest()
    return ExternalKey(token, {"scheme": "knox", "tokenKey": token[:15], "hash": digest}, token)


def knox_4() -> ExternalKey:
    token = secrets.token_hex(32)
    digest = hashlib.sha512(bytes.fromhex(token)).hexdigest()
    return ExternalKey(token, {"scheme": "knox", "tokenKey": token[:8], "hash": digest}, token)


def django_pbkdf2() -> ExternalKey:
    prefix, secret, salt = _random(8), _random(32), _random(22)
    token = f"{prefix}.{secret}"
    made = hashlib.pbkdf2_hmac("sha256", token.encode(), salt.encode(), 1_500)
    hashed = f"pbkdf2_sha256$1500${salt}${base64.b64encode(made).decode()}"
    return ExternalKey(token, {"scheme": "django", "prefix": prefix, "hash": hashed}, secret)


def django_sha512() -> ExternalKey:
    prefix, secret = _random(8), _random(32)
    token = f"{prefix}.{secret}"
    hashed = "sha512$$" + hashlib.sha512(token.encode()).hexdigest()
    return ExternalKey(token, {"scheme": "django", "prefix": prefix, "hash": hashed}, secret)


def django_argon2() -> ExternalKey:
    prefix, secret = _random(8), _random(32)
    token = f"{prefix}.{secret}"
    hashed = "argon2" + PasswordHasher(1, 64, 2).hash(token)
    return ExternalKey(token, {"scheme": "django", "prefix": prefix, "hash": hashed}, secret)


def argon2() -> ExternalKey:
    prefix, secret = f"acme_{_random(6)}", _random(32)
    token = f"{prefix}_{secret}"
    hashed = PasswordHasher(1, 64, 1).hash(token)
    return ExternalKey(token, {"scheme": "argon2", "prefix": prefix, "hash": hashed}, secret)


def argon2_without_separator() -> ExternalKey:
    token = _random(40)
    hashed = PasswordHasher(1, 64, 1).hash(token)
    return ExternalKey(token, {"scheme": "argon2", "prefix": token[:8], "hash": hashed}, token[8:])


def seam() -> ExternalKey:
    short, secret = _random(8), _random(24)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    line = {"scheme": "seam", "prefix": "acme", "shortToken": short, "hash": digest}
    return ExternalKey(f"acme_{short}_{secret}", line, secret)


def raw() -> ExternalKey:
    token = secrets.token_hex(32)
    return ExternalKey(token, {"scheme": "raw", "key": token}, token[:-4])


MAKERS: dict[str, Callable[[], ExternalKey]] = {
    maker.__name__: maker
    for maker in (
        *(usesend, unkey, better_auth, sha256, sha512, sanctum, knox, knox_4, django_pbkdf2),
        *(django_sha512, django_argon2, argon2, argon2_without_separator, seam, raw),
    )
}


def _random(length: int, of: str = LETTERS) -> str:
    return "".join(secrets.choice(of) for _ in range(length))
