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

from keylatch.errors import KeylatchError
from keylatch.foreign import Foreign
from keylatch.keyring import Brought, Created, Draft, InvalidValue, Keyring
from keylatch_sidecar.commands import terminal
from keylatch_sidecar.intake.key_file import FORMATS, Mistakes, Numbered
from keylatch_sidecar.management.bodies import iso

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


@dataclass(slots=True)
class Tally:
    """What became of the lines: keys created, taken in, and here already."""

    created: int = 0
    brought: int = 0
    held: int = 0

    def told(self) -> str:
        """In words."""
        said = []
        if self.created or not (self.brought or self.held):
            said.append(f"Created {self.created:,} keys. The tokens above are shown this once.")
        if self.brought or self.held:
            said.append(f"Imported {self.brought:,} keys that were made elsewhere.")
        if self.held:
            said.append(f"{self.held:,} were here already and stay as they are.")
        return " ".join(said)


def hashed_here(asked: Sequence[Numbered]) -> int:
    """How many of the keys must be hashed."""
    return sum(each.origin is None or each.origin.token is not None for each in asked)


async def make(keyring: Keyring, asked: Sequence[Numbered], batch: int) -> Tally:
    """Create all of them, and show how far that is; ends, naming lines, where it cannot go on."""
    console = terminal.words
    tally = Tally()
    with Progress(
        *_COLUMNS, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("creating keys", total=len(asked))
        for some in _batches(asked, batch):
            try:
                await _make(keyring, some, tally)
            except (KeylatchError, InvalidValue, OSError) as error:
                progress.stop()
                _stopped(error, some)
            progress.advance(task, len(some))
    with contextlib.suppress(KeylatchError):  # all is made and printed; it is about speed only
        await keyring.made_many()
    return tally


def _batches(asked: Sequence[Numbered], size: int) -> Iterator[list[Numbered]]:
    """In the file's order; in each, either all were made elsewhere or none was."""
    for _, group in groupby(asked, lambda each: each.origin is None):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


async def _make(keyring: Keyring, some: Sequence[Numbered], tally: Tally) -> None:
    foreign = _foreign(some)
    if not foreign:
        created = await keyring.create_many([each.draft for each in some])
        tally.created += len(created)
        await asyncio.to_thread(_print, some, created)
        return
    brought = await keyring.bring_many(foreign)
    tally.brought += sum(each.is_new for each in brought)
    tally.held += sum(not each.is_new for each in brought)
    await asyncio.to_thread(_report, some, brought)


def _foreign(some: Sequence[Numbered]) -> list[tuple[Draft, Foreign]]:
    return [(each.draft, each.origin) for each in some if each.origin is not None]


async def foresee(keyring: Keyring, asked: Sequence[Numbered], batch: int) -> None:
    """Say of each key that was made elsewhere what an import would do."""
    for some in _batches(asked, batch):
        held = await keyring.held([origin for _, origin in _foreign(some)])
        await asyncio.to_thread(_report, [each for each in some if each.origin], held, "new")


def _report(asked: Sequence[Numbered], told: Sequence[Brought], new: str = "imported") -> None:
    _write(
        {"line": each.line, "id": brought.key_id or None}
        | _described(each.draft)
        | {
            "scheme": each.scheme,
            "partialToken": each.origin and each.origin.partial,
            "outcome": _outcome(brought, new),
        }
        for each, brought in zip(asked, told, strict=True)
    )


def _outcome(brought: Brought, new: str) -> str:
    if brought.is_new:
        return new
    return "here already, revoked" if brought.is_deleted else "here already"


def _described(draft: Draft) -> dict[str, Any]:
    return {
        "name": draft.name.strip(),
        "organizationId": draft.organization_id,
        "permission": draft.permission,
        "environment": draft.environment,
        "expiresAt": draft.expires_at and iso(draft.expires_at),
    }


def _print(asked: Sequence[Numbered], created: Sequence[Created]) -> None:
    _write(
        {"line": each.line, "id": made.record.id, "token": made.token.reveal()}
        | _described(each.draft)
        for each, made in zip(asked, created, strict=True)
    )


def _write(lines: Iterable[dict[str, Any]]) -> None:
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in lines))
    sys.stdout.flush()


def _stopped(error: Exception, some: Sequence[Numbered]) -> NoReturn:
    lines = f"lines {some[0].line} to {some[-1].line}"
    if isinstance(error, OSError) and some[0].origin is not None:
        wrong = f"what became of {lines} could not be written: {error.strerror}"
        hint = f"they are imported; go on with --from-line {some[-1].line + 1}"
    elif isinstance(error, OSError):  # standard output is full, or nobody reads it any more
        wrong = f"the tokens of {lines} could not be written: {error.strerror}"
        hint = f"their keys are there and nobody has them: revoke those; --from-line {some[0].line}"
    elif isinstance(error, KeylatchError):
        wrong = f"{lines} were not created: {error.message}"
        hint = f"{error.hint}; go on with --from-line {some[0].line}"
    else:
        wrong = f"{lines} were not created: {error}"
        hint = f"correct the file and go on with --from-line {some[0].line}"
    terminal.fail(wrong, hint, terminal.UNUSABLE)
