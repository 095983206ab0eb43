"""Records which key or operator created a key, and finds the audit log's entries of one key by an
index."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
waiting = "changes, while the audit log is indexed: 2 s for a million entries"


def upgrade() -> None:
    op.add_column("keylatch_keys", sa.Column("created_by", sa.String(100)))
    has_creator = sa.text("created_by IS NOT NULL")
    op.create_index(
        "keylatch_keys_by_creator",
        "keylatch_keys",
        ["created_by"],
        sqlite_where=has_creator,
        postgresql_where=has_creator,
    )
    op.create_index("keylatch_audit_of_key", "keylatch_audit", ["key_id", "id"])
