"""The tables, once for both databases. Times are milliseconds since the Unix epoch (UTC).

`migrations/` creates them; a test compares the two. The names have a prefix because a PostgreSQL
database is often shared with the application.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
    true,
)

VERSION: Final = "0007"
"""The newest migration: this code uses a store of this version only."""

metadata: Final = MetaData()

_IS_LIVE: Final = text("deleted_at IS NULL")
_HAS_LOCATOR: Final = text("locator IS NOT NULL")
_HAS_CREATOR: Final = text("created_by IS NOT NULL")

meta: Final = Table(
    "keylatch_meta",
    metadata,
    Column("id", Integer, primary_key=True),
    # A row and not a SEQUENCE: its values commit out of order, and a process that polls for
    # "newer than the last one" would silently skip a row that was committed late.
    Column("seq", BigInteger, nullable=False),
    Column("pruned_seq", BigInteger, nullable=False),
    Column("epoch", String(32), nullable=False),
    # PostgreSQL: when the server started that committed the last change, in microseconds, and since
    # when this server commits, in milliseconds. A server that takes over has another start time.
    Column("server_started", BigInteger, nullable=False, server_default="0"),
    Column("server_since", BigInteger, nullable=False, server_default="0"),
)

organizations: Final = Table(
    "keylatch_organizations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("active", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

keys: Final = Table(
    "keylatch_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("organization_id", ForeignKey(organizations.c.id), nullable=False),
    Column("name", String(100), nullable=False),
    Column("permission", String(32), nullable=False),
    Column("environment", String(16), nullable=False),
    Column("partial_token", String(32), nullable=False),
    Column("hash", String(255), nullable=False),
    Column("active", Boolean, nullable=False),
    Column("created_seq", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("last_used", BigInteger),
    Column("expires_at", BigInteger),
    Column("deleted_at", BigInteger),
    Column("revoked_reason", String(200)),
    Column("metadata", Text),  # a JSON object
    # Finds an imported key by its token; other tokens contain the key's id.
    Column("locator", String(160)),
    # The secret before the last rotation: accepted until its grace ends.
    Column("rotated_at", BigInteger),
    Column("previous_hash", String(255)),
    Column("previous_partial_token", String(32)),
    Column("previous_expires_at", BigInteger),
    Column("previous_last_used", BigInteger),
    Column("previous_rotated_at", BigInteger),
    Column("created_by", String(100)),  # a key's id, or an operator as in the audit log
    # Only of imported keys: to create it on a large table sorts nothing else.
    Index(
        "keylatch_keys_by_locator",
        "locator",
        unique=True,
        sqlite_where=_HAS_LOCATOR,
        postgresql_where=_HAS_LOCATOR,
    ),
    Index("keylatch_keys_of_organization", "organization_id", "created_seq"),
    # Deleted keys are kept for ever; a list of live keys must not read them.
    Index(
        "keylatch_live_keys_of_organization",
        "organization_id",
        "created_seq",
        sqlite_where=_IS_LIVE,
        postgresql_where=_IS_LIVE,
    ),
    # A key of another environment than `live` lists only the keys of its environment.
    Index("keylatch_keys_of_environment", "organization_id", "environment", "created_seq"),
    Index(
        "keylatch_keys_by_creator",
        "created_by",
        sqlite_where=_HAS_CREATOR,
        postgresql_where=_HAS_CREATOR,
    ),
)

secrets: Final = Table(
    "keylatch_secrets",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("value", LargeBinary, nullable=False),
    # When it was added, or enabled.
    Column("status_since", BigInteger, nullable=False),
    # False: pending, until every process has loaded it.
    Column("enabled", Boolean, nullable=False, server_default=true()),
)

NO_ID: Final = ""
"""The organisation of no key. An invalidation that names it invalidates every negative entry, and
no entry of a key that exists."""
STORE_SECRETS_ID: Final = "*"
"""The organisation of the store's own secrets, which no key has. Processes cache the secrets with
their `as_of` and load them again after an invalidation that names it."""

invalidations: Final = Table(
    "keylatch_invalidations",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("key_id", String(64)),
    Column("organization_id", String(64)),
    Column("at", BigInteger, nullable=False),
    # Random. Sequence numbers are given out again after a failover or a restore that lost the last
    # rows; equal row ids at a sequence number show that the histories are the same up to there.
    Column("row_id", BigInteger, nullable=False, server_default="0"),
    # What the change took away: `delete` (the key), `disable` (anything less); NULL: nothing.
    Column("revokes", String(8)),
)

members: Final = Table(
    "keylatch_members",
    metadata,
    Column("id", String(32), primary_key=True),
    # Advances with every grant: a member whose number has not changed for one lease period holds
    # no lease.
    Column("grants", BigInteger, nullable=False),
    Column("acked_seq", BigInteger, nullable=False),
    Column("joined_at", BigInteger, nullable=False),
)

usage: Final = Table(
    "keylatch_usage",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),  # since the epoch, UTC
    Column("outcome", String(32), primary_key=True),  # `allowed`, or the name of a reason
    Column("count", BigInteger, nullable=False),
    Index("keylatch_usage_by_day", "day"),
)

clients: Final = Table(
    "keylatch_clients",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("network", String(64)),
    Column("product", String(64)),
    Column("seen_at", BigInteger, nullable=False),
    Index("keylatch_clients_by_seen_at", "seen_at"),
)

audit: Final = Table(
    "keylatch_audit",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(100), nullable=False),
    Column("action", String(32), nullable=False),
    Column("organization_id", String(64)),
    Column("key_id", String(64)),
    Column("details", Text),  # a JSON object
    Column("environment", String(16)),  # of the key
    Index("keylatch_audit_of_organization", "organization_id", "id"),
    Index("keylatch_audit_of_environment", "organization_id", "environment", "id"),
    Index("keylatch_audit_of_key", "key_id", "id"),
)
