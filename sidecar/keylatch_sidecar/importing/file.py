"""Reads a file of keys, JSON lines or CSV, as a whole, and reports every error in it at once.

    {"name": "ci", "organization": "acme", "expiresAt": "2030-01-01T00:00:00Z"}
    {"name": "old", "scheme": "usesend", "clientId": "k3j9x0a1b2", "hash": "…"}

The second line is an imported key; `external_keys` parses its fields. The law of this file: no key
is created here, and no error contains a value, because the file may contain tokens.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TextIO

from keylatch.core.decisions import FULL
from keylatch.core.imported_tokens import ImportedToken
from keylatch.core.tokens import redact_tokens
from keylatch.core.validation import LIVE, NewKey
from keylatch.errors import InvalidValue
from keylatch_sidecar.api import request_body, schemas
from keylatch_sidecar.api.errors import InvalidInput, Problem, invalid_input
from keylatch_sidecar.importing import external_keys

FORMATS: Final = ("jsonl", "csv")
FIELDS: Final = ("name", "organization", "permission", "environment", "expiresAt")
_ALIASES: Final = {"expires": "expiresAt", "organizationId": "organization"}
_IMPORT_FIELDS: Final = external_keys.FIELDS | {"token", "secret", "partialToken"}
_MAX_LINE_CHARACTERS: Final = request_body.MAX_BODY_BYTES


class Row(schemas.Body):
    """The fields of a line that are not about its import; None: `Defaults` apply."""

    name: str
    organization: str | None = None
    permission: str | None = None
    environment: str | None = None
    expires_at: schemas.Instant | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for fields that a line does not have."""

    organization: str = "default"
    permission: str = FULL
    environment: str = LIVE


@dataclass(frozen=True, slots=True)
class NumberedKey:
    """A key to create, and the number of its line."""

    line: int
    new_key: NewKey
    imported_token: ImportedToken | None = None
    """None: a new key, whose token is minted."""
    scheme: str = ""


class FileErrors(Exception):
    """The file cannot be imported as it is.

    Args:
        messages: one per error, each with its line.
    """

    def __init__(self, messages: list[str]) -> None:
        super().__init__(f"{len(messages)} mistakes")
        self.messages = messages


def read(
    stream: TextIO,
    file_format: str,
    defaults: Defaults,
    validate: Callable[[NewKey], list[InvalidValue]],
    first_line: int = 1,
) -> list[NumberedKey]:
    """The keys of a file, in its order.

    Args:
        stream: the text of the file; its lines end with `\n`.
        file_format: one of `FORMATS`.
        defaults: for fields that a line does not have.
        validate: the errors of a key; see `Keyring.validate`.
        first_line: lines before this one are checked and skipped.

    Raises:
        FileErrors: with all errors of all lines.
    """
    keys: list[NumberedKey] = []
    messages: list[str] = []
    lines: dict[str, int] = {}
    rows = _read_csv(stream) if file_format == "csv" else _read_json_lines(stream)
    for line, row in rows:
        try:
            if isinstance(row, Problem):
                raise row
            scheme = str(row.get("scheme", ""))
            common, imported_token = _split_imported(row)
            new_key = _new_key(request_body.validated(_with_canonical_names(common), Row), defaults)
            if (
                imported_token is not None
                and lines.setdefault(imported_token.locator, line) != line
            ):
                raise Problem(400, f"is the same key as line {lines[imported_token.locator]}")
        except Problem as problem:
            errors = [f"{fault.path}: {fault.message}" for fault in problem.errors]
            messages += (f"line {line}: {message}" for message in errors or [problem.message])
            continue
        messages += (f"line {line}: {fault}" for fault in validate(new_key))
        if line >= first_line:
            keys.append(NumberedKey(line, new_key, imported_token, scheme))
    if messages:
        raise FileErrors([redact_tokens(each) for each in messages])
    return keys


def _read_json_lines(stream: TextIO) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    for line, text in enumerate(_text_lines(stream), start=1):
        if text.strip():
            yield line, _parse_object(text)


def _parse_object(text: str) -> dict[str, Any] | Problem:
    if len(text) > _MAX_LINE_CHARACTERS:
        return Problem(400, f"has more than {_MAX_LINE_CHARACTERS} characters")
    try:
        content = json.loads(text, object_pairs_hook=request_body.without_duplicates)
    except Problem as problem:
        return problem
    except (ValueError, RecursionError):
        return Problem(400, "is not JSON")
    return content if isinstance(content, dict) else Problem(400, "is not a JSON object")


def _read_csv(stream: TextIO) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    reader = csv.reader(_text_lines(stream), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "name" not in header:
            yield 1, Problem(400, f"is not a header with names of columns: {', '.join(FIELDS)}")
            return
        for cells in reader:
            if cells:
                yield reader.line_num, _parse_record(header, cells)
    except csv.Error:
        yield (
            reader.line_num,
            Problem(400, "is not CSV: a quoted cell does not end, or text follows its end"),
        )


def _parse_record(header: list[str], cells: list[str]) -> dict[str, Any] | Problem:
    if len(cells) != len(header):
        return Problem(400, f"has {len(cells)} cells for {len(header)} columns")
    pairs = [(name, cell) for name, cell in zip(header, cells, strict=True) if cell]
    try:
        return request_body.without_duplicates(pairs)
    except Problem as problem:
        return problem


def _text_lines(stream: TextIO) -> Iterator[str]:
    """The lines without the byte order mark, with which spreadsheets begin UTF-8 files."""
    for number, text in enumerate(stream):
        yield text.removeprefix("\ufeff") if number == 0 else text


def _split_imported(row: dict[str, Any]) -> tuple[dict[str, Any], ImportedToken | None]:
    if "scheme" in row:
        return external_keys.parse(row, frozenset((*FIELDS, *_ALIASES)))
    if not _IMPORT_FIELDS.isdisjoint(row):
        message = 'an imported key needs a "scheme"; without one, a new key is minted'
        raise invalid_input([InvalidInput(min(_IMPORT_FIELDS.intersection(row)), message)])
    return row, None


def _with_canonical_names(row: dict[str, Any]) -> dict[str, Any]:
    named = {name: value for name, value in row.items() if name not in _ALIASES}
    for alias, name in _ALIASES.items():
        if alias in row:
            if name in row:
                raise invalid_input([InvalidInput(name, f"is there twice, as {alias} too")])
            named[name] = row[alias]
    return named


def _new_key(row: Row, defaults: Defaults) -> NewKey:
    # Interned: a million lines have few different organisations.
    return NewKey(
        sys.intern(_value_or_default(row.organization, defaults.organization)),
        row.name,
        sys.intern(_value_or_default(row.permission, defaults.permission)),
        sys.intern(_value_or_default(row.environment, defaults.environment)),
        row.expires_at,
    )


def _value_or_default(value: str | None, default: str) -> str:
    return default if value is None else value
