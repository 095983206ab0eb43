"""Members: the processes that hold leases."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
blocks = "nothing"


def upgrade() -> None:
    op.create_table(
        "keylatch_members",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("grants", sa.BigInteger, nullable=False),
        sa.Column("acked_seq", sa.BigInteger, nullable=False),
        sa.Column("joined_at", sa.BigInteger, nullable=False),
    )
