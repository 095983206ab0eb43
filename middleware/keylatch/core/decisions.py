"""What is known of a key, what is wanted of it, and the pure decision between the two.

The law of this file: no I/O, no clock, no lock. Time comes in as an argument, in milliseconds
since the Unix epoch (UTC).
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Final, NoReturn, TypeAlias

from starlette.authentication import AuthCredentials, BaseUser

from keylatch.core.timestamps import datetime_of

FULL: Final = "FULL"
"""The permission that may do everything."""
PERMISSION_PATTERN: Final = r"[A-Z][A-Z0-9_]{0,31}"
"""What a permission looks like, as a regular expression for the whole word."""
PREVIOUS_SUFFIX: Final = ":previous"
"""Behind a key's id: the secret before its last rotation."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the store knows it, without its hash. Times are milliseconds since the epoch."""

    id: str
    organization_id: str
    name: str
    permission: str
    environment: str
    partial_token: str
    active: bool
    organization_active: bool
    created_at: int
    updated_at: int
    last_used: int | None = None
    expires_at: int | None = None
    deleted_at: int | None = None
    revoked_reason: str | None = None
    metadata: str | None = None
    """A JSON object."""
    locator: str | None = None
    """How a token that was made elsewhere finds its key."""
    rotated_at: int | None = None
    previous_partial_token: str | None = None
    previous_expires_at: int | None = None
    """When the secret before the last rotation ends."""
    previous_last_used: int | None = None
    previous_rotated_at: int | None = None
    """`rotated_at` of the secret before the last rotation."""
    created_by: str | None = None
    """Id of the key that created it, or an operator (`AuditEvent.actor`); None: not recorded."""

    def grace_ends_at(self, now_ms: float) -> int | None:
        """When the secret before the last rotation ends; None: it has ended, or there is none."""
        ends_at = self.previous_expires_at
        return ends_at if ends_at is not None and ends_at > now_ms else None


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """What somebody did, as the audit log has it.

    Args:
        id: a number that grows.
        at_ms: milliseconds since the epoch.
        actor: a key's id, or `cli:` and an account, or `operator`.
        action: such as `key.create`.
        organization_id: whose key or organisation it was done to; None: the store.
        key_id: the key, if it was one.
        details: what was changed to what. Never a secret.
    """

    id: int
    at_ms: int
    actor: str
    action: str
    organization_id: str | None
    key_id: str | None
    details: Mapping[str, Any]

    @property
    def at(self) -> datetime:
        """When it was done."""
        return datetime_of(self.at_ms)


class Principal(BaseUser):
    """Who calls: what an app finds in `request.user` after a key was accepted.

    All requests with a key share one, so it cannot be changed.
    """

    __slots__ = (  # noqa: RUF023
        "key_id",
        "key_name",
        "organization_id",
        "permission",
        "environment",
        "secret_version",
    )

    key_id: str
    key_name: str
    organization_id: str
    permission: str
    environment: str
    secret_version: int | None
    """By which of the key's secrets the caller was authenticated: when that was made, as
    `secret_version_of`; None: by something else than a secret, such as a proxy's headers."""

    def __init__(
        self,
        key_id: str,
        key_name: str,
        organization_id: str,
        permission: str,
        environment: str,
        secret_version: int | None = None,
    ) -> None:
        set_attribute = object.__setattr__
        set_attribute(self, "key_id", key_id)
        set_attribute(self, "key_name", key_name)
        set_attribute(self, "organization_id", organization_id)
        set_attribute(self, "permission", permission)
        set_attribute(self, "environment", environment)
        set_attribute(self, "secret_version", secret_version)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a principal is shared by all requests with its key")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a principal is shared by all requests with its key")

    def __reduce__(self) -> tuple[type["Principal"], tuple[str | int | None, ...]]:
        return Principal, tuple(getattr(self, field) for field in Principal.__slots__)

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return self.key_name

    @property
    def identity(self) -> str:
        return self.key_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Principal) and all(
            getattr(self, field) == getattr(other, field) for field in _COMPARED_FIELDS
        )

    def __hash__(self) -> int:
        return hash(self.key_id)

    def __repr__(self) -> str:
        return f"<Principal {self.key_id} of {self.organization_id}: {self.permission}>"


class Scopes(tuple[str, ...]):
    """The scopes of a principal, as Starlette's `@requires` asks for them.

    A FULL key contains every scope, because FULL may do everything.
    """

    __slots__ = ()

    def __contains__(self, scope: object) -> bool:
        return super().__contains__(FULL) or super().__contains__(scope)


class Credentials(AuthCredentials):
    """What Starlette expects in `scope["auth"]`. All requests with a permission share one, so it
    cannot be changed."""

    def __init__(self, permission: str) -> None:
        self.__dict__["scopes"] = Scopes(("authenticated", permission))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("credentials are shared by all requests with their permission")


@functools.lru_cache(maxsize=1024)
def credentials_of(permission: str) -> AuthCredentials:
    """What a principal with this permission may do."""
    return Credentials(permission)


_COMPARED_FIELDS: Final = Principal.__slots__[:-1]


def secret_version_of(record: KeyRecord, is_previous: bool = False) -> int:
    """Which of a key's secrets one is: when it was made by a rotation, in milliseconds since the
    epoch and never twice the same for a key; 0: the key was created with it."""
    rotated_at = record.previous_rotated_at if is_previous else record.rotated_at
    return rotated_at or 0


def principal_of(record: KeyRecord, is_previous: bool = False) -> Principal:
    """The principal that a request with this key becomes; `is_previous`: it came with the secret
    before the last rotation."""
    # Drivers make new strings for every row, and 50,000 keys in L1 have few different ones.
    return Principal(
        record.id,
        record.name,
        sys.intern(record.organization_id),
        sys.intern(record.permission),
        sys.intern(record.environment),
        secret_version_of(record, is_previous),
    )


class Reason(Enum):
    """Why a request is refused. Many reasons inside; outside few answers (`refusals`)."""

    MISSING = "no credential was sent"
    MALFORMED = "the Authorization header is ambiguous or malformed"
    FORGED = "the token was not minted by this store"
    UNKNOWN = "no such key"
    WRONG_SECRET = "the secret does not belong to the key"  # noqa: S105
    REVOKED = "the key was deleted"
    DISABLED = "the key is disabled"
    ORGANIZATION_DISABLED = "the organisation is disabled"
    EXPIRED = "the key has expired"
    WRONG_ENVIRONMENT = "the key is for another environment"
    INSUFFICIENT_SCOPE = "the key's permission does not suffice"
    UNAVAILABLE = "the store cannot answer"
    BUSY = "too many hashes are waiting"


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a request asks of a key.

    Args:
        permissions: those that suffice, any one of them; None: every valid key will do.
        scope: what to name in the challenge of a refusal (RFC 6750 section 3).
        environment: the only one whose keys are welcome; None: every one.
        is_use: whether somebody calls with the key, and it does not merely keep something open.
        is_final: whether this is all that suffices. Where more may, and finding out costs
            something, a key that is good and not enough is `DeferredDeny`.
    """

    permissions: frozenset[str] | None = None
    scope: str = FULL
    environment: str | None = None
    is_use: bool = True
    is_final: bool = True

    @classmethod
    def all_of(cls, permissions: Sequence[str]) -> "Requirement":
        """Demands that add up: a key must satisfy each; FULL satisfies all."""
        if not permissions:
            return ANY_KEY
        distinct = set(permissions)
        if len(distinct) > _MAX_CHALLENGE_SCOPES:
            return ONLY_FULL
        sufficient = {FULL} | (distinct if len(distinct) == 1 else set())
        return cls(frozenset(sufficient), " ".join(sorted(distinct)))


ANY_KEY: Final = Requirement()
ONLY_FULL: Final = Requirement(frozenset((FULL,)), FULL)
_MAX_CHALLENGE_SCOPES: Final = 8  # more of them would make a header that proxies refuse


@dataclass(frozen=True, slots=True)
class Allow:
    """The request may pass, as this principal.

    Args:
        principal: who calls.
        expires_at: when the key ends, in milliseconds since the epoch; None: it does not.
    """

    principal: Principal
    expires_at: int | None = None
    credentials: AuthCredentials = field(init=False, compare=False, repr=False)
    """What Starlette expects in `scope["auth"]`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "credentials", credentials_of(self.principal.permission))


@dataclass(frozen=True, slots=True)
class Deny:
    """The request may not pass. `scope` names what would have sufficed, where that is why."""

    reason: Reason
    scope: str = ""


@dataclass(frozen=True, slots=True)
class DeferredDeny(Deny):
    """The key is good, and its permission does not suffice by what was wanted so far.

    Nothing is counted until it is settled; whoever does not know the word refuses.

    Args:
        decide: evaluates and counts, by all that suffices; from any thread, and once.
    """

    decide: "Callable[[Requirement], Decision]" = field(kw_only=True, compare=False, repr=False)


Decision: TypeAlias = Allow | Deny

ClientGetter: TypeAlias = "Callable[[], tuple[str | None, str | None]]"
"""Says whence a request came: address and user agent, by the server's word."""


def unusable_reason(record: KeyRecord, now_ms: float, environment: str | None) -> Reason | None:
    """What makes the key unusable for everything, if anything does.

    Args:
        record: the key.
        now_ms: the time to judge its expiry at.
        environment: the only environment whose keys are welcome; None: all of them.
    """
    if record.deleted_at is not None:
        return Reason.REVOKED
    if not record.active:
        return Reason.DISABLED
    if not record.organization_active:
        return Reason.ORGANIZATION_DISABLED
    if record.expires_at is not None and record.expires_at <= now_ms:
        return Reason.EXPIRED
    if environment is not None and record.environment != environment:
        return Reason.WRONG_ENVIRONMENT
    return None


def missing_scope(permission: str, requirement: Requirement) -> Deny | None:
    """The refusal for a usable key whose permission does not suffice, or None if it does."""
    if requirement.permissions is None or permission in requirement.permissions:
        return None
    return Deny(Reason.INSUFFICIENT_SCOPE, requirement.scope)


def evaluate(allow: Allow, now_ms: float, requirement: Requirement) -> Decision:
    """Decide on a key that was good when it was read: only time and the request are left."""
    if allow.expires_at is not None and allow.expires_at <= now_ms:
        return Deny(Reason.EXPIRED)
    if requirement.environment not in (None, allow.principal.environment):
        return Deny(Reason.WRONG_ENVIRONMENT)
    return missing_scope(allow.principal.permission, requirement) or allow
