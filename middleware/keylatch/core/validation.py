"""Validates the values of keys, and which rights a key may grant.

The law of this file: no I/O, no clock. Every error names the wrong field; none repeats its value.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from keylatch.core.decisions import FULL, KeyRecord, Principal
from keylatch.core.keys import Metadata
from keylatch.core.timestamps import milliseconds_of
from keylatch.core.tokens import ENVIRONMENT_PATTERN, redact_tokens
from keylatch.errors import InvalidValue, NotPermitted

MAX_NAME_LENGTH: Final = 100
MAX_REASON_LENGTH: Final = 200
MAX_METADATA_BYTES: Final = 4_096
ORGANIZATION_PATTERN: Final = r"[A-Za-z0-9_-]{1,64}"
LIVE: Final = "live"
MAX_GRACE_SECONDS: Final = 366 * 86_400

_DURATION_PATTERN: Final = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_UNIT_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
# The year 9999 is the last that ISO 8601 writes with four digits.
_MAX_EXPIRY_MS: Final = 253_402_300_799_999

# Unicode categories that a name must not contain: controls, surrogates, line separators.
_FORBIDDEN_CATEGORIES: Final = frozenset(("Cc", "Cs", "Zl", "Zp"))
# Unicode TR 36: these display a name as a different one.
_BIDI_CONTROLS: Final = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key to create; see `Keyring.create`."""

    organization_id: str
    name: str
    permission: str = FULL
    environment: str = LIVE
    expires_at: datetime | None = None
    metadata: Metadata | None = None


class KeyValidator:
    """Validates new keys and changes.

    Args:
        permissions: the permissions that a key can have.
        environments: the environments that a key can have; empty: every well-formed word.
    """

    def __init__(self, permissions: Collection[str], environments: Collection[str]) -> None:
        self._grantable = permissions
        self._environments = environments

    def validate(self, new_key: NewKey, now_ms: int) -> list[InvalidValue]:
        """All errors of a key to create."""
        checks: list[Callable[[], object]] = [
            lambda: _validate_pattern(
                "organization", ORGANIZATION_PATTERN, new_key.organization_id
            ),
            lambda: self.validate_environment(new_key.environment),
            lambda: validate_name(new_key.name),
            lambda: self.validate_permission(new_key.permission),
            lambda: validate_expiry(new_key.expires_at, now_ms),
            lambda: serialize_metadata(new_key.metadata),
        ]
        errors = []
        for check in checks:
            try:
                check()
            except InvalidValue as error:
                errors.append(error)
        return errors

    def validate_permission(self, permission: str) -> None:
        """Raises `InvalidValue` for a permission that a key cannot have."""
        if permission not in self._grantable:
            raise InvalidValue("permission", f"must be one of {', '.join(self._grantable)}")

    def validate_environment(self, environment: str) -> None:
        """Raises `InvalidValue` for an environment that a key cannot have."""
        _validate_pattern("environment", ENVIRONMENT_PATTERN, environment)
        if self._environments and environment not in self._environments:
            raise InvalidValue("environment", f"must be one of {', '.join(self._environments)}")


def validate_expiry(expires_at: datetime | None, now_ms: int) -> int | None:
    """The expiry in milliseconds since the epoch.

    Raises:
        InvalidValue: it is naive, or not in the future.
    """
    milliseconds = milliseconds_of(expires_at, "expiresAt")
    if milliseconds is not None and milliseconds <= now_ms:
        raise InvalidValue("expiresAt", "must lie in the future")
    return milliseconds


def parse_duration_ms(duration: str, field: str = "expiresIn") -> int:
    """Milliseconds of a duration such as `90d`, `12h`, `30m`, `2s` or `1w`.

    Raises:
        InvalidValue: it is not a duration.
    """
    match = _DURATION_PATTERN.fullmatch(duration)
    if match is None:
        raise InvalidValue(field, "must be a number and a unit (s, m, h, d, w), such as 90d")
    return int(match[1]) * _UNIT_SECONDS[match[2]] * 1000


def expiry_after(duration: str, now_ms: int, field: str = "expiresIn") -> int:
    """The end of a duration from now, in milliseconds since the epoch.

    Raises:
        InvalidValue: it is not a duration, or ends after the year 9999.
    """
    expires_at = now_ms + parse_duration_ms(duration, field)
    if expires_at > _MAX_EXPIRY_MS:
        raise InvalidValue(field, "must end before the year 10000")
    return expires_at


def validate_grace(grace: timedelta) -> int:
    """The grace of a rotation in milliseconds.

    Raises:
        InvalidValue: it is negative or longer than 366 days.
    """
    return grace_of(grace / timedelta(seconds=1)) // timedelta(milliseconds=1)


def grace_of(seconds: float) -> timedelta:
    """A grace that is given in seconds. Raises as `validate_grace`."""
    if not 0 <= seconds <= MAX_GRACE_SECONDS:
        raise InvalidValue("graceSeconds", f"must be from 0 to {MAX_GRACE_SECONDS}")
    return timedelta(seconds=seconds)


def validate_name(name: str) -> str:
    """The name without surrounding blanks.

    Raises:
        InvalidValue: it is empty, too long, or contains control characters or a token.
    """
    return _validate_text("name", name, MAX_NAME_LENGTH)


def validate_reason(reason: str | None) -> str | None:
    """The reason of a revocation without surrounding blanks.

    Raises:
        InvalidValue: it is empty, too long, or contains control characters or a token.
    """
    return None if reason is None else _validate_text("reason", reason, MAX_REASON_LENGTH)


def serialize_metadata(metadata: Metadata | None) -> str | None:
    """Metadata as it is stored: a JSON object of scalars.

    Raises:
        InvalidValue: it is nested, too large, or contains a token.
    """
    if metadata is None:
        return None
    if not all(_is_scalar(value) for value in metadata.values()):
        raise InvalidValue("metadata", "must hold strings, numbers, true, false and null only")
    text = json.dumps(dict(metadata), separators=(",", ":"))
    if len(text) > MAX_METADATA_BYTES:
        raise InvalidValue("metadata", f"must have at most {MAX_METADATA_BYTES} bytes as JSON")
    if redact_tokens(text) != text:
        raise InvalidValue("metadata", "must not hold a token: it is stored and shown")
    return text


def has_access_to_environment(by: Principal | KeyRecord, environment: str) -> bool:
    """Whether a key can see and change keys of an environment; keys for `live` can in all."""
    return by.environment in (LIVE, environment)


def check_may_grant(by: Principal | KeyRecord, permission: str, environment: str) -> None:
    """A key grants no more than it has: no other permission, and no key for `live`.

    Raises:
        NotPermitted: it would grant more.
    """
    if by.permission not in (FULL, permission):
        raise NotPermitted("a key cannot give more rights than its own")
    if not has_access_to_environment(by, environment):
        raise NotPermitted(f"a key for {by.environment} cannot manage one for {environment}")


def check_may_grant_until(by: KeyRecord, expires_at: int | None) -> None:
    """A key that expires grants no rights beyond its own expiry.

    Args:
        by: the key that grants.
        expires_at: when the rights end, in milliseconds since the epoch; None: never.

    Raises:
        NotPermitted: they would end later.
    """
    if by.expires_at is not None and (expires_at is None or expires_at > by.expires_at):
        raise NotPermitted("a key that expires cannot give rights that outlast it")


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _validate_text(field: str, text: str, max_length: int) -> str:
    text = text.strip()
    if not text:
        raise InvalidValue(field, "must not be empty or blank")
    if len(text) > max_length:
        raise InvalidValue(field, f"must have at most {max_length} characters")
    is_printable_ascii = text.isascii() and text.isprintable()  # as most are
    if not is_printable_ascii and any(
        unicodedata.category(c) in _FORBIDDEN_CATEGORIES or c in _BIDI_CONTROLS for c in text
    ):
        raise InvalidValue(field, "must not hold control characters")
    if redact_tokens(text) != text:
        raise InvalidValue(field, f"must not hold a token: {field}s are stored and shown")
    return text


def _validate_pattern(field: str, pattern: str, value: str) -> None:
    if not re.fullmatch(pattern, value):
        raise InvalidValue(field, f"must match {pattern}")
    if redact_tokens(value) != value:
        raise InvalidValue(field, "must not hold a token: it is stored and shown")
