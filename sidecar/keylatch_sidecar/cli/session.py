"""Runs the work of a command with an engine or a keyring, and reports its errors."""

import asyncio
import getpass
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import KeyRecord
from keylatch.engine import Engine
from keylatch.errors import InvalidKeyState, InvalidValue, OperationalError
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings
from keylatch.storage.store import NotFound
from keylatch_sidecar.cli import output

T = TypeVar("T")

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def with_engine(settings: Settings, work: Callable[[Engine], Awaitable[T]]) -> T:
    """The result of the work; a `KeylatchError` ends the command with an error and a hint."""
    # A command hashes new tokens and checks almost none, so hashing may use all processors.
    engine = Engine(settings, hasher=Hasher(settings.hasher, management_workers=os.cpu_count()))

    async def run() -> T:
        try:
            # Raises why the store cannot be opened; `start` would log it and retry.
            await engine.store.open(int(time.time() * 1000))
            return await work(engine)
        finally:
            await engine.stop()

    try:
        return asyncio.run(run())
    except OperationalError as error:
        output.fail(error.message, error.hint, output.ERROR)


def with_keyring(settings: Settings, work: Callable[[Keyring], Awaitable[T]]) -> T:
    """The result of the work; audit events name the account that runs the command."""

    async def run(engine: Engine) -> T:
        return await work(await keyring_of(engine))

    try:
        return with_engine(settings, run)
    except InvalidValue as error:
        output.fail(str(error), "see --help of the command", output.ERROR)


def with_key(
    settings: Settings,
    key_id: str,
    organization: str | None,
    work: Callable[[Keyring, KeyRecord], Awaitable[T | None]],
) -> T:
    """The result of the work with this key; ends the command if there is no such key."""

    async def run(engine: Engine) -> T | None:
        found = await find(engine, key_id, organization)
        return None if found is None else await work(await keyring_of(engine), found)

    try:
        return output.require_found(with_engine(settings, run))
    except InvalidValue as error:
        output.fail(str(error), "see --help of the command", output.ERROR)
    except InvalidKeyState as error:
        output.fail(str(error), "keylatch keys show ID", output.REFUSED)


async def find(engine: Engine, key_id: str, organization: str | None) -> KeyRecord | None:
    """The key with this id, of any organisation unless one is given."""
    found = await engine.store.keys.find(key_id) if _ID.fullmatch(key_id) else None
    if found is None or isinstance(found, NotFound):
        return None
    return found.record if organization in (None, found.record.organization_id) else None


async def keyring_of(engine: Engine) -> Keyring:
    """A keyring whose audit events name the account that runs the command."""
    return (await engine.keyring()).as_operator(account())


def account() -> str:
    """The account that runs the command, as audit events name it."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # the user id has no name, as in many containers
        name = str(os.getuid())
    return f"cli:{name}"
