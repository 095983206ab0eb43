"""`keylatch keys import`: reads the file, prints each batch after its commit, and the totals.

Writing to standard output happens in a thread: it may block, and on PostgreSQL a process whose
event loop is blocked delays revocations, which wait for its lease.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TextIO, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keylatch.core.decisions import FULL
from keylatch.core.timestamps import milliseconds_of
from keylatch.core.validation import LIVE
from keylatch.management.keyring import Imported, Keyring, NewKey
from keylatch.settings import Settings
from keylatch_sidecar.api.schemas import iso
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import (
    EnvironmentOption,
    Given,
    OrganizationOption,
    PermissionOption,
    setting_options,
)
from keylatch_sidecar.cli.session import with_keyring
from keylatch_sidecar.importing.batches import (
    BatchFailed,
    CreatedBatch,
    ImportedBatch,
    ImportReport,
    count_to_hash,
    import_batches,
    preview,
)
from keylatch_sidecar.importing.file import FORMATS, Defaults, FileErrors, read

_STANDARD_INPUT: Final = Path("-")
_MAX_ERRORS_SHOWN: Final = 50
_ARGON2ID_SECONDS: Final = 0.025
_COLUMNS: Final = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)
# Bytes that are not UTF-8 become surrogates, which names may not contain; CSV needs line ends
# untranslated.
_DECODING_ERRORS: Final = "surrogateescape"
_LINE_ENDS: Final = ""


@setting_options("store", "redis", "prefix", "hasher")
def import_keys(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines or CSV; - reads standard input.")
    ],
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="jsonl or csv.", show_default="by file name, else jsonl"),
    ] = None,
    organization: OrganizationOption = "default",
    permission: PermissionOption = FULL,
    environment: EnvironmentOption = LIVE,
    from_line: Annotated[int, typer.Option(help="Skip the lines before this one.", min=1)] = 1,
    batch: Annotated[
        int, typer.Option(help="Number of keys per transaction.", min=1, max=10_000)
    ] = 1_000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and change nothing.")
    ] = False,
    *,
    given: Given,
) -> None:
    """Create a key for each line of a file and write their tokens to standard output.

    A line has a "name", and may have "organization", "permission", "environment" and "expiresAt";
    the options are the defaults. All errors in the file are reported before any key is created. A
    line with a "scheme" imports a key of another system, by its hash, or by its token with the
    scheme "raw"; the tokens of imported keys are not written.
    """
    settings = Settings.load(**given)
    file_format = _format_of(file, file_format)
    defaults = Defaults(organization, permission, environment)

    async def run(keyring: Keyring, stream: TextIO) -> str:
        rows = await asyncio.to_thread(
            read, stream, file_format, defaults, keyring.validate, from_line
        )
        if dry_run:
            await _print_preview(preview(keyring, rows, batch))
            return f"The file has {len(rows):,} keys; nothing was created."
        warn_of_hashing_cost(count_to_hash(rows), settings.hasher)
        return _summary(await _print_batches(import_batches(keyring, rows, batch), len(rows)))

    try:
        with _open_input(file) as stream:
            summary = with_keyring(settings, lambda keyring: run(keyring, stream))
    except FileErrors as errors:
        _exit_with_errors(errors)
    output.stderr.print(summary)


def _format_of(path: Path, given: str | None) -> str:
    if given is None:
        return "csv" if path.suffix.lower() == ".csv" else "jsonl"
    if given not in FORMATS:
        output.fail("there is no such format", " or ".join(FORMATS), output.ERROR)
    return given


def _open_input(path: Path) -> TextIO:
    if path == _STANDARD_INPUT:
        stream = cast(TextIOWrapper, sys.stdin)
        stream.reconfigure(encoding="utf-8", errors=_DECODING_ERRORS, newline=_LINE_ENDS)
        return stream
    try:
        return path.open(encoding="utf-8", errors=_DECODING_ERRORS, newline=_LINE_ENDS)
    except OSError as error:
        message = f"the file cannot be read: {error.strerror}"
        hint = "a file of JSON lines or CSV, or - for standard input"
        output.fail(message, hint, output.ERROR)


def _exit_with_errors(errors: FileErrors) -> NoReturn:
    for message in errors.messages[:_MAX_ERRORS_SHOWN]:
        output.print_error(message, "")
    more = len(errors.messages) - _MAX_ERRORS_SHOWN
    if more > 0:
        output.print_error(f"and {more:,} more mistakes", "")
    output.fail(
        "nothing was created", "correct these lines and import the file again", output.ERROR
    )


def warn_of_hashing_cost(keys: int, hasher: str) -> None:
    """Print how long argon2id will take, if that is more than a minute of one processor."""
    minutes = keys * _ARGON2ID_SECONDS / 60
    if hasher == "argon2id" and minutes > 1:
        output.stderr.print(
            f"argon2id takes about {minutes:,.0f} processor minutes for these keys; "
            "KEYLATCH_HASHER=sha256 is as safe for minted keys."
        )


async def _print_batches(
    batches: AsyncIterator[CreatedBatch | ImportedBatch], total: int
) -> ImportReport:
    console = output.stderr
    report = ImportReport()
    with Progress(
        *_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("creating keys", total=total)
        try:
            async for batch in batches:
                try:
                    await asyncio.to_thread(_print_batch, batch)
                except OSError as error:  # standard output is full or closed
                    progress.stop()
                    _exit_unwritten(batch, error.strerror)
                report.add(batch)
                progress.advance(task, len(batch.rows))
        except BatchFailed as error:
            progress.stop()
            message = f"{_lines(error.first_line, error.last_line)} were not created"
            hint = f"{error.hint}; continue with --from-line {error.first_line}"
            output.fail(f"{message}: {error.message}", hint, output.ERROR)
    return report


async def _print_preview(batches: AsyncIterator[ImportedBatch]) -> None:
    async for batch in batches:
        await asyncio.to_thread(_print_imported, batch, "new")


def _print_batch(batch: CreatedBatch | ImportedBatch) -> None:
    if isinstance(batch, CreatedBatch):
        _print_created(batch)
    else:
        _print_imported(batch, "imported")


def _print_created(batch: CreatedBatch) -> None:
    _write_lines(
        {"line": row.line, "id": key.record.id, "token": key.token.reveal()}
        | _key_fields(row.new_key)
        for row, key in zip(batch.rows, batch.created, strict=True)
    )


def _print_imported(batch: ImportedBatch, new: str) -> None:
    _write_lines(
        {"line": row.line, "id": result.key_id or None}
        | _key_fields(row.new_key)
        | {
            "scheme": row.scheme,
            "partialToken": row.imported_token and row.imported_token.partial,
            "outcome": _outcome(result, new),
        }
        for row, result in zip(batch.rows, batch.imported, strict=True)
    )


def _key_fields(key: NewKey) -> dict[str, Any]:
    expires_at = milliseconds_of(key.expires_at, "expiresAt")
    return {
        "name": key.name.strip(),
        "organizationId": key.organization_id,
        "permission": key.permission,
        "environment": key.environment,
        "expiresAt": None if expires_at is None else iso(expires_at),
    }


def _outcome(result: Imported, new: str) -> str:
    if result.is_new:
        return new
    return "exists, revoked" if result.is_deleted else "exists"


def _write_lines(lines: Iterable[dict[str, Any]]) -> None:
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
    sys.stdout.flush()


def _exit_unwritten(batch: CreatedBatch | ImportedBatch, why: str | None) -> NoReturn:
    first, last = batch.rows[0].line, batch.rows[-1].line
    if isinstance(batch, ImportedBatch):
        message = f"the results of {_lines(first, last)} could not be written: {why}"
        hint = f"they are imported; continue with --from-line {last + 1}"
    else:
        message = f"the tokens of {_lines(first, last)} could not be written: {why}"
        hint = f"revoke their keys, whose tokens are lost; continue with --from-line {first}"
    output.fail(message, hint, output.ERROR)


def _lines(first: int, last: int) -> str:
    return f"lines {first} to {last}"


def _summary(report: ImportReport) -> str:
    sentences = []
    if report.created or not (report.imported or report.existing):
        sentences.append(f"Created {report.created:,} keys. The tokens are not shown again.")
    if report.imported or report.existing:
        sentences.append(f"Imported {report.imported:,} keys.")
    if report.existing:
        sentences.append(f"{report.existing:,} existed already and are unchanged.")
    return " ".join(sentences)
