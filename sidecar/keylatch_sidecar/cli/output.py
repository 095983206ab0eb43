"""How the command line speaks: data on standard output, words on standard error."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from keylatch.core.decisions import KeyRecord
from keylatch.core.tokens import Token
from keylatch.revocation.propagation import Receipt
from keylatch_sidecar.api.unsent import describe

T = TypeVar("T")

REFUSED: Final = 1
ERROR: Final = 2

_COLUMNS: Final = {
    "id": 16,
    "name": 40,
    "token": 24,
    "permission": 12,
    "created": 24,
    "last used": 24,
}

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def propagation(receipt: Receipt) -> str:
    """How far a change has spread, in words."""
    if not receipt.members:
        return "in force for every check that starts now"
    return f"acknowledged by {receipt.acknowledged} of {receipt.members} processes, in force"


def require_found(found: T | None) -> T:
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


def print_json_of(records: Sequence[KeyRecord], is_first: bool, is_last: bool) -> None:
    """A part of a list as JSON; the parts make one array."""
    text = json.dumps([as_json(record) for record in records], indent=2)
    if records:
        text = ("[" if is_first else ",") + text[1:-2] + ("\n]" if is_last else "")
    sys.stdout.write(text + ("\n" if is_last else ""))


def print_table_of(records: Sequence[KeyRecord], is_first: bool, is_last: bool) -> None:
    """A part of a list as a table; one that goes on has columns of the same width in all parts."""
    is_partial = not (is_first and is_last)
    table = Table(box=None, show_header=is_first)
    for heading, width in _COLUMNS.items():
        table.add_column(
            heading,
            no_wrap=heading in ("id", "token"),
            overflow="fold",
            width=width if is_partial else None,
        )
    for record in records:
        key = describe(record)
        used = key.last_used or "never"
        table.add_row(key.id, key.name, key.partial_token, key.permission, key.created_at, used)
    Console(highlight=False, markup=False).print(table)


def print_record(record: KeyRecord) -> None:
    """One field a line."""
    for name, value in as_json(record).items():
        sys.stdout.write(f"{name}: {value}\n")


def print_token(token: Token) -> None:
    """A token alone, on standard output: `TOKEN=$(keylatch keys create …)`."""
    sys.stdout.write(token.reveal() + "\n")


def refuse_token_in_argument() -> NoReturn:
    """Ends, without repeating it."""
    print_error(
        "a token is never an argument: it is in your shell's history and in process lists now",
        "revoke that key; verify reads tokens from standard input, ids look like key_…",
    )
    sys.exit(ERROR)


def refuse_password_in_argument() -> NoReturn:
    """Ends, without repeating it."""
    print_error(
        "a URL with a password is never an argument: it is in process lists now, for every account",
        "set KEYLATCH_STORE or KEYLATCH_REDIS, or put the URL into a file and name that in"
        " KEYLATCH_STORE_FILE or KEYLATCH_REDIS_FILE; and change the password",
    )
    sys.exit(ERROR)


def fail(message: str, hint: str, code: int) -> NoReturn:
    """Ends with an error and a hint."""
    print_error(message, hint)
    raise typer.Exit(code)


def print_error(message: str, hint: str) -> None:
    """An error and a hint on standard error."""
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
