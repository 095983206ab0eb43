"""The tables, once for both databases. Times are milliseconds since the Unix epoch (UTC).

`migrations/` makes them; a test holds the two against each other. The names carry a prefix
because a PostgreSQL database is often shared with the application.
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

VERSION: Final = "0006"
"""The newest migration: what a store must be at for this code to use it."""

metadata: Final = MetaData()

_IS_LIVE: Final = text("deleted_at IS NULL")
_HAS_LOCATOR: Final = text("locator IS NOT NULL")
_HAS_CREATOR: Final = text("created_by IS NOT NULL")

meta: Final = Table(
    "keylatch_meta",
    metadata,
    Column("id", Integer, primary_key=True),
    # A counter row and not a SEQUENCE: sequences commit out of order, and whoever polls for
    # "newer than what I saw" would silently skip the row that committed late.
    Column("seq", BigInteger, nullable=False),
    Column("pruned_seq", BigInteger, nullable=False),
    Column("epoch", String(32), nullable=False),
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
    # How the token of a key that was imported from elsewhere finds it; ours hold the id.
    Column("locator", String(160)),
    # The secret before the last rotation: good until its grace ends.
    Column("rotated_at", BigInteger),
    Column("previous_hash", String(255)),
    Column("previous_partial_token", String(32)),
    Column("previous_expires_at", BigInteger),
    Column("previous_last_used", BigInteger),
    Column("previous_rotated_at", BigInteger),
    Column("created_by", String(100)),  # a key's id, or an operator as in the audit log
    # Only of those that have one: made on a large table, it reads and sorts nothing else.
    Index(
        "keylatch_keys_by_locator",
        "locator",
        unique=True,
        sqlite_where=_HAS_LOCATOR,
        postgresql_where=_HAS_LOCATOR,
    ),
    Index("keylatch_keys_of_organization", "organization_id", "created_seq"),
    # Deleted keys stay for ever; a list of those that are live must not wade through them.
    Index(
        "keylatch_live_keys_of_organization",
        "organization_id",
        "created_seq",
        sqlite_where=_IS_LIVE,
        postgresql_where=_IS_LIVE,
    ),
    # A key for another environment than `live` lists only the keys of its own.
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
    # Whether it may be primary. A pending secret is not, until every process has loaded it.
    Column("enabled", Boolean, nullable=False, server_default=true()),
)

NO_ID: Final = ""
"""The organisation of keys that are not there. An invalidation that names it makes everybody look
anew for what they remember as absent, and leaves all that is known of keys that exist as it is."""
STORE_SECRETS_ID: Final = "*"
"""The organisation of the store's own secrets, which no key belongs to. Secrets are remembered like
anything else: with `as_of`, and read again after an invalidation that names it."""

invalidations: Final = Table(
    "keylatch_invalidations",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("key_id", String(64)),
    Column("organization_id", String(64)),
    Column("at", BigInteger, nullable=False),
)

members: Final = Table(
    "keylatch_members",
    metadata,
    Column("id", String(32), primary_key=True),
    # Advances with every lease that is granted: whoever sees it stand still for longer than a
    # lease lasts knows that this member holds none.
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
