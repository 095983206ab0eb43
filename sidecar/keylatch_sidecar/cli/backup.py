"""`keylatch backup` and `restore`, for stores in a SQLite file.

Exit codes: 0 done, 1 nothing was changed, 2 wrong usage or no store.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from keylatch.errors import BackupError
from keylatch.settings import Settings
from keylatch.storage.store import file_of
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, setting_options
from keylatch_sidecar.cli.session import account
from keylatch_sidecar.operations.backup import (
    RestoreReport,
    create_backup,
    restore_backup,
)


@setting_options("store")
def backup(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Backup file to create.")],
    *,
    given: Given,
) -> None:
    """Back up a SQLite store while it is in use.

    The backup contains key hashes and the store's secrets: protect it like the store.
    """
    source = _sqlite_file(given, "pg_dump makes backups of PostgreSQL")
    if not source.exists():
        output.fail(f"{source} does not exist", "is KEYLATCH_STORE right?", output.ERROR)
    try:
        count = create_backup(source, path.absolute())
    except BackupError as error:
        output.fail(error.message, error.hint, output.REFUSED)
    output.stderr.print(f"Wrote {path}: {count:,} keys.")


@setting_options("store")
def restore(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File from keylatch backup.")],
    *,
    given: Given,
) -> None:
    """Replace a SQLite store by a backup; running processes need not be stopped.

    Keys and organisations that were revoked or disabled after the backup stay so, if the replaced
    store can be read. Keys that were created after the backup are lost.
    """
    target = _sqlite_file(given, "pg_restore, then keylatch revocations apply")
    if not path.is_file():
        output.fail(f"{path} is not a file", "keylatch backup creates one", output.ERROR)
    try:
        report = restore_backup(path.absolute(), target, int(time.time() * 1000), account())
    except BackupError as error:
        output.fail(error.message, error.hint, output.REFUSED)
    output.stderr.print(f"Restored {target} from {path}.")
    _print_report(report)


def _print_report(report: RestoreReport) -> None:
    if not report.compared:
        output.stderr.print(
            "The replaced store could not be read: keys that were revoked after the backup are"
            " active again. keylatch revocations apply FILE revokes those that are in an earlier"
            " keylatch revocations export."
        )
    _print_ids("Keys revoked or disabled after the backup, which stay so", report.revoked_again)
    _print_ids("Organisations disabled after the backup, which stay so", report.disabled_again)
    _print_ids(
        "Keys whose permission, expiry or secret is that of the backup again; review them",
        report.reverted,
    )
    _print_ids("Keys created after the backup, which are lost", report.lost)


def _print_ids(what: str, ids: Sequence[str]) -> None:
    if ids:
        output.stderr.print(f"{what} ({len(ids):,}): {' '.join(ids)}")


def _sqlite_file(given: Given, hint: str) -> Path:
    file = file_of(Settings.load(**given).store)
    if file is None:
        output.fail("the store is not a SQLite file", hint, output.ERROR)
    return file
