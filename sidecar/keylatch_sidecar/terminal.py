"""How the command line speaks: data on standard output, words on standard error."""

import json
import sys
from typing import Any, Final, NoReturn, TypeVar

import typer
from rich.console import Console

from keylatch.feed import Receipt
from keylatch.model import KeyRecord
from keylatch_sidecar.unsent import describe

T = TypeVar("T")

REFUSED: Final = 1
UNUSABLE: Final = 2

words = Console(stderr=True, highlight=False)


def spread(receipt: Receipt) -> str:
    """How far a change has spread, in words."""
    if not receipt.members:
        return "in force for every check that starts now"
    return f"acknowledged by {receipt.acknowledged} of {receipt.members} processes, in force"


def known(found: T | None) -> T:
    """What was found; ends where there is nothing."""
    if found is None:  # what was asked for is not repeated: it could be a secret
        fail("there is no such key", "keylatch keys list --organization …", REFUSED)
    return found


def as_json(record: KeyRecord) -> dict[str, Any]:
    """A key as the HTTP API shows it."""
    return describe(record).model_dump(by_alias=True)


def print_json(content: Any) -> None:
    """JSON on standard output; ASCII, so that no terminal's encoding can break it."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def print_record(record: KeyRecord) -> None:
    """One field a line."""
    for name, value in as_json(record).items():
        sys.stdout.write(f"{name}: {value}\n")


def refuse_token_in_argument() -> NoReturn:
    """Ends, without repeating it."""
    say(
        "a token is never an argument: it is in your shell's history and in process lists now",
        "revoke that key; verify reads tokens from standard input, ids look like key_…",
    )
    sys.exit(UNUSABLE)


def fail(wrong: str, hint: str, code: int) -> NoReturn:
    """Ends with an error and a hint."""
    say(wrong, hint)
    raise typer.Exit(code)


def say(wrong: str, hint: str) -> None:
    """An error and a hint on standard error."""
    sys.stderr.write(f"error: {wrong}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
