"""Renames columns, an index and a kind of secret after their content."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
blocks = "every use of the store, briefly, while it renames columns"

_COLUMNS = (
    ("keylatch_meta", "pruned", "pruned_seq"),
    ("keylatch_secrets", "makes", "enabled"),
    ("keylatch_secrets", "created_at", "status_since"),
    ("keylatch_clients", "address", "network"),
    ("keylatch_clients", "agent", "product"),
)


def upgrade() -> None:
    for table, old, new in _COLUMNS:
        op.alter_column(table, old, new_column_name=new)
    # At most one row per key that was used within 90 days.
    op.drop_index("keylatch_clients_by_time", "keylatch_clients")
    op.create_index("keylatch_clients_by_seen_at", "keylatch_clients", ["seen_at"])
    op.execute(sa.text("UPDATE keylatch_secrets SET kind = 'mac' WHERE kind = 'check'"))
