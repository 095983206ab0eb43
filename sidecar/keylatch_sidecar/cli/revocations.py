"""`keylatch revocations export` and `apply`: carries revocations over a restore.

A restore with other tools re-activates keys that were revoked after the backup: the backup does
not contain those revocations. Export regularly and keep the file outside of the store.

Exit codes: 0 done, 2 wrong usage or no store.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from keylatch.engine import Engine
from keylatch.management.keyring import Keyring
from keylatch.revocation.invalidations import MAX_SEQ
from keylatch.settings import Settings
from keylatch.storage.keys import InactiveKey
from keylatch.storage.store import Found
from keylatch_sidecar.api.schemas import iso
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, setting_options
from keylatch_sidecar.cli.session import keyring_of, with_engine

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@setting_options("store")
def export(*, given: Given) -> None:
    """Write all revoked and disabled keys to standard output, as one JSON object per line."""

    async def run(engine: Engine) -> Sequence[InactiveKey]:
        return await engine.store.keys.inactive()

    for each in with_engine(Settings.load(**given, redis=""), run):
        at = None if each.deleted_at is None else iso(each.deleted_at)
        sys.stdout.write(json.dumps({"id": each.key_id, "revokedAt": at}) + "\n")


@setting_options("store", "redis", "lease")
def apply(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="File from keylatch revocations export."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the keys and change nothing.")
    ] = False,
    *,
    given: Given,
) -> None:
    """After a restore with other tools: revoke the keys in FILE again and clear all caches.

    Cached entries in all processes and in Redis become invalid. Keys in FILE that are active are
    listed on standard output and revoked, or disabled if the export has them as disabled.
    """
    exported = _read_export(file) if file is not None else {}

    async def run(engine: Engine) -> list[str]:
        owners = await _find_active(engine, exported)
        if not dry_run:
            keyring = await keyring_of(engine)
            await _deactivate(keyring, owners, exported)
            current = await engine.store.invalidations.since(MAX_SEQ)
            await engine.store.invalidations.start_new_epoch(
                current.epoch, current.seq, keyring.now_ms()
            )
        return list(owners)

    active = with_engine(Settings.load(**given), run)
    for key_id in active:
        sys.stdout.write(key_id + "\n")
    outcome = "are active" if dry_run else "were active and are revoked or disabled now"
    output.stderr.print(f"{len(active):,} of {len(exported):,} keys {outcome}.")


async def _find_active(engine: Engine, exported: Mapping[str, bool]) -> dict[str, str]:
    """Keys that have more rights than the export says, each with its organisation."""
    owners: dict[str, str] = {}
    for key_id, was_revoked in exported.items():
        found = await engine.store.keys.find(key_id)
        if not isinstance(found, Found) or found.record.deleted_at is not None:
            continue
        if found.record.active or was_revoked:
            owners[key_id] = found.record.organization_id
    return owners


async def _deactivate(
    keyring: Keyring, owners: Mapping[str, str], exported: Mapping[str, bool]
) -> None:
    for key_id, owner in owners.items():
        if exported[key_id]:
            await keyring.delete(owner, key_id)
        else:
            await keyring.change(owner, key_id, active=False)


def _read_export(file: Path) -> dict[str, bool]:
    """Key ids → whether the key was revoked (True) or only disabled."""
    keys: dict[str, bool] = {}
    number = 0
    try:
        with sys.stdin if str(file) == "-" else file.open() as stream:
            for text in stream:
                number += 1
                entry = json.loads(text)
                if not _ID.fullmatch(entry["id"]):
                    raise ValueError
                keys[entry["id"]] = entry["revokedAt"] is not None
    except OSError as error:
        output.fail(f"cannot read {file}: {error.strerror}", "another FILE", output.ERROR)
    except (ValueError, TypeError, KeyError):
        message = f"line {number} was not written by keylatch revocations export"
        output.fail(message, "nothing was changed", output.ERROR)
    return keys
