"""A file of keys to make, as JSON lines or CSV: read whole, and every mistake in it told at once.

    {"name": "ci", "organization": "acme", "expiresAt": "2030-01-01T00:00:00Z"}
    {"name": "old", "scheme": "usesend", "clientId": "k3j9x0a1b2", "hash": "…"}

The second one is a key that was made elsewhere; `foreign_lines` knows what such lines say. The law
of this file: nothing is made here, and no value is repeated in an error, because somebody may have
put tokens into the file.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TextIO

from keylatch.drafts import LIVE, Draft, InvalidValue
from keylatch.foreign import Foreign
from keylatch.model import FULL
from keylatch.tokens import without_tokens
from keylatch_sidecar.intake import foreign_lines
from keylatch_sidecar.management import bodies
from keylatch_sidecar.management.problems import Fault, Problem

FORMATS: Final = ("jsonl", "csv")
FIELDS: Final = ("name", "organization", "permission", "environment", "expiresAt")
_ALSO: Final = {"expires": "expiresAt", "organizationId": "organization"}
_FOREIGN: Final = foreign_lines.FIELDS | {"token", "secret", "partialToken"}
_MAX_LINE: Final = bodies.MAX_BODY_BYTES


class Row(bodies.Body):
    """A line of the file; what it leaves out is the command's to say."""

    name: str
    organization: str | None = None
    permission: str | None = None
    environment: str | None = None
    expires_at: bodies.Instant | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What counts for lines that do not say."""

    organization: str = "default"
    permission: str = FULL
    environment: str = LIVE


@dataclass(frozen=True, slots=True)
class Numbered:
    """A key to be made, and the line that asks for it."""

    line: int
    draft: Draft
    origin: Foreign | None = None
    """Where it was made elsewhere: what is known of it."""
    scheme: str = ""


class Mistakes(Exception):
    """The file cannot be imported as it is.

    Args:
        told: what is wrong, each with its line.
    """

    def __init__(self, told: list[str]) -> None:
        super().__init__(f"{len(told)} mistakes")
        self.told = told


def read(
    stream: TextIO,
    form: str,
    defaults: Defaults,
    faults: Callable[[Draft], list[InvalidValue]],
    first_line: int = 1,
) -> list[Numbered]:
    """The keys that a file asks for, in its order.

    Args:
        stream: the file's text; a line feed is what ends its lines.
        form: one of `FORMATS`.
        defaults: for what lines leave out.
        faults: what no key may be; see `Keyring.faults`.
        first_line: lines before this one are checked and left out.

    Raises:
        Mistakes: with every line that is wrong.
    """
    asked: list[Numbered] = []
    told: list[str] = []
    lines: dict[str, int] = {}
    rows = _of_csv(stream) if form == "csv" else _of_json(stream)
    for line, row in rows:
        try:
            if isinstance(row, Problem):
                raise row
            scheme = str(row.get("scheme", ""))
            plain, origin = _origin(row)
            draft = _draft(bodies.checked(_plainly_named(plain), Row), defaults)
            if origin is not None and lines.setdefault(origin.locator, line) != line:
                raise Problem(400, f"is the same key as line {lines[origin.locator]}")
        except Problem as problem:
            said = [f"{fault.path}: {fault.message}" for fault in problem.faults]
            told += (f"line {line}: {each}" for each in said or [problem.message])
            continue
        told += (f"line {line}: {fault}" for fault in faults(draft))
        if line >= first_line:
            asked.append(Numbered(line, draft, origin, scheme))
    if told:
        raise Mistakes([without_tokens(each) for each in told])
    return asked


def _of_json(stream: TextIO) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    for line, text in enumerate(_lines(stream), start=1):
        if text.strip():
            yield line, _object(text)


def _object(text: str) -> dict[str, Any] | Problem:
    if len(text) > _MAX_LINE:
        return Problem(400, f"has more than {_MAX_LINE} characters")
    try:
        content = json.loads(text, object_pairs_hook=bodies.without_duplicates)
    except Problem as problem:
        return problem
    except (ValueError, RecursionError):
        return Problem(400, "is not JSON")
    return content if isinstance(content, dict) else Problem(400, "is no JSON object")


def _of_csv(stream: TextIO) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    reader = csv.reader(_lines(stream), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "name" not in header:
            yield 1, Problem(400, f"is no header: it names columns, of {', '.join(FIELDS)}")
            return
        for cells in reader:
            if cells:
                yield reader.line_num, _record(header, cells)
    except csv.Error:
        yield reader.line_num, Problem(400, "is not CSV: a quote does not end, or goes on after it")


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | Problem:
    if len(cells) != len(header):
        return Problem(400, f"has {len(cells)} cells for {len(header)} columns")
    pairs = [(name, cell) for name, cell in zip(header, cells, strict=True) if cell]
    try:
        return bodies.without_duplicates(pairs)
    except Problem as problem:
        return problem


def _lines(stream: TextIO) -> Iterator[str]:
    """Its lines; a byte order mark is what spreadsheets put at the head of UTF-8."""
    for number, text in enumerate(stream):
        yield text.removeprefix("\ufeff") if number == 0 else text


def _origin(row: dict[str, Any]) -> tuple[dict[str, Any], Foreign | None]:
    if "scheme" in row:
        return foreign_lines.taken(row, frozenset((*FIELDS, *_ALSO)))
    if not _FOREIGN.isdisjoint(row):
        told = 'a key that was made elsewhere needs a "scheme"; without, one is minted anew'
        raise bodies.invalid([Fault(min(_FOREIGN.intersection(row)), told)])
    return row, None


def _plainly_named(row: dict[str, Any]) -> dict[str, Any]:
    named = {name: value for name, value in row.items() if name not in _ALSO}
    for also, name in _ALSO.items():
        if also in row:
            if name in row:
                raise bodies.invalid([Fault(name, f"is there twice, as {also} too")])
            named[name] = row[also]
    return named


def _draft(row: Row, defaults: Defaults) -> Draft:
    # Interned: a million lines name few organisations.
    return Draft(
        sys.intern(_given(row.organization, defaults.organization)),
        row.name,
        sys.intern(_given(row.permission, defaults.permission)),
        sys.intern(_given(row.environment, defaults.environment)),
        bodies.milliseconds_of(row.expires_at),
    )


def _given(value: str | None, default: str) -> str:
    return default if value is None else value
