"""What commands print: data to standard output, messages to standard error."""

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
    """The propagation of a change, as a phrase."""
    if not receipt.members:
        return "in force for every check that starts now"
    return f"acknowledged by {receipt.acknowledged} of {receipt.members} processes, in force"


def require_found(found: T | None) -> T:
    """What was found; None ends the command."""
    if found is None:  # the id is not repeated: it could be a secret
        fail("there is no such key", "keylatch keys list --organization …", REFUSED)
    return found


def as_json(record: KeyRecord) -> dict[str, Any]:
    """A key as the HTTP API shows it."""
    return describe(record).model_dump(by_alias=True)


def print_json(content: Any) -> None:
    """JSON on standard output, in ASCII, which every terminal's encoding can represent."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def print_json_of(records: Sequence[KeyRecord], is_first: bool, is_last: bool) -> None:
    """A part of a list as JSON; all parts together are one array."""
    text = json.dumps([as_json(record) for record in records], indent=2)
    if records:
        text = ("[" if is_first else ",") + text[1:-2] + ("\n]" if is_last else "")
    sys.stdout.write(text + ("\n" if is_last else ""))


def print_table_of(records: Sequence[KeyRecord], is_first: bool, is_last: bool) -> None:
    """A part of a list as a table; the parts of a longer list have the same column widths."""
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
    """One field per line."""
    for name, value in as_json(record).items():
        sys.stdout.write(f"{name}: {value}\n")


def print_token(token: Token) -> None:
    """Only the token, on standard output: `TOKEN=$(keylatch keys create …)`."""
    sys.stdout.write(token.reveal() + "\n")


def refuse_token_in_argument() -> NoReturn:
    """End the command, without repeating the argument."""
    print_error(
        "a token is never an argument: it is in your shell's history and in process lists now",
        "revoke that key; verify reads tokens from standard input, key ids begin with key_",
    )
    sys.exit(ERROR)


def refuse_password_in_argument() -> NoReturn:
    """End the command, without repeating the argument."""
    print_error(
        "a URL with a password is never an argument: it is in process lists now, for every account",
        "change the password; set KEYLATCH_STORE or KEYLATCH_REDIS, or put the URL into a file and"
        " its path into KEYLATCH_STORE_FILE or KEYLATCH_REDIS_FILE",
    )
    sys.exit(ERROR)


def fail(message: str, hint: str, code: int) -> NoReturn:
    """End the command with an error and a hint."""
    print_error(message, hint)
    raise typer.Exit(code)


def print_error(message: str, hint: str) -> None:
    """An error and a hint on standard error."""
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
