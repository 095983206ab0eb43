"""A key, what a request requires of it, and the pure decision between the two.

The law of this file: no I/O, no clock, no lock. Time comes in as an argument, in milliseconds
since the Unix epoch (UTC).
"""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Any, Final, NoReturn, TypeAlias

from starlette.authentication import AuthCredentials, BaseUser

from keylatch.core.timestamps import datetime_of

FULL: Final = "FULL"
"""The permission that includes all others."""
PERMISSION_PATTERN: Final = r"[A-Z][A-Z0-9_]{0,31}"
"""A regular expression for the whole word."""
PREVIOUS_SUFFIX: Final = ":previous"
"""After a key id: the secret before the key's last rotation."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is stored, without its hash. Times are milliseconds since the epoch."""

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
    """How the token of an imported key finds the key; None: the key was not imported."""
    rotated_at: int | None = None
    previous_partial_token: str | None = None
    previous_expires_at: int | None = None
    """When the secret before the last rotation stops being accepted."""
    previous_last_used: int | None = None
    previous_rotated_at: int | None = None
    """`rotated_at` of the secret before the last rotation."""
    created_by: str | None = None
    """The id of the key, or the operator (`AuditEvent.actor`), that created it; None: unknown."""

    def grace_ends_at(self, now_ms: float) -> int | None:
        """When the previous secret stops being accepted; None: it is not accepted now."""
        ends_at = self.previous_expires_at
        return ends_at if ends_at is not None and ends_at > now_ms else None


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """An entry of the audit log.

    Args:
        id: increases with each event.
        at_ms: milliseconds since the epoch.
        actor: a key id, or `cli:` and an account, or `operator`.
        action: such as `key.create`.
        organization_id: the organisation of the changed key; None: the store was changed.
        key_id: the changed key, if any.
        details: the changed values. Never a secret.
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
    """Who a request acts as after its key was accepted: `request.user`.

    All requests with a key share one object, so it is immutable.
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
    """The secret that authenticated the request, as `secret_version_of`; None: no secret did, but
    for example a proxy's headers."""

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
    """The scopes of a principal, for Starlette's `@requires`; those of FULL contain every scope."""

    __slots__ = ()

    def __contains__(self, scope: object) -> bool:
        return super().__contains__(FULL) or super().__contains__(scope)


class Credentials(AuthCredentials):
    """Starlette's `scope["auth"]`. All requests with a permission share one object, so it is
    immutable."""

    def __init__(self, permission: str) -> None:
        self.__dict__["scopes"] = Scopes(("authenticated", permission))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("credentials are shared by all requests with their permission")


@functools.lru_cache(maxsize=1024)
def credentials_of(permission: str) -> AuthCredentials:
    """The credentials of a principal with this permission."""
    return Credentials(permission)


_COMPARED_FIELDS: Final = Principal.__slots__[:-1]


def secret_version_of(record: KeyRecord, is_previous: bool = False) -> int:
    """Identifies a secret of a key by the time of its rotation, in milliseconds since the epoch and
    unique within the key; 0: the key was created with it."""
    rotated_at = record.previous_rotated_at if is_previous else record.rotated_at
    return rotated_at or 0


def principal_of(record: KeyRecord, is_previous: bool = False) -> Principal:
    """The principal of a request with this key; `is_previous`: it was authenticated by the secret
    before the last rotation."""
    # Drivers create new strings for every row, and 50,000 keys in L1 have few different ones.
    return Principal(
        record.id,
        record.name,
        sys.intern(record.organization_id),
        sys.intern(record.permission),
        sys.intern(record.environment),
        secret_version_of(record, is_previous),
    )


class Reason(Enum):
    """Why a request is refused. `refusals` maps many reasons to few responses."""

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
    """What a request requires of a key.

    Args:
        permissions: those that suffice, any one of them; None: every valid key does.
        scope: the scope in the challenge of a refusal (RFC 6750 section 3).
        environment: the only environment whose keys are accepted; None: all of them.
        is_use: whether the check is a use of the key; False: it only keeps a connection open.
        is_final: whether no other permission suffices. If more may suffice and finding out takes
            the app's router, a valid key without these permissions gets `DeferredDeny`.
    """

    permissions: frozenset[str] | None = None
    scope: str = FULL
    environment: str | None = None
    is_use: bool = True
    is_final: bool = True

    @classmethod
    def all_of(cls, permissions: Sequence[str]) -> "Requirement":
        """All of these permissions; for none of them: any key.

        A key has one permission, so two different ones leave FULL, which includes all.
        """
        if not permissions:
            return ANY_KEY
        distinct = set(permissions)
        if len(distinct) > _MAX_CHALLENGE_SCOPES:
            return ONLY_FULL
        sufficient = {FULL} | (distinct if len(distinct) == 1 else set())
        return cls(frozenset(sufficient), " ".join(sorted(distinct)))

    @classmethod
    def intersection(cls, requirements: Iterable["Requirement"]) -> "Requirement":
        """What satisfies each of these; if only FULL does, the last one names the scope."""
        limited = [each for each in requirements if each.permissions is not None]
        if not limited:
            return ANY_KEY
        common = frozenset.intersection(*(each.permissions or frozenset() for each in limited))
        common -= {FULL}
        return cls.any_of(common) if common else replace(ONLY_FULL, scope=limited[-1].scope)

    @classmethod
    def any_of(cls, permissions: Iterable[str]) -> "Requirement":
        """Any one of these permissions, or FULL; for none of them: FULL."""
        return _any_of(frozenset(permissions))


@functools.lru_cache(maxsize=1024)  # `Policy` combines the permissions of rules for each request
def _any_of(permissions: frozenset[str]) -> Requirement:
    scope = " ".join(sorted(permissions))
    return Requirement(permissions | {FULL}, scope) if permissions else ONLY_FULL


ANY_KEY: Final = Requirement()
ONLY_FULL: Final = Requirement(frozenset((FULL,)), FULL)
_MAX_CHALLENGE_SCOPES: Final = 8  # with more, the header is too long for some proxies


@dataclass(frozen=True, slots=True)
class Allow:
    """The request is allowed, as this principal.

    Args:
        principal: who the request acts as.
        expires_at: when the key expires, in milliseconds since the epoch; None: never.
    """

    principal: Principal
    expires_at: int | None = None
    credentials: AuthCredentials = field(init=False, compare=False, repr=False)
    """Starlette's `scope["auth"]`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "credentials", credentials_of(self.principal.permission))


@dataclass(frozen=True, slots=True)
class Deny:
    """The request is refused. `scope` names what would have sufficed, if that is the reason."""

    reason: Reason
    scope: str = ""


@dataclass(frozen=True, slots=True)
class DeferredDeny(Deny):
    """The key is valid, and its permission does not suffice by the rules evaluated so far.

    Nothing is counted before `decide` is called; a caller that does not call it refuses.

    Args:
        decide: evaluates the final requirement and counts the decision; from any thread, once.
    """

    decide: "Callable[[Requirement], Decision]" = field(kw_only=True, compare=False, repr=False)


Decision: TypeAlias = Allow | Deny

ClientGetter: TypeAlias = "Callable[[], tuple[str | None, str | None]]"
"""Returns the client's address and user agent, as the server reports them."""


def unusable_reason(record: KeyRecord, now_ms: float, environment: str | None) -> Reason | None:
    """Why the key is refused for every request; None: it is not.

    Args:
        record: the key.
        now_ms: milliseconds since the epoch, for its expiry.
        environment: the only environment whose keys are accepted; None: all of them.
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
    """The refusal of a valid key whose permission does not suffice; None if it does."""
    if requirement.permissions is None or permission in requirement.permissions:
        return None
    return Deny(Reason.INSUFFICIENT_SCOPE, requirement.scope)


def evaluate(allow: Allow, now_ms: float, requirement: Requirement) -> Decision:
    """Decide on a key that was valid when it was read: only time and the request matter."""
    if allow.expires_at is not None and allow.expires_at <= now_ms:
        return Deny(Reason.EXPIRED)
    if requirement.environment not in (None, allow.principal.environment):
        return Deny(Reason.WRONG_ENVIRONMENT)
    return missing_scope(allow.principal.permission, requirement) or allow
