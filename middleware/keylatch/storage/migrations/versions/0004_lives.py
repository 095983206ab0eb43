"""Columns and tables for rotation, imported keys, metadata, usage and the audit log; and pending
secrets, which are not used until every process has loaded them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
blocks = "every use of the store while it reads all keys once: 0.4 s for a million keys"

# All may be NULL, so that a large table is not rewritten.
_OF_KEYS = (
    ("revoked_reason", sa.String(200)),
    ("metadata", sa.Text),
    ("locator", sa.String(160)),
    ("rotated_at", sa.BigInteger),
    ("previous_hash", sa.String(255)),
    ("previous_partial_token", sa.String(32)),
    ("previous_expires_at", sa.BigInteger),
    ("previous_last_used", sa.BigInteger),
)


def upgrade() -> None:
    for name, kind in _OF_KEYS:
        op.add_column("keylatch_keys", sa.Column(name, kind))
    has_locator = sa.text("locator IS NOT NULL")
    op.create_index(
        "keylatch_keys_by_locator",
        "keylatch_keys",
        ["locator"],
        unique=True,
        sqlite_where=has_locator,
        postgresql_where=has_locator,
    )
    op.create_table(
        "keylatch_usage",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("outcome", sa.String(32), primary_key=True),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
    op.create_index("keylatch_usage_by_day", "keylatch_usage", ["day"])
    op.create_table(
        "keylatch_clients",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("address", sa.String(64)),
        sa.Column("agent", sa.String(64)),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
    op.create_index("keylatch_clients_by_time", "keylatch_clients", ["seen_at"])
    op.create_table(
        "keylatch_audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(100), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("organization_id", sa.String(64)),
        sa.Column("key_id", sa.String(64)),
        sa.Column("details", sa.Text),
    )
    op.create_index("keylatch_audit_of_organization", "keylatch_audit", ["organization_id", "id"])
    op.add_column(
        "keylatch_secrets", sa.Column("makes", sa.Boolean, nullable=False, server_default=sa.true())
    )
