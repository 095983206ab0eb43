"""${message}"""

from alembic import op
import sqlalchemy as sa

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
waiting = ""  # who waits meanwhile, and how long with a million keys


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
