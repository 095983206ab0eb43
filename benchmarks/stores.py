"""Stores that a benchmark makes for itself, and the first key in them."""

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

sys.path.append(str(Path(__file__).parent.parent))

from tests.support.servers import PostgresServer, RedisServer

from keylatch.engine import Engine
from keylatch.management.keyring import Created
from keylatch.settings import Settings

__all__ = ["KINDS", "RedisServer", "auth_header_of", "create_store", "filled"]

KINDS: Final = ("sqlite", "postgresql")


@contextlib.contextmanager
def create_store(kind: str) -> Iterator[str]:
    """The URL of an empty store, until the end of the block.

    Args:
        kind: `sqlite` or `postgresql`; or the URL of one that is there.
    """
    logging.getLogger("keylatch").setLevel(logging.ERROR)  # what it warns of is not the point here
    if "://" in kind:
        yield kind
    elif kind == "postgresql":
        server = PostgresServer()
        try:
            yield server.new_database()
        finally:
            server.remove()
    else:
        with tempfile.TemporaryDirectory(prefix="keylatch-bench-") as folder:
            yield f"sqlite:///{folder}/keys.db"


async def filled(store: str, count: int = 1, hasher: str = "argon2id") -> list[Created]:
    """New keys of one organisation."""
    engine = Engine(Settings.load(store=store, redis="", hasher=hasher))
    keyring = await engine.keyring()
    keys = [await keyring.create("bench", f"key {number}") for number in range(count)]
    await engine.stop()
    return keys


def auth_header_of(store: str) -> str:
    """The header field that presents a new key."""
    (key,) = asyncio.run(filled(store))
    return f"Authorization: Bearer {key.token.reveal()}"
