"""Making many keys: batch by batch, and after each commit its tokens go to standard output.

A batch is one transaction, so whatever ends an import ends it between two lines that can be named.
Keys that were made elsewhere have no tokens to print, and are there once however often they come.
Nothing blocks the event loop for long: on PostgreSQL this process holds a lease, and revokes
elsewhere wait for it.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keylatch.core.imported_tokens import ImportedToken
from keylatch.errors import InvalidValue, KeylatchError, OperationalError
from keylatch.management.keyring import Created, Imported, Keyring, NewKey
from keylatch_sidecar.api.schemas import iso, milliseconds_of
from keylatch_sidecar.cli import output
from keylatch_sidecar.importing.file import FORMATS, FileErrors, NumberedKey

STANDARD_INPUT: Final = Path("-")
_MAX_SHOWN: Final = 50
_ARGON2ID_SECONDS: Final = 0.025
_COLUMNS: Final = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)
# Bytes that are no UTF-8 become what no name may hold; CSV wants its line ends as they are.
_ERRORS: Final = "surrogateescape"
_LINE_ENDS: Final = ""


def open_input(path: Path) -> TextIO:
    """The file as text, or standard input; whoever asks closes it. Ends where it cannot be read."""
    if path == STANDARD_INPUT:
        stream = cast(TextIOWrapper, sys.stdin)
        stream.reconfigure(encoding="utf-8", errors=_ERRORS, newline=_LINE_ENDS)
        return stream
    try:
        return path.open(encoding="utf-8", errors=_ERRORS, newline=_LINE_ENDS)
    except OSError as error:
        message = f"the file cannot be read: {error.strerror}"
        hint = "a file of JSON lines or CSV, or - for standard input"
        output.fail(message, hint, output.ERROR)


def file_format(path: Path, given: str | None) -> str:
    """The file's format: as given, else by its name, else JSON lines."""
    if given is None:
        return "csv" if path.suffix.lower() == ".csv" else "jsonl"
    if given not in FORMATS:
        output.fail("there is no such format", " or ".join(FORMATS), output.ERROR)
    return given


def exit_with_errors(error: FileErrors) -> NoReturn:
    """Tells what is wrong with a file, up to a screenful; ends."""
    for mistake in error.told[:_MAX_SHOWN]:
        output.print_error(mistake, "")
    more = len(error.told) - _MAX_SHOWN
    if more > 0:
        output.print_error(f"and {more:,} more mistakes", "")
    output.print_error("nothing was created", "correct these lines and import the file again")
    raise SystemExit(output.ERROR)


def warn_of_hashing_cost(keys: int, hasher: str) -> None:
    """Says what argon2id will cost, where that is much."""
    minutes = keys * _ARGON2ID_SECONDS / 60
    if hasher == "argon2id" and minutes > 1:
        output.stderr.print(
            f"argon2id takes about {minutes:,.0f} processor minutes for these keys; "
            "KEYLATCH_HASHER=sha256 is as safe for minted keys."
        )


@dataclass(slots=True)
class ImportReport:
    """What became of the lines: keys created, taken in, and here already."""

    created: int = 0
    imported: int = 0
    existing: int = 0

    def summary(self) -> str:
        """In words."""
        sentences = []
        if self.created or not (self.imported or self.existing):
            sentences.append(
                f"Created {self.created:,} keys. The tokens above are shown this once."
            )
        if self.imported or self.existing:
            sentences.append(f"Imported {self.imported:,} keys.")
        if self.existing:
            sentences.append(f"{self.existing:,} existed already and are unchanged.")
        return " ".join(sentences)


def count_to_hash(rows: Sequence[NumberedKey]) -> int:
    """How many of the keys must be hashed."""
    return sum(
        each.imported_token is None or each.imported_token.token is not None for each in rows
    )


async def import_rows(
    keyring: Keyring, rows: Sequence[NumberedKey], batch_size: int
) -> ImportReport:
    """Create all of them, and show how far that is; ends, naming lines, where it cannot go on."""
    console = output.stderr
    report = ImportReport()
    with Progress(
        *_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("creating keys", total=len(rows))
        for batch in _batches(rows, batch_size):
            try:
                await _import_batch(keyring, batch, report)
            except (OperationalError, InvalidValue, OSError) as error:
                progress.stop()
                _exit_stopped(error, batch)
            progress.advance(task, len(batch))
    with contextlib.suppress(KeylatchError):  # all is made and printed; it is about speed only
        await keyring.analyze()
    return report


def _batches(rows: Sequence[NumberedKey], size: int) -> Iterator[list[NumberedKey]]:
    """In the file's order; in each, either all were made elsewhere or none was."""
    for _, group in groupby(rows, lambda each: each.imported_token is None):
        same_kind = list(group)
        yield from (same_kind[start : start + size] for start in range(0, len(same_kind), size))


async def _import_batch(
    keyring: Keyring, batch: Sequence[NumberedKey], report: ImportReport
) -> None:
    imported_tokens = _imported_tokens(batch)
    if not imported_tokens:
        created = await keyring.create_many([each.new_key for each in batch])
        report.created += len(created)
        await asyncio.to_thread(_print_created, batch, created)
        return
    imported = await keyring.import_many(imported_tokens)
    report.imported += sum(each.is_new for each in imported)
    report.existing += sum(not each.is_new for each in imported)
    await asyncio.to_thread(_print_imported, batch, imported)


def _imported_tokens(batch: Sequence[NumberedKey]) -> list[tuple[NewKey, ImportedToken]]:
    return [
        (each.new_key, each.imported_token) for each in batch if each.imported_token is not None
    ]


async def preview(keyring: Keyring, rows: Sequence[NumberedKey], batch_size: int) -> None:
    """Say of each key that was made elsewhere what an import would do."""
    for batch in _batches(rows, batch_size):
        found = await keyring.find_imported([origin for _, origin in _imported_tokens(batch)])
        await asyncio.to_thread(
            _print_imported, [each for each in batch if each.imported_token], found, "new"
        )


def _print_imported(
    rows: Sequence[NumberedKey], imported: Sequence[Imported], new: str = "imported"
) -> None:
    _write_lines(
        {"line": each.line, "id": result.key_id or None}
        | _key_fields(each.new_key)
        | {
            "scheme": each.scheme,
            "partialToken": each.imported_token and each.imported_token.partial,
            "outcome": _outcome(result, new),
        }
        for each, result in zip(rows, imported, strict=True)
    )


def _outcome(result: Imported, new: str) -> str:
    if result.is_new:
        return new
    return "exists, revoked" if result.is_deleted else "exists"


def _key_fields(key: NewKey) -> dict[str, Any]:
    return {
        "name": key.name.strip(),
        "organizationId": key.organization_id,
        "permission": key.permission,
        "environment": key.environment,
        "expiresAt": key.expires_at and iso(milliseconds_of(key.expires_at)),
    }


def _print_created(rows: Sequence[NumberedKey], created: Sequence[Created]) -> None:
    _write_lines(
        {"line": each.line, "id": key.record.id, "token": key.secret} | _key_fields(each.new_key)
        for each, key in zip(rows, created, strict=True)
    )


def _write_lines(lines: Iterable[dict[str, Any]]) -> None:
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
    sys.stdout.flush()


def _exit_stopped(error: Exception, batch: Sequence[NumberedKey]) -> NoReturn:
    lines = f"lines {batch[0].line} to {batch[-1].line}"
    if isinstance(error, OSError) and batch[0].imported_token is not None:
        message = f"the results of {lines} could not be written: {error.strerror}"
        hint = f"they are imported; go on with --from-line {batch[-1].line + 1}"
    elif isinstance(error, OSError):  # standard output is full, or nobody reads it any more
        message = f"the tokens of {lines} could not be written: {error.strerror}"
        hint = f"revoke their keys, whose tokens are lost; go on with --from-line {batch[0].line}"
    elif isinstance(error, OperationalError):
        message = f"{lines} were not created: {error.message}"
        hint = f"{error.hint}; go on with --from-line {batch[0].line}"
    else:
        message = f"{lines} were not created: {error}"
        hint = f"correct the file and go on with --from-line {batch[0].line}"
    output.fail(message, hint, output.ERROR)
