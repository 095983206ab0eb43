"""`keylatch backup`, `restore`, `restored` and `keys ended`: for the day on which a store is lost.

Exit codes: 0 done, 1 nothing was done, 2 wrong usage or no store.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keylatch.engine import Engine
from keylatch.revocation.feed import END
from keylatch.settings import Settings
from keylatch.sql.lists import Ended
from keylatch.store import Found, file_of
from keylatch_sidecar import copies
from keylatch_sidecar.commands import terminal
from keylatch_sidecar.commands.command import account, keyring_of, with_engine
from keylatch_sidecar.commands.options import LeaseOption, RedisOption, StoreOption
from keylatch_sidecar.management.bodies import iso

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def backup(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to make.")],
    store: StoreOption = None,
) -> None:
    """Copy a SQLite store while everybody works. It holds hashes and secrets: keep it like them."""
    source = _file(store, "pg_dump makes backups of PostgreSQL")
    if not source.exists():
        terminal.fail(f"there is no {source}", "is KEYLATCH_STORE right?", terminal.UNUSABLE)
    try:
        count = copies.take(source, path.absolute())
    except copies.Unusable as error:
        terminal.fail(error.message, error.hint, terminal.REFUSED)
    terminal.words.print(f"Wrote {path}: {count:,} keys.", soft_wrap=True)


def restore(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="What keylatch backup made.")],
    store: StoreOption = None,
) -> None:
    """Put a backup of a SQLite store in its place; nobody has to be stopped.

    What was revoked or disabled since the backup stays so, if the present store can be read. Keys
    that were made since are gone.
    """
    target = _file(store, "pg_restore, then keylatch restored")
    if not path.is_file():
        terminal.fail(f"there is no {path}", "keylatch backup makes one", terminal.UNUSABLE)
    try:
        restored = copies.put_back(path.absolute(), target, int(time.time() * 1000), account())
    except copies.Unusable as error:
        terminal.fail(error.message, error.hint, terminal.REFUSED)
    terminal.words.print(f"Restored {target} from {path}.", soft_wrap=True)
    if not restored.compared:
        terminal.words.print(
            "The store that it replaced could not be read: keys that were revoked since the backup"
            " live again. keylatch restored FILE ends those that keylatch keys ended had listed.",
            soft_wrap=True,
        )
    _print("revoked or disabled since, and kept so", restored.ended_again)
    _print("organisations disabled since, and kept so", restored.disabled_again)
    _print("given another permission, expiry or secret since: look at them", restored.older)
    _print("made since, and gone", restored.lost)


def ended(store: StoreOption = None) -> None:
    """List all keys that were revoked or disabled, one JSON object a line.

    Kept elsewhere and made often, it is what tells after a restore which keys must not live again.
    """

    async def run(engine: Engine) -> Sequence[Ended]:
        return await engine.store.ended()

    for each in with_engine(Settings.load(store=store, redis=""), run):
        at = None if each.deleted_at is None else iso(each.deleted_at)
        sys.stdout.write(json.dumps({"id": each.key_id, "revokedAt": at}) + "\n")


def restored(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="What keylatch keys ended had printed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    lease: LeaseOption = None,
) -> None:
    """After a store was restored by other means: end again what had ended, and void all memory.

    Whatever processes and Redis remember is believed no more. Keys of FILE that live again are
    listed on standard output and revoked (or disabled, if they were only that).
    """
    told = _told(file) if file is not None else {}

    async def run(engine: Engine) -> list[str]:
        keyring = await keyring_of(engine)
        revived = []
        for key_id, was_revoked in told.items():
            found = await engine.store.find(key_id)
            if not isinstance(found, Found) or found.record.deleted_at is not None:
                continue
            if not found.record.active and not was_revoked:
                continue
            revived.append(key_id)
            if not dry_run:
                owner = found.record.organization_id
                if was_revoked:
                    await keyring.delete(owner, key_id)
                else:
                    await keyring.change(owner, key_id, active=False)
        if not dry_run:
            present = await engine.store.changes(END)
            await engine.store.renew(present.epoch, present.seq)
        return revived

    revived = with_engine(Settings.load(store=store, redis=redis, lease=lease), run)
    for key_id in revived:
        sys.stdout.write(key_id + "\n")
    done = "live again" if dry_run else "lived again and are ended"
    terminal.words.print(f"{len(revived):,} of {len(told):,} keys {done}.")


def _told(file: Path) -> dict[str, bool]:
    """Key ids, and whether they were revoked and not only disabled."""
    keys: dict[str, bool] = {}
    number = 0
    try:
        with sys.stdin if str(file) == "-" else file.open() as lines:
            for line in lines:
                number += 1
                told = json.loads(line)
                if not _ID.fullmatch(told["id"]):
                    raise ValueError
                keys[told["id"]] = told["revokedAt"] is not None
    except OSError as error:
        terminal.fail(f"cannot read {file}: {error.strerror}", "another FILE", terminal.UNUSABLE)
    except (ValueError, TypeError, KeyError):
        wrong = f"line {number} is none that keylatch keys ended prints"
        terminal.fail(wrong, "nothing was changed", terminal.UNUSABLE)
    return keys


def _file(store: str | None, otherwise: str) -> Path:
    file = file_of(Settings.load(store=store).store)
    if file is None:
        terminal.fail("this is for SQLite stores", otherwise, terminal.UNUSABLE)
    return file


def _print(what: str, names: Sequence[str]) -> None:
    if names:
        terminal.words.print(f"{len(names):,} {what}: {' '.join(names)}", soft_wrap=True)
