"""`keylatch scan`: which tokens stand in files, and whether they are good for anything.

Exit codes: 0 none is live, 1 one is, 2 that cannot be told. What is printed names the key and where
its token stands; the token itself is never repeated.
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
from sqlalchemy.engine import make_url

from keylatch.drafts import NotPossible
from keylatch.engine import Engine
from keylatch.errors import HashingBusy, HashingFailed, KeylatchError
from keylatch.model import KeyRecord, Reason, flaw
from keylatch.settings import Settings
from keylatch.tokens import Token, without_tokens
from keylatch_sidecar import leaked
from keylatch_sidecar.commands import terminal
from keylatch_sidecar.commands.command import keyring_of
from keylatch_sidecar.commands.options import JSONOption, RedisOption, StoreOption
from keylatch_sidecar.scan import HISTORY, Search, Sighting

_STANDARD_INPUT: Final = Path("-")


class Status(StrEnum):
    """What a token is good for."""

    LIVE = "live"
    DISABLED = "disabled"
    EXPIRED = "expired"
    REVOKED = "revoked"
    ROTATED = "rotated"
    UNKNOWN = "unknown"
    UNTOLD = "cannot tell"


_STATUS: Final = {
    None: Status.LIVE,
    Reason.REVOKED: Status.REVOKED,
    Reason.DISABLED: Status.DISABLED,
    Reason.ORGANIZATION_DISABLED: Status.DISABLED,
    Reason.EXPIRED: Status.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class Known:
    """What the store says of a token."""

    status: Status
    record: KeyRecord | None = None
    is_revoked_now: bool = False


_UNTOLD: Final = Known(Status.UNTOLD)


def scan(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Files and folders; - reads stdin.")
    ],
    offline: Annotated[bool, typer.Option("--offline", help="Ask no store.")] = False,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Revoke those that are not revoked yet.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what is binary, huge, or git's own.")
    ] = False,
    as_json: JSONOption = False,
    store: StoreOption = None,
    redis: RedisOption = None,
) -> None:
    """Find keylatch tokens in files, and say which are live.

    Exits with 0 if none is, with 1 if one is, with 2 if that cannot be told. Git's history is
    compressed: git log --all -p | keylatch scan -
    """
    if offline and revoke:
        terminal.fail("--offline revokes nothing", "leave one of them out", terminal.UNUSABLE)
    settings = Settings.load(store=store, redis=redis)
    search = _searched(paths, everything)
    tokens = {sighting.token.fingerprint: sighting.token for sighting in search.sightings}
    known = _untold(tokens) if offline else _asked(settings, tokens, revoke)
    _print(search.sightings, known, as_json)
    for place, why in search.unread:
        terminal.say(f"{_plain(place)} cannot be read: {why}", "")
    _sum_up(search, known.values())
    statuses = {each.status for each in known.values()}
    if Status.LIVE in statuses:
        raise typer.Exit(terminal.REFUSED)
    if Status.UNTOLD in statuses or search.unread:
        raise typer.Exit(terminal.UNUSABLE)


def _searched(paths: Iterable[Path], everything: bool) -> Search:
    search = Search(everything=everything)
    console = terminal.words
    columns = SpinnerColumn(), TextColumn("{task.completed:,.0f} files"), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("looking", total=None)
        for path in paths:
            if path == _STANDARD_INPUT:
                search.read(sys.stdin.buffer, "-")
                continue
            for file in search.files_of(path):
                search.look_into(file)
                progress.advance(task)
    return search


def _untold(tokens: Iterable[bytes]) -> dict[bytes, Known]:
    return dict.fromkeys(tokens, _UNTOLD)


def _asked(settings: Settings, tokens: dict[bytes, Token], revoke: bool) -> dict[bytes, Known]:
    """What is known of each token; where the store does not answer, what is not."""
    known = _untold(tokens)
    if not tokens:
        return known
    if _is_missing(settings.store):  # it would be made, and know of no key
        terminal.say("there is no such store", "is KEYLATCH_STORE right?")
        return known
    engine = Engine(settings)

    async def run() -> None:
        try:
            await engine.store.open(int(time.time() * 1000))
            for fingerprint, token in tokens.items():
                known[fingerprint] = await _ask(engine, token, revoke)
        finally:
            await engine.stop()

    try:
        asyncio.run(run())
    except KeylatchError as error:
        terminal.say(error.message, error.hint)
    return known


def _is_missing(store: str) -> bool:
    url = make_url(store)
    return url.get_backend_name() == "sqlite" and not Path(url.database or "").exists()


async def _ask(engine: Engine, token: Token, revoke: bool) -> Known:
    try:
        owner = await engine.identify(token)
    except (HashingBusy, HashingFailed) as error:  # of this one token; the others can be told
        terminal.say(f"{token.key_id}: {error.message}", error.hint)
        return _UNTOLD
    if owner is None:
        return Known(Status.UNKNOWN)
    status = _STATUS[flaw(owner.record, engine.now_ms(), None)]
    if owner.is_previous and not owner.is_of_use and status is not Status.REVOKED:
        status = Status.ROTATED
    if revoke and owner.is_of_use:
        try:
            await leaked.revoke(await keyring_of(engine), owner)
        except NotPossible:  # the key was rotated or deleted in between
            return await _ask(engine, token, revoke)
    return Known(status, owner.record, is_revoked_now=revoke and owner.is_of_use)


def _print(sightings: Sequence[Sighting], known: dict[bytes, Known], as_json: bool) -> None:
    told = [(each, known[each.token.fingerprint]) for each in sightings]
    if as_json:
        terminal.print_json([_as_json(*each) for each in told])
        return
    for each, of in told:
        sys.stdout.write(f"{_plain(each.place)}:{each.line}: {_in_words(each.token, of)}\n")


def _as_json(sighting: Sighting, known: Known) -> dict[str, Any]:
    record = known.record
    return {
        "file": without_tokens(sighting.place),
        "line": sighting.line,
        "keyId": sighting.token.key_id,
        "partialToken": sighting.token.partial,
        "status": known.status,
        "name": record and record.name,
        "organizationId": record and record.organization_id,
        "revokedNow": known.is_revoked_now,
    }


def _in_words(token: Token, known: Known) -> str:
    words = f"{token.key_id} {token.partial} {known.status}"
    if known.is_revoked_now:
        words += ", revoked now"
    if known.record is not None:
        words += f" ({known.record.name}, of {known.record.organization_id})"
    return words


def _plain(place: str) -> str:
    """A file's name without what could steer a terminal, or be a token."""
    shown = place.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return without_tokens(shown)


def _sum_up(search: Search, known: Iterable[Known]) -> None:
    counts = Counter(each.status for each in known)
    found = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items()))
    terminal.words.print(f"Looked into {search.files:,} files: {found or 'no token'}.")
    if search.left_out:
        left = ", ".join(f"{count:,} {why}" for why, count in sorted(search.left_out.items()))
        terminal.words.print(f"Left out: {left}; --all looks into them.")
    if search.left_out[HISTORY]:
        terminal.words.print("What git has compressed: git log --all -p | keylatch scan -")
