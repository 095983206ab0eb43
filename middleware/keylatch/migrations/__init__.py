"""Setting up an empty store, and bringing an old one up to date: whoever comes first does it."""

import secrets as csprng
from importlib.resources import files
from typing import Final

from sqlalchemy import Connection, func, insert, inspect, select, text

from keylatch.errors import StoreIncompatible
from keylatch.schema import VERSION, meta, secrets

_SETUP_LOCK: Final = 0x6B65796C61746368  # "keylatch"


def is_up_to_date(connection: Connection) -> bool:
    """Whether the store is at this code's version: asked at every start, so without Alembic."""
    if not inspect(connection).has_table("keylatch_version"):
        return False
    version = connection.execute(text("SELECT version_num FROM keylatch_version")).scalar()
    if version is not None and version > VERSION:
        raise StoreIncompatible(
            f"the store is at version {version}, this keylatch knows up to {VERSION}",
            "upgrade keylatch on this host",
        )
    return version == VERSION


def bring_up_to_date(connection: Connection, now_ms: int) -> None:
    """Make the tables of an empty store, or those that an old one lacks, in this transaction."""
    if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE locks by itself
        connection.execute(select(func.pg_advisory_xact_lock(_SETUP_LOCK)))
    if is_up_to_date(connection):
        return  # somebody else was faster
    from alembic import command  # 0.3 s that only a new or an old store costs
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files(__name__)))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    if connection.execute(select(meta.c.seq)).first() is None:
        connection.execute(insert(meta).values(id=1, seq=1, pruned=0, epoch=csprng.token_hex(8)))
        connection.execute(
            insert(secrets),
            [
                {"kind": kind, "value": csprng.token_bytes(32), "created_at": now_ms}
                for kind in ("check", "pepper")
            ],
        )
