"""`keylatch scan`: finds tokens in files and reports the state of their keys.

Exit codes: 0 no live token, 1 a live token, 2 undetermined. A report has the key's id and the place
of its token, never the token.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from keylatch.core.decisions import KeyRecord, Reason, unusable_reason
from keylatch.core.tokens import Token, redact_tokens
from keylatch.engine import Engine
from keylatch.errors import HashingBusy, HashingFailed, InvalidKeyState, OperationalError
from keylatch.settings import Settings
from keylatch.storage.store import file_of
from keylatch_sidecar.api import leaks
from keylatch_sidecar.cli import output
from keylatch_sidecar.cli.options import Given, JSONOption, setting_options
from keylatch_sidecar.cli.session import keyring_of
from keylatch_sidecar.operations.scanner import HISTORY, FoundToken, Scanner

_STANDARD_INPUT: Final = Path("-")


class Status(StrEnum):
    """The state of a token."""

    LIVE = "live"
    DISABLED = "disabled"
    EXPIRED = "expired"
    REVOKED = "revoked"
    ROTATED = "rotated"
    UNKNOWN = "unknown"
    UNDETERMINED = "undetermined"


_STATUS: Final = {
    None: Status.LIVE,
    Reason.REVOKED: Status.REVOKED,
    Reason.DISABLED: Status.DISABLED,
    Reason.ORGANIZATION_DISABLED: Status.DISABLED,
    Reason.EXPIRED: Status.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class TokenResult:
    """What the store knows about a token."""

    status: Status
    record: KeyRecord | None = None
    is_revoked_now: bool = False


_UNDETERMINED: Final = TokenResult(Status.UNDETERMINED)


@setting_options("store", "redis")
def scan(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH…", help="Files and folders; - reads standard input."),
    ],
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not look up the tokens in the store.")
    ] = False,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Revoke the keys that are not revoked yet.")
    ] = False,
    include_all: Annotated[
        bool, typer.Option("--all", help="Include binary and large files, and git objects.")
    ] = False,
    as_json: JSONOption = False,
    *,
    given: Given,
) -> None:
    """Find keylatch tokens in files and show which are live.

    Exit code: 0 none is live, 1 at least one is, 2 undetermined. Git compresses its history, so
    scan it with: git log --all -p | keylatch scan -
    """
    if offline and revoke:
        output.fail(
            "--offline and --revoke cannot be combined", "leave one of them out", output.ERROR
        )
    settings = Settings.load(**given)
    scanner = _scan_paths(paths, include_all)
    tokens = {each.token.fingerprint: each.token for each in scanner.found}
    results = _all_undetermined(tokens) if offline else _look_up_all(settings, tokens, revoke)
    _print(scanner.found, results, as_json)
    for path, reason in scanner.unreadable:
        output.print_error(f"{_printable(path)} cannot be read: {reason}", "")
    _print_summary(scanner, results.values())
    statuses = {each.status for each in results.values()}
    if Status.LIVE in statuses:
        raise typer.Exit(output.REFUSED)
    if Status.UNDETERMINED in statuses or scanner.unreadable:
        raise typer.Exit(output.ERROR)


def _scan_paths(paths: Iterable[Path], include_all: bool) -> Scanner:
    scanner = Scanner(include_all=include_all)
    console = output.stderr
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} files"), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("scanning", total=None)
        for path in paths:
            if path == _STANDARD_INPUT:
                scanner.scan_stream(sys.stdin.buffer, "-")
                continue
            for file in scanner.files_of(path):
                scanner.scan_file(file)
                progress.advance(task)
    return scanner


def _all_undetermined(tokens: Iterable[bytes]) -> dict[bytes, TokenResult]:
    return dict.fromkeys(tokens, _UNDETERMINED)


def _look_up_all(
    settings: Settings, tokens: dict[bytes, Token], revoke: bool
) -> dict[bytes, TokenResult]:
    """The result for each token; `UNDETERMINED` where the store does not answer."""
    results = _all_undetermined(tokens)
    if not tokens:
        return results
    if _is_missing(settings.store):  # opening it would create it
        output.print_error("there is no such store", "is KEYLATCH_STORE right?")
        return results
    engine = Engine(settings)

    async def run() -> None:
        try:
            await engine.store.open(int(time.time() * 1000))
            for fingerprint, token in tokens.items():
                results[fingerprint] = await _look_up(engine, token, revoke)
        finally:
            await engine.stop()

    try:
        asyncio.run(run())
    except OperationalError as error:
        output.print_error(error.message, error.hint)
    return results


def _is_missing(store: str) -> bool:
    file = file_of(store)
    return file is not None and not file.exists()


async def _look_up(engine: Engine, token: Token, revoke: bool) -> TokenResult:
    try:
        owner = await engine.authenticator.identify(token)
    except (HashingBusy, HashingFailed) as error:  # concerns this token only
        output.print_error(f"{token.key_id}: {error.message}", error.hint)
        return _UNDETERMINED
    if owner is None:
        return TokenResult(Status.UNKNOWN)
    status = _STATUS[unusable_reason(owner.record, engine.now_ms(), None)]
    if owner.is_previous and not owner.is_usable and status is not Status.REVOKED:
        status = Status.ROTATED
    if revoke and owner.is_usable:
        try:
            await leaks.revoke(await keyring_of(engine), owner)
        except InvalidKeyState:  # rotated or revoked since the look-up
            return await _look_up(engine, token, revoke)
    return TokenResult(status, owner.record, is_revoked_now=revoke and owner.is_usable)


def _print(found: Sequence[FoundToken], results: dict[bytes, TokenResult], as_json: bool) -> None:
    rows = [(each, results[each.token.fingerprint]) for each in found]
    if as_json:
        output.print_json([_as_json(*each) for each in rows])
        return
    for each, result in rows:
        sys.stdout.write(f"{_printable(each.path)}:{each.line}: {_describe(each.token, result)}\n")


def _as_json(found: FoundToken, result: TokenResult) -> dict[str, Any]:
    record = result.record
    return {
        "file": redact_tokens(found.path),
        "line": found.line,
        "keyId": found.token.key_id,
        "partialToken": found.token.partial,
        "status": result.status,
        "name": record and record.name,
        "organizationId": record and record.organization_id,
        "revokedNow": result.is_revoked_now,
    }


def _describe(token: Token, result: TokenResult) -> str:
    text = f"{token.key_id} {token.partial} {result.status}"
    if result.is_revoked_now:
        text += ", revoked now"
    if result.record is not None:
        text += f" ({result.record.name}, of {result.record.organization_id})"
    return text


def _printable(path: str) -> str:
    """A path without control characters and tokens."""
    shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return redact_tokens(shown)


def _print_summary(scanner: Scanner, results: Iterable[TokenResult]) -> None:
    counts = Counter(each.status for each in results)
    found = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items()))
    output.stderr.print(f"Scanned {scanner.file_count:,} files: {found or 'no token'}.")
    if scanner.skipped:
        skipped = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(scanner.skipped.items())
        )
        output.stderr.print(f"Skipped: {skipped}; --all scans them.")
    if scanner.skipped[HISTORY]:
        output.stderr.print("Scan the history of git with: git log --all -p | keylatch scan -")
