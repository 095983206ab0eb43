"""Making many keys: batch by batch, and after each commit its tokens go to standard output.

A batch is one transaction, so whatever ends an import ends it between two lines that can be named.
Nothing blocks the event loop for long: on PostgreSQL this process holds a lease, and revokes
elsewhere wait for it.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Final, NoReturn, TextIO, cast

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from keylatch.errors import KeylatchError
from keylatch.keyring import Created, InvalidValue, Keyring
from keylatch_sidecar import terminal
from keylatch_sidecar.bodies import iso
from keylatch_sidecar.key_file import FORMATS, Mistakes, Numbered

STANDARD_INPUT: Final = Path("-")
_TOLD: Final = 50
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


def opened(path: Path) -> TextIO:
    """The file as text, or standard input; whoever asks closes it. Ends where it cannot be read."""
    if path == STANDARD_INPUT:
        stream = cast(TextIOWrapper, sys.stdin)
        stream.reconfigure(encoding="utf-8", errors=_ERRORS, newline=_LINE_ENDS)
        return stream
    try:
        return path.open(encoding="utf-8", errors=_ERRORS, newline=_LINE_ENDS)
    except OSError as error:
        wrong = f"the file cannot be read: {error.strerror}"
        hint = "a file of JSON lines or CSV, or - for standard input"
        terminal.fail(wrong, hint, terminal.UNUSABLE)


def form_of(path: Path, given: str | None) -> str:
    """The file's format: as given, else by its name, else JSON lines."""
    if given is None:
        return "csv" if path.suffix.lower() == ".csv" else "jsonl"
    if given not in FORMATS:
        terminal.fail("there is no such format", " or ".join(FORMATS), terminal.UNUSABLE)
    return given


def refuse(mistakes: Mistakes) -> NoReturn:
    """Tells what is wrong with a file, up to a screenful; ends."""
    for mistake in mistakes.told[:_TOLD]:
        terminal.say(mistake, "")
    more = len(mistakes.told) - _TOLD
    if more > 0:
        terminal.say(f"and {more:,} more mistakes", "")
    terminal.say("nothing was created", "correct these lines and import the file again")
    raise SystemExit(terminal.UNUSABLE)


def forewarn(keys: int, hasher: str) -> None:
    """Says what argon2id will cost, where that is much."""
    minutes = keys * _ARGON2ID_SECONDS / 60
    if hasher == "argon2id" and minutes > 1:
        terminal.words.print(
            f"argon2id takes about {minutes:,.0f} processor minutes for these keys; "
            "KEYLATCH_HASHER=sha256 is as safe for minted keys."
        )


async def make(keyring: Keyring, asked: Sequence[Numbered], batch: int) -> None:
    """Create all of them, and show how far that is; ends, naming lines, where it cannot go on."""
    console = terminal.words
    with Progress(
        *_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("creating keys", total=len(asked))
        for start in range(0, len(asked), batch):
            some = asked[start : start + batch]
            try:
                created = await keyring.create_many([each.draft for each in some])
                await asyncio.to_thread(_print, some, created)
            except (KeylatchError, InvalidValue, OSError) as error:
                progress.stop()
                _stopped(error, some)
            progress.advance(task, len(some))
    with contextlib.suppress(KeylatchError):  # all is made and printed; it is about speed only
        await keyring.made_many()


def _print(asked: Sequence[Numbered], created: Sequence[Created]) -> None:
    lines = [
        json.dumps(
            {
                "line": each.line,
                "id": made.record.id,
                "token": made.token.reveal(),
                "name": made.record.name,
                "organizationId": made.record.organization_id,
                "permission": made.record.permission,
                "environment": made.record.environment,
                "expiresAt": made.record.expires_at and iso(made.record.expires_at),
            }
        )
        for each, made in zip(asked, created, strict=True)
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _stopped(error: Exception, some: Sequence[Numbered]) -> NoReturn:
    lines = f"lines {some[0].line} to {some[-1].line}"
    if isinstance(error, OSError):  # standard output is full, or nobody reads it any more
        wrong = f"the tokens of {lines} could not be written: {error.strerror}"
        hint = f"their keys are there and nobody has them: revoke those; --from-line {some[0].line}"
    elif isinstance(error, KeylatchError):
        wrong = f"{lines} were not created: {error.message}"
        hint = f"{error.hint}; go on with --from-line {some[0].line}"
    else:
        wrong = f"{lines} were not created: {error}"
        hint = f"correct the file and go on with --from-line {some[0].line}"
    terminal.fail(wrong, hint, terminal.UNUSABLE)
