"""Creates the tables of an empty store and upgrades those of an old one, in one transaction."""

import secrets as csprng
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, func, insert, inspect, select, text

from keylatch.errors import StoreIncompatible
from keylatch.storage.schema import VERSION, meta, secrets

if TYPE_CHECKING:
    from alembic.config import Config

_SETUP_LOCK: Final = 0x6B65796C61746368  # "keylatch"
_LOCK_MILLISECONDS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Step:
    """A migration: its version, its purpose, and what it blocks while it runs."""

    version: str
    purpose: str
    blocks: str


def version_of(connection: Connection) -> str | None:
    """The version of the store; None: it is empty."""
    if not inspect(connection).has_table("keylatch_version"):
        return None
    version: str | None = connection.execute(
        text("SELECT version_num FROM keylatch_version")
    ).scalar()
    return version


def is_up_to_date(connection: Connection) -> bool:
    """Whether the store has this code's version. It is called at every start, so without Alembic.

    Raises:
        StoreIncompatible: the store has a newer version.
    """
    version = version_of(connection)
    _refuse_newer(version)
    return version == VERSION


def _refuse_newer(version: str | None) -> None:
    if version is not None and version > VERSION:
        raise StoreIncompatible(
            f"the store is at version {version}, this keylatch knows up to {VERSION}",
            "upgrade keylatch on this host",
        )


def upgrade(connection: Connection, now_ms: int) -> None:
    """Create or upgrade the tables in this transaction. One process does it, the others wait."""
    if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE locks by itself
        connection.execute(select(func.pg_advisory_xact_lock(_SETUP_LOCK)))
        # A migration that waits for a table behind a long transaction, such as a backup, blocks
        # every reader of that table that comes after it: so it gives up and is retried.
        connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_MILLISECONDS}"))
    if is_up_to_date(connection):
        return  # another process did it
    from alembic import command  # its import takes 0.3 s

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    if connection.execute(select(meta.c.seq)).first() is None:
        connection.execute(
            insert(meta).values(id=1, seq=1, pruned_seq=0, epoch=csprng.token_hex(8))
        )
        connection.execute(
            insert(secrets),
            [
                {"kind": kind, "value": csprng.token_bytes(32), "status_since": now_ms}
                for kind in ("mac", "pepper")
            ],
        )


def steps_after(version: str | None) -> Sequence[Step]:
    """The migrations of a store of that version, in order.

    Raises:
        StoreIncompatible: it is a newer version.
    """
    _refuse_newer(version)
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(_config())
    pending = [each for each in scripts.walk_revisions() if each.revision > (version or "")]
    return [
        Step(each.revision, " ".join(each.doc.split()), each.module.blocks)
        for each in reversed(pending)
    ]


def _config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files(__name__)))
    return config
