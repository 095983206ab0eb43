"""The quotas of an organisation's own keys: live keys, and changes in an hour.

The law of this file: it only reads. A change counts once its transaction holds the sequence row
(`invalidation_log.advance`), so it sees every change that was committed before, and of concurrent
changes no more commit than the quota allows (READ COMMITTED on PostgreSQL; SQLite has one writer).

A change that only takes access away is never checked: deleting, revoking, disabling, demoting, the
end of a rotation. Nor are changes by operators.
"""

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Select, case, func, literal, select

from keylatch.errors import QuotaExceeded
from keylatch.storage.schema import audit, keys

HOUR_MS: Final = 3_600_000
_KEY_PREFIX: Final = "key_"  # of an actor in the audit log that is a key
_REVOKING_ACTIONS: Final = (
    "key.delete",
    "key.rotate.cancel",
    "key.rotate.finish",
    "organization.revoke",
)


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits of each organisation; 0: none.

    Args:
        max_keys: live keys, disabled and expired ones included; checked when a key creates one.
        max_changes: changes by keys within an hour; checked when a key changes something.
    """

    max_keys: int = 0
    max_changes: int = 0


def check_quota(
    connection: Connection, organization_id: str, now_ms: int, quotas: Quotas, *, new_keys: int = 0
) -> None:
    """Raises `QuotaExceeded` unless a change that adds so many keys is within the limits."""
    check_changes(connection, organization_id, now_ms, quotas.max_changes, more=1)
    if new_keys:
        check_key_count(connection, organization_id, quotas.max_keys, more=new_keys)


def check_key_count(
    connection: Connection, organization_id: str, limit: int, more: int = 0
) -> None:
    """Raises `QuotaExceeded`, without a time to wait, if an organisation that gets `more` keys has
    more live keys than the limit (0: no limit)."""
    if limit and _live_keys(connection, organization_id, limit + 1) + more > limit:
        raise QuotaExceeded(
            f"The organisation may have {limit:,} API keys: delete those that it does not need",
            None,
            limit="keys",
        )


def check_changes(
    connection: Connection, organization_id: str, now_ms: int, limit: int, more: int = 0
) -> None:
    """Raises `QuotaExceeded` if an organisation's keys make more changes than the limit within an
    hour (0: no limit), with `more` of them. Changes that end access are not counted among these;
    but all together may be at most twice as many, or changes could be hidden behind deletions.
    """
    if not limit:
        return
    recent = _recent_changes(organization_id, now_ms - HOUR_MS, 2 * limit + 1)
    counted = recent.subquery()
    ended = func.coalesce(func.sum(counted.c.ends_access), 0)
    total, revoking = connection.execute(select(func.count(), ended).select_from(counted)).one()
    if total - revoking + more <= limit and total + more <= 2 * limit:
        return
    rows = connection.execute(recent).all()
    allowed_at = max(
        _allowed_at([row.at for row in rows if not row.ends_access], limit, more),
        _allowed_at([row.at for row in rows], 2 * limit, more),
    )
    raise QuotaExceeded(
        f"The organisation's API keys may make {limit:,} changes an hour",
        max(1, -(-(allowed_at - now_ms) // 1000)),
        limit="changes",
    )


def _allowed_at(times: list[int], limit: int, more: int) -> int:
    """When enough of these changes are an hour old for `more`; 0: now."""
    excess = len(times) + more - limit
    return sorted(times)[excess - 1] + HOUR_MS if excess > 0 else 0


def _live_keys(connection: Connection, organization_id: str, at_most: int) -> int:
    """How many live keys an organisation has, counted up to a number, in an index."""
    live = select(literal(1)).where(
        keys.c.organization_id == organization_id, keys.c.deleted_at.is_(None)
    )
    counted = select(func.count()).select_from(live.limit(at_most).subquery())
    found: int = connection.execute(counted).scalar_one()
    return found


def _recent_changes(organization_id: str, since: int, limit: int) -> Select[Any]:
    """The times of changes by keys, and whether they ended access, among the newest `limit` events
    of the organisation's audit log.

    No more events are read: an operator's import may write a million events in the same hour, and
    no change may have to read them all. While an operator writes more events than the keys, some of
    the keys' changes are not counted.
    """
    organization = audit.c.organization_id
    newest = (
        select(audit.c.at, audit.c.actor, audit.c.action)
        # With `=`, PostgreSQL may read the log of all organisations from its end, because it does
        # not know that a large organisation's events are far from there.
        .where(organization.between(organization_id, organization_id))
        .order_by(organization.desc(), audit.c.id.desc())
        .limit(limit)
        .subquery()
    )
    ends_access = case((newest.c.action.in_(_REVOKING_ACTIONS), 1), else_=0)
    return select(newest.c.at, ends_access.label("ends_access")).where(
        newest.c.at > since, newest.c.actor.startswith(_KEY_PREFIX, autoescape=True)
    )
