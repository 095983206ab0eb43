"""`keylatch backup`, `restore` and `revocations`: for the day on which a store is lost.

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
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.settings import Settings
from keylatch.storage.keys import InactiveKey
from keylatch.storage.store import Found, file_of
from keylatch_sidecar.api.schemas import iso
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import LeaseOption, RedisOption, StoreOption
from keylatch_sidecar.cli.session import account, keyring_of, with_engine
from keylatch_sidecar.operations.backup import BackupError, create_backup, restore_backup

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def backup(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to make.")],
    store: StoreOption = None,
) -> None:
    """Copy a SQLite store while everybody works. It holds hashes and secrets: keep it like them."""
    source = _sqlite_file(store, "pg_dump makes backups of PostgreSQL")
    if not source.exists():
        output.fail(f"there is no {source}", "is KEYLATCH_STORE right?", output.ERROR)
    try:
        count = create_backup(source, path.absolute())
    except BackupError as error:
        output.fail(error.message, error.hint, output.REFUSED)
    output.stderr.print(f"Wrote {path}: {count:,} keys.", soft_wrap=True)


def restore(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="What keylatch backup made.")],
    store: StoreOption = None,
) -> None:
    """Put a backup of a SQLite store in its place; nobody has to be stopped.

    What was revoked or disabled since the backup stays so, if the present store can be read. Keys
    that were made since are gone.
    """
    target = _sqlite_file(store, "pg_restore, then keylatch revocations apply")
    if not path.is_file():
        output.fail(f"there is no {path}", "keylatch backup makes one", output.ERROR)
    try:
        report = restore_backup(path.absolute(), target, int(time.time() * 1000), account())
    except BackupError as error:
        output.fail(error.message, error.hint, output.REFUSED)
    output.stderr.print(f"Restored {target} from {path}.", soft_wrap=True)
    if not report.compared:
        output.stderr.print(
            "The store that it replaced could not be read: keys that were revoked since the backup"
            " are active again. keylatch revocations apply FILE revokes those that keylatch"
            " revocations export had listed.",
            soft_wrap=True,
        )
    _print("revoked or disabled since, and kept so", report.revoked_again)
    _print("organisations disabled since, and kept so", report.disabled_again)
    _print("given another permission, expiry or secret since: look at them", report.reverted)
    _print("made since, and gone", report.lost)


def export_revocations(store: StoreOption = None) -> None:
    """List all keys that were revoked or disabled, one JSON object a line.

    Kept elsewhere and made often, it is what tells after a restore which keys must not live again.
    """

    async def run(engine: Engine) -> Sequence[InactiveKey]:
        return await engine.store.keys.inactive()

    for each in with_engine(Settings.load(store=store, redis=""), run):
        at = None if each.deleted_at is None else iso(each.deleted_at)
        sys.stdout.write(json.dumps({"id": each.key_id, "revokedAt": at}) + "\n")


def apply_revocations(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="What keylatch revocations export printed."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
    store: StoreOption = None,
    redis: RedisOption = None,
    lease: LeaseOption = None,
) -> None:
    """After a restore by other means: revoke again what FILE lists, and clear all caches.

    Cached entries in all processes and in Redis become invalid. Keys of FILE that are active again
    are listed on standard output and revoked (or disabled, if they were only that).
    """
    listed = _read_export(file) if file is not None else {}

    async def run(engine: Engine) -> list[str]:
        keyring = await keyring_of(engine)
        reactivated = []
        for key_id, was_revoked in listed.items():
            found = await engine.store.keys.find(key_id)
            if not isinstance(found, Found) or found.record.deleted_at is not None:
                continue
            if not found.record.active and not was_revoked:
                continue
            reactivated.append(key_id)
            if not dry_run:
                owner = found.record.organization_id
                if was_revoked:
                    await keyring.delete(owner, key_id)
                else:
                    await keyring.change(owner, key_id, active=False)
        if not dry_run:
            current = await engine.store.invalidations.since(MAX_SEQ)
            await engine.store.invalidations.start_new_epoch(
                current.epoch, current.seq, int(time.time() * 1000)
            )
        return reactivated

    revived = with_engine(Settings.load(store=store, redis=redis, lease=lease), run)
    for key_id in revived:
        sys.stdout.write(key_id + "\n")
    outcome = "are active again" if dry_run else "were active again and are revoked"
    output.stderr.print(f"{len(revived):,} of {len(listed):,} keys {outcome}.")


def _read_export(file: Path) -> dict[str, bool]:
    """Key ids, and whether they were revoked and not only disabled."""
    keys: dict[str, bool] = {}
    number = 0
    try:
        with sys.stdin if str(file) == "-" else file.open() as lines:
            for line in lines:
                number += 1
                entry = json.loads(line)
                if not _ID.fullmatch(entry["id"]):
                    raise ValueError
                keys[entry["id"]] = entry["revokedAt"] is not None
    except OSError as error:
        output.fail(f"cannot read {file}: {error.strerror}", "another FILE", output.ERROR)
    except (ValueError, TypeError, KeyError):
        message = f"line {number} is not one of keylatch revocations export"
        output.fail(message, "nothing was changed", output.ERROR)
    return keys


def _sqlite_file(store: str | None, hint: str) -> Path:
    file = file_of(Settings.load(store=store).store)
    if file is None:
        output.fail("this is for SQLite stores", hint, output.ERROR)
    return file


def _print(what: str, names: Sequence[str]) -> None:
    if names:
        output.stderr.print(f"{len(names):,} {what}: {' '.join(names)}", soft_wrap=True)
