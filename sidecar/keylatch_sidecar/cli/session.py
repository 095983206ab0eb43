"""What a command does around its work: an engine for as long as it takes, and errors in words."""

import asyncio
import getpass
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from keylatch.authentication.hashing import Hasher
from keylatch.core.decisions import KeyRecord
from keylatch.core.validation import InvalidKeyState, InvalidValue
from keylatch.engine import Engine
from keylatch.errors import KeylatchError
from keylatch.management.keyring import Keyring
from keylatch.settings import Settings
from keylatch.storage.store import NotFound
from keylatch_sidecar.cli import output

T = TypeVar("T")

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def with_engine(settings: Settings, work: Callable[[Engine], Awaitable[T]]) -> T:
    """The result of work with an engine; ends with an error and a hint if there is none."""
    # A command checks no keys: new tokens get all processors.
    engine = Engine(settings, hasher=Hasher(settings.hasher, management_workers=os.cpu_count()))

    async def run() -> T:
        try:
            # A starting engine logs why it cannot and tries again later; this tells it now.
            await engine.store.open(int(time.time() * 1000))
            return await work(engine)
        finally:
            await engine.stop()

    try:
        return asyncio.run(run())
    except KeylatchError as error:
        output.fail(error.message, error.hint, output.ERROR)


def with_keyring(settings: Settings, work: Callable[[Keyring], Awaitable[T]]) -> T:
    """The result of work with a keyring; the audit log names the account that runs the command."""

    async def run(engine: Engine) -> T:
        return await work(await keyring_of(engine))

    try:
        return with_engine(settings, run)
    except InvalidValue as error:
        output.fail(str(error), "each command has --help", output.ERROR)


def with_key(
    settings: Settings,
    key_id: str,
    organization: str | None,
    work: Callable[[Keyring, KeyRecord], Awaitable[T | None]],
) -> T:
    """The result of work with the key of this id; ends where there is none."""

    async def run(engine: Engine) -> T | None:
        found = await find(engine, key_id, organization)
        return None if found is None else await work(await keyring_of(engine), found)

    try:
        return output.require_found(with_engine(settings, run))
    except InvalidValue as error:
        output.fail(str(error), "each command has --help", output.ERROR)
    except InvalidKeyState as error:
        output.fail(str(error), "keylatch keys show ID", output.REFUSED)


async def find(engine: Engine, key_id: str, organization: str | None) -> KeyRecord | None:
    """The key with this id: an operator needs no organisation to find it."""
    found = await engine.store.keys.find(key_id) if _ID.fullmatch(key_id) else None
    if found is None or isinstance(found, NotFound):
        return None
    return found.record if organization in (None, found.record.organization_id) else None


async def keyring_of(engine: Engine) -> Keyring:
    """The keyring, used by the account that runs the command."""
    return (await engine.keyring()).as_operator(account())


def account() -> str:
    """Who runs the command, as the audit log names them."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for it
        name = str(os.getuid())
    return f"cli:{name}"
