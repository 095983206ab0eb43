"""Gives each row of the invalidation log an identity, and says which rows revoke something."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
blocks = "changes of keys, while it writes up to 100,000 rows of the log"


def upgrade() -> None:
    for name in ("server_started", "server_since"):
        column = sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
        op.add_column("keylatch_meta", column)
    op.add_column("keylatch_invalidations", sa.Column("revokes", sa.String(8)))
    row_id = sa.Column("row_id", sa.BigInteger, nullable=False, server_default="0")
    op.add_column("keylatch_invalidations", row_id)
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    random = "(random() * 4611686018427387904)::bigint + 1" if is_postgresql else "abs(random())"
    log = sa.table("keylatch_invalidations", sa.column("seq"), sa.column("row_id"))
    op.execute(log.update().values(row_id=sa.literal_column(random)))
