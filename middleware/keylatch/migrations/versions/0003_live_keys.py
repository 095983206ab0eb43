"""An index of the keys that are not deleted: there may be a hundred thousand that are."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    is_live = sa.text("deleted_at IS NULL")
    op.create_index(
        "keylatch_live_keys_of_organization",
        "keylatch_keys",
        ["organization_id", "created_seq"],
        sqlite_where=is_live,
        postgresql_where=is_live,
    )
